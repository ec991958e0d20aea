"""`prunebench report`: what it writes, refuses and replaces, and its figures as files."""

import importlib.util
import re

import pytest

from prunebench.results.report import libraries
from prunebench.results.store import ResultStore
from tests.report_pages import data_of, generated, mixed

# ---------------------------------------------------------------- the command


@pytest.fixture
def results_dir(tmp_path):
    store = ResultStore(tmp_path / "results")
    for result in [*mixed(), generated("other")]:
        store.publish(result)
    return tmp_path / "results"


def models_of(path):
    return [model["name"] for model in data_of(path.read_text("utf-8"))["models"]]


def test_the_command_writes_the_page(cli, results_dir, tmp_path):
    outcome = cli("report", "--results-dir", results_dir)
    assert outcome.stdout == "report.html\n"
    page = tmp_path / "work" / "report.html"
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert models_of(page) == ["m", "other"]
    cli("report", "model=m", "-o", "deep/er/one.html", "--results-dir", results_dir)
    assert models_of(tmp_path / "work" / "deep" / "er" / "one.html") == ["m"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["-o", "there.html"], 5, "there.html exists already"),
        (["-o", "folder"], 5, "folder is a folder"),
        (["-o", "there.html/x.html"], 5, "a file stands where a folder should be"),
        (["method=gblm"], 3, "no result has method=gblm"),
        (["methd=gblm"], 2, "did you mean 'method'?"),
        (["--figures", "there.html"], 5, "cannot write there.html"),
    ],
)
def test_wrong_input(cli, results_dir, tmp_path, arguments, code, says):
    (tmp_path / "work" / "there.html").write_text("mine")
    (tmp_path / "work" / "folder").mkdir()
    outcome = cli("report", *arguments, "--results-dir", results_dir, code=code)
    assert says in outcome.output
    assert (tmp_path / "work" / "there.html").read_text() == "mine"


def test_force_replaces(cli, results_dir, tmp_path):
    (tmp_path / "work" / "report.html").write_text("old")
    cli("report", "--force", "--results-dir", results_dir)
    assert (tmp_path / "work" / "report.html").read_text("utf-8") != "old"


def test_a_damaged_file_and_a_newer_one_are_named_and_the_page_is_written(
    cli, results_dir, tmp_path
):
    (results_dir / "torn.json").write_text("{")
    (results_dir / "newer.json").write_text('{"schema_version": 2}')
    (results_dir / "torn.20260101.bench").write_text("{")
    outcome = cli("report", "--results-dir", results_dir, code=4)
    assert "torn.json is skipped: not a JSON object" in outcome.stderr
    assert "newer.json is skipped: schema version 2" in outcome.stderr
    assert "torn.20260101.bench is skipped" in outcome.stderr
    page = (tmp_path / "work" / "report.html").read_text("utf-8")
    assert "<code>torn.json</code>" in page and "<code>torn.20260101.bench</code>" in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize("missing", [{"vl_convert"}, {"altair", "vl_convert", "itables"}])
def test_without_its_libraries_the_extra_is_named(cli, results_dir, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        libraries.importlib.util,
        "find_spec",
        lambda name, *a: None if name in missing else find(name, *a),
    )
    outcome = cli("report", "--results-dir", results_dir, code=3)
    assert "vl-convert-python" in outcome.stderr
    assert "pip install 'prunebench[report]'" in outcome.stderr
    assert ("altair" in outcome.stderr) == ("altair" in missing)


def test_compare_prints_latex(cli, results_dir):
    out = cli("compare", "-f", "latex", "--results-dir", results_dir).stdout
    assert out.count(r"\begin{table}") == 2
    assert r"of dense)" in out


# ---------------------------------------------------------------- figures for a paper


def content(path):
    """The bytes of a file; a gradient's name counts those that the process drew before."""
    return re.sub(rb"gradient_\d+|clip\d+", b"", path.read_bytes())


@pytest.mark.slow
def test_figures_are_written_in_three_formats(cli, results_dir, tmp_path):
    arguments = ["report", "model=m", "sparsity=0.6", "--results-dir", results_dir]
    outcome = cli(*arguments, "protocol=wiki*", "--figures", "one")
    folder = tmp_path / "work" / "one"
    names = {path.name for path in folder.iterdir()}
    assert f"{len(names) // 3} figures in {len(names)} files" in outcome.stdout
    stems = {path.stem for path in folder.iterdir()}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "svg", "png")}
    assert "m-token_ppl-wikitext2-raw-test-2048-v1-against-zeros" in stems
    assert "m-sparsegpt-0.6-owl-layer-loss" in stems
    assert not (tmp_path / "work" / "report.html").exists()
    for path in folder.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    cli(*arguments, "protocol=wiki*", "--figures", "two")
    again = tmp_path / "work" / "two"
    # not the PDFs: vl-convert puts their parts in another order each time
    for name in names:
        if not name.endswith(".pdf"):
            assert content(again / name) == content(folder / name), name
    cli(*arguments, "--figures", "one", code=5)
