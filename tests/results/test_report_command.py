"""`prunebench report`: what it writes, refuses and replaces, and its figures as files."""

import importlib.util

import pytest

from prunebench.errors import MissingResource
from prunebench.results.report.curve_chart import curves_of, learning_curves
from prunebench.results.report.data import build_report
from prunebench.results.report.drawing import (
    Line,
    to_svg,
)
from prunebench.results.report.page import drawings_of, render_page
from prunebench.results.selection import Selection
from prunebench.results.store import ResultStore
from tests.factories import make_result
from tests.report_pages import (
    EVIL,
    generated,
    mixed,
    with_training,
)

# ---------------------------------------------------------------- the command


@pytest.fixture
def results_dir(tmp_path):
    store = ResultStore(tmp_path / "results")
    for result in [*mixed(), generated("other")]:
        store.publish(result)
    return tmp_path / "results"


def test_the_command_writes_the_page(cli, results_dir, tmp_path):
    outcome = cli("report", "--results-dir", results_dir)
    assert outcome.stdout == "report.html\n"
    page = (tmp_path / "work" / "report.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert ">other</h2>" in page
    cli("report", "model=m", "-o", "deep/er/one.html", "--results-dir", results_dir)
    assert ">other</h2>" not in (tmp_path / "work" / "deep" / "er" / "one.html").read_text("utf-8")


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
    outcome = cli("report", "--results-dir", results_dir, code=4)
    assert "torn.json is skipped: not a JSON object" in outcome.stderr
    assert "newer.json is skipped: schema version 2" in outcome.stderr
    page = (tmp_path / "work" / "report.html").read_text("utf-8")
    assert "<code>torn.json</code>" in page
    assert str(tmp_path) not in page


def test_compare_prints_latex(cli, results_dir):
    out = cli("compare", "-f", "latex", "--results-dir", results_dir).stdout
    assert out.count(r"\begin{table}") == 2
    assert r"of dense)" in out


# ---------------------------------------------------------------- figures for a paper


@pytest.mark.slow
def test_figures_are_written_in_three_formats_with_the_same_bytes(cli, results_dir, tmp_path):
    arguments = ["report", "model=m", "sparsity=0.6", "--results-dir", results_dir]
    outcome = cli(*arguments, "protocol=wiki*", "--figures", "one")
    folder = tmp_path / "work" / "one"
    names = {path.name for path in folder.iterdir()}
    assert f"{len(names) // 3} figures in {len(names)} files" in outcome.stdout
    stems = {path.stem for path in folder.iterdir()}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "svg", "png")}
    assert "m-token_ppl-wikitext2-raw-test-2048-v1" in stems
    assert "m-sparsegpt-0.6-owl-layer-loss" in stems
    assert not (tmp_path / "work" / "report.html").exists()
    for path in folder.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    cli(*arguments, "protocol=wiki*", "--figures", "two")
    again = tmp_path / "work" / "two"
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)
    cli(*arguments, "--figures", "one", code=5)


def test_without_matplotlib_the_extra_is_named(cli, results_dir, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name)
    )
    outcome = cli("report", "--figures", "x", "--results-dir", results_dir, code=3)
    assert "prunebench[report]" in outcome.stderr
    cli("report", "--results-dir", results_dir)  # the page needs none


def test_an_svg_for_a_paper_stands_alone():
    _, drawing = drawings_of(build_report([generated(f"{EVIL}$x_1$\0")]))[0][0]
    import xml.etree.ElementTree as ElementTree

    svg = to_svg(drawing, themed=False)
    assert "var(--" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_figures_of_models_with_one_slug_do_not_meet():
    named, _ = drawings_of(build_report([generated("a/b"), generated("a-b")]))
    names = [name for name, _ in named]
    assert len(names) == len(set(names))
    assert any(name.endswith("-2") for name in names)


def test_an_empty_selection_is_an_error():
    with pytest.raises(MissingResource):
        build_report(mixed(), Selection.parse(["method=none"]))


def test_learning_curves_have_a_line_a_seed_and_a_row_a_measured_step():
    curve = [250.0, None, 125.0, float("inf")]
    results = [with_training(0, curve), with_training(1, curve[:3]), make_result(value=60.0)]
    report = build_report(results)
    curves = curves_of(report.models[0].rows)
    assert [len(one.points) for one in curves] == [2, 2]
    drawing = learning_curves(curves)
    lines = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.width == 1.6]
    assert len(lines) == 2
    (_, before), (_, after) = lines[0].points
    assert after > before  # half the perplexity lies lower on the page
    page = render_page(report)
    assert "seed 1" in page and drawing.title in page
    assert drawing.title not in render_page(build_report(results[2:]))
