"""Versions of methods: a changed method marks its rows stale, and nothing else."""

import json
from pathlib import Path

import pytest

from prunebench.allocators import ALLOCATORS
from prunebench.pruners import METHODS
from prunebench.recovery import RECOVERERS
from prunebench.results import versions
from prunebench.results.compare import compare
from prunebench.results.finding import finding
from prunebench.results.overview import overview
from prunebench.results.overview_markdown import overview_markdown
from prunebench.results.render import to_csv, to_markdown
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore
from prunebench.results.versions import CHANGES, Change, current_version, parts_of, versions_of
from prunebench.spec import RunSpec
from tests.factories import make_result, with_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def changed(monkeypatch):
    """SparseGPT has changed twice, and block recovery once."""
    changes = (
        Change(("method sparsegpt",), "2026-01-01", "damping is added twice"),
        Change(("method sparsegpt", "recoverer block"), "2026-01-02", "sums are in float64"),
    )
    monkeypatch.setattr(versions, "CHANGES", changes)


def of_version(number, **how):
    result = make_result(**how)
    part = f"method {result.spec.method}"
    return type(result).model_validate({**result.model_dump(), "versions": {part: number}})


def test_every_change_names_parts_that_there_are():
    registries = {"method": METHODS, "allocator": ALLOCATORS, "recoverer": RECOVERERS}
    for change in CHANGES:
        for kind, name in (part.split(" ", 1) for part in change.parts):
            assert name in registries[kind].builtin
    assert [change.date for change in CHANGES] == sorted(change.date for change in CHANGES)


def test_a_version_counts_the_changes(changed):
    assert current_version("method sparsegpt") == 3
    assert versions_of(["method sparsegpt", "recoverer block", "method alps"]) == {
        "method sparsegpt": 3, "recoverer block": 2,
    }  # fmt: skip


def test_a_run_is_made_by_its_method_its_prior_its_allocator_and_its_recoverers():
    spec = RunSpec(
        method="maskllm", method_options={"prior": "sparsegpt"}, allocation="owl",
        recover="block+distill",
    )  # fmt: skip
    assert parts_of(spec) == [
        "method maskllm", "method sparsegpt", "allocator owl", "recoverer block",
        "recoverer distill",
    ]  # fmt: skip


def test_a_row_of_before_a_change_is_stale(changed):
    assert "damping is added twice" in make_result(method="sparsegpt").stale
    assert "damping" not in of_version(2, method="sparsegpt").stale
    assert "before version 3" in of_version(2, method="sparsegpt").stale
    assert of_version(3, method="sparsegpt").stale == ""
    assert make_result(method="alps").stale == ""
    assert "block before version 2" in make_result(method="alps", recover="block").stale


@pytest.mark.parametrize(
    ("sparsity", "realised", "stale"),
    [("0.7", 0.6997, True), ("0.7", 0.7, False), ("0.5", 0.503, False), ("2:4", 0.5, False)],
)
def test_wandas_remainders_left_exact_rows_as_they_were(sparsity, realised, stale):
    """More zeros than asked for are the dense model's own: no remainder was missing there."""
    row = make_result(sparsity=sparsity, realised=realised)
    assert bool(row.stale) is stale
    assert of_version(2, sparsity=sparsity, realised=realised).stale == ""


def test_versions_are_not_part_of_a_spec_and_old_files_keep_their_bytes():
    old, new = make_result(), of_version(2)
    assert old.spec_id == new.spec_id
    assert "versions" not in json.loads(old.to_json())
    assert json.loads(new.to_json())["versions"] == {"method wanda": 2}
    assert Result.model_validate_json(new.to_json()) == new


def rows():
    """A stale row that has the lowest perplexity, and two that are as today."""
    return [
        make_result(method="sparsegpt", value=30.0), make_result(method="wanda", value=40.0),
        make_result(method="alps", value=50.0),
    ]  # fmt: skip


def test_tables_mark_stale_rows_and_say_why(changed):
    tables = compare(rows())
    (block,) = overview(tables).blocks
    words = {line.words[0]: (line.mark, line.words[1:]) for line in block.sections[0].lines}
    assert words["sparsegpt"] == (" ", ("stale",))
    assert words["wanda"] == ("*", ())
    text = overview_markdown(overview(tables))
    assert "stale: the same run now gives other numbers" in text
    assert "damping is added twice" in text
    assert "| sparsegpt (stale) |" in to_markdown(tables)
    assert "damping is added twice" in to_markdown(tables)
    assert "damping is added twice" in to_csv(tables)


def test_no_stale_row_is_named_as_the_best(changed):
    (block,) = overview(compare(rows())).blocks
    sentence = finding(block)
    assert sentence.startswith("At 0.5 wanda is best")
    assert "sparsegpt" not in sentence


def test_where_all_rows_are_stale_none_is_the_best(changed):
    old = [make_result(method="sparsegpt", calibration_samples=n, value=30.0 + n) for n in (8, 16)]
    (block,) = overview(compare(old)).blocks
    assert [line.mark for line in block.sections[0].lines] == [" ", " "]
    old = [with_tasks("sparsegpt", piqa=0.6, rte=0.6), recovered_with_tasks(piqa=0.7, rte=0.7)]
    (block,) = overview(compare(old)).blocks
    assert [line.mark for line in block.sections[0].lines] == [" ", " "]
    (block,) = overview(compare([*old, with_tasks("alps", piqa=0.5, rte=0.5)])).blocks
    assert {line.words[0]: line.mark for line in block.sections[0].lines}["alps"] == "*"


def test_a_stale_row_that_equals_the_best_has_no_star(changed):
    equal = [of_version(3, method="sparsegpt"), make_result(method="sparsegpt", seed=1, seqlen=9)]
    (block,) = overview(compare([*equal, make_result(value=50.0)])).blocks
    marks = {line.words: line.mark for line in block.sections[0].lines}
    assert sorted(marks.values()) == [" ", " ", "*"]
    assert [words for words, mark in marks.items() if mark == "*"] == [("sparsegpt",)]


def recovered_with_tasks(**values):
    plain = with_tasks("alps", **values)
    spec = plain.spec.model_copy(update={"recover": "block"})
    return plain.model_copy(update={"spec": spec})


def test_a_later_run_of_the_same_spec_takes_the_mark_away(changed):
    again = of_version(3, method="sparsegpt", value=31.0, created="2026-01-03")
    (table,) = compare([*rows(), again])
    assert not any(cell.stale for cell in table.cells)


def test_a_later_run_of_an_older_version_does_not_bring_the_mark_back(changed, cli, tmp_path):
    fresh = of_version(3, method="sparsegpt", value=31.0, created="2026-01-03T00:00:00+00:00")
    older = of_version(2, method="sparsegpt", value=35.0, created="2026-01-04T00:00:00+00:00")
    (table,) = compare([fresh, older])
    (cell,) = [cell for cell in table.cells if cell.method == "sparsegpt"]
    assert (cell.stale, cell.scores["token_ppl wiki/test/512/v1"].values) == ("", (31.0,))
    store = ResultStore(tmp_path / "results")
    for row in (fresh, older):
        store.publish(row)
    assert store.newest(fresh.spec).id == fresh.id
    cli("results", "check", "--current", "--results-dir", store.root)


def test_of_stale_runs_the_latest_counts(changed):
    first = make_result(method="sparsegpt", value=31.0, created="2026-01-03T00:00:00+00:00")
    later = of_version(2, method="sparsegpt", value=35.0, created="2026-01-04T00:00:00+00:00")
    (table,) = compare([later, first])
    (cell,) = [cell for cell in table.cells if cell.method == "sparsegpt"]
    assert cell.scores["token_ppl wiki/test/512/v1"].values == (35.0,)


def test_one_stale_seed_makes_a_row_stale(changed):
    (table,) = compare(
        [make_result(method="sparsegpt", seed=0), of_version(3, method="sparsegpt", seed=1)]
    )
    assert [cell.method for cell in table.cells if cell.stale] == ["sparsegpt"]


def test_results_check_names_what_is_stale(changed, cli, tmp_path):
    store = ResultStore(tmp_path / "results")
    for row in rows():
        store.publish(row)
    check = ["results", "check", "--results-dir", tmp_path / "results"]
    run = cli(*check)
    assert "1 are stale" in run.stdout and "damping is added twice" in run.stderr
    assert "1 of 3 results are stale" in cli(*check, "--current", code=6).stderr
    store.publish(of_version(3, method="sparsegpt", created="2026-01-03"))
    assert "stale" not in cli(*check, "--current").output


def test_the_committed_rows_of_before_wandas_remainders_are_the_only_stale_ones():
    """They say 69.9% zeros themselves; whoever runs them again takes them out of this list."""
    results, _ = ResultStore(ROOT / "results").read(layers=False)
    stale = [result for result in results if result.stale]
    assert {(r.spec.method, r.spec.sparsity) for r in stale} <= {("wanda", "0.7")}
    for result in stale:
        assert result.sparsity.realised_ratio < 0.6998


def test_a_run_records_its_versions(cli, tiny_run):
    result = json.loads(cli(*tiny_run, "-m", "wanda", "--json", "-q").stdout)
    assert result["versions"] == {"method wanda": 2}
    result = json.loads(cli(*tiny_run, "-m", "magnitude", "--json", "-q").stdout)
    assert "versions" not in result
