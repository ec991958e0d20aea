"""Results as a table: one row a score, every column of one type, nothing dropped in silence."""

import json
import re

import pandas as pd
import pytest

from prunebench.errors import MissingResource, UsageError
from prunebench.options import options_of
from prunebench.results.compare import compare
from prunebench.results.frame import frame_of, load_results
from prunebench.results.store import ResultStore
from prunebench.spec import RunSpec
from tests.factories import make_result


def publish(folder, *results):
    return [ResultStore(folder).publish(result) for result in results]


def test_one_row_a_score_with_what_the_run_says(tmp_path):
    options = {"steps": 12, "train": True, "prior": "wanda"}
    publish(tmp_path, make_result(method_options=options, seed=3, value=40.0, dense=20.0))
    (row,) = load_results(tmp_path).to_dict("records")
    assert (row["method"], row["sparsity"], row["seed"]) == ("wanda", "0.5", 3)
    assert (row["value"], row["dense"], row["ratio_to_dense"], row["ratio"]) == (40, 20, 2, 0.5)
    assert (row["set.steps"], row["set.train"], row["set.prior"]) == (12, True, "wanda")
    assert json.loads(row["method_options"]) == options
    assert row["created_at"] == pd.Timestamp("2026-01-01", tz="UTC")
    assert row["newest"] is True and row["limited"] is False


def test_every_option_that_tells_cells_apart_is_a_column():
    frame = frame_of([make_result()])
    of_cells = {name for name, option in options_of(RunSpec).items() if option.about.cell}
    assert of_cells <= set(frame.columns)


def test_every_column_is_documented():
    frame = frame_of([make_result(method_options={"steps": 1}, allocation_options={"low": 0.1})])
    text = load_results.__doc__
    undocumented = [
        name for name in frame.columns
        if not name.startswith("set.") and name not in options_of(RunSpec)
        and not re.search(rf"\b{name}\b", text)
    ]  # fmt: skip
    assert undocumented == []


def test_seeds_and_evaluations_share_a_cell_and_settings_do_not():
    rows = [make_result(seed=0), make_result(seed=1), make_result(ppl_seqlen=2048)]
    assert frame_of(rows)["cell"].nunique() == 1
    rows.append(make_result(within_block="sequential"))
    assert frame_of(rows)["cell"].nunique() == 2


@pytest.mark.parametrize("name", ["seed", "distill.seed"])
def test_a_seed_of_the_recoverer_varies_a_cell_as_the_runs_seed_does(name):
    rows = [
        make_result(seed=n, recover="distill", recover_options={name: n, "steps": 12})
        for n in range(3)
    ]
    frame = frame_of(rows)
    assert frame["cell"].nunique() == 1 and frame["newest"].all()
    assert not [column for column in frame.columns if column.endswith("seed") and column != "seed"]


@pytest.mark.parametrize("kind", ["method_options", "allocation_options", "recover_options"])
@pytest.mark.parametrize("name", ["seed", "distill.seed"])
def test_seeds_given_as_options_are_folded_where_the_runs_seed_is_one(kind, name):
    rows = [make_result(value=40.0 + n, **{kind: {name: n, "steps": 12}}) for n in range(3)]
    frame = frame_of(rows)
    assert frame["cell"].nunique() == 1 and frame["newest"].all()
    (score,) = compare(rows)[0].cells[1].scores.values()
    assert (score.mean, score.seeds) == (41.0, 3)
    again = make_result(value=50.0, created="2026-01-02", **{kind: {name: 2, "steps": 12}})
    assert sorted(frame_of([*rows, again]).query("newest")["value"]) == [40.0, 41.0, 50.0]


def test_a_seed_that_is_the_runs_own_is_the_same_seed_as_none():
    """A part that had no seed of its own when a run was filed, and was run again with one."""
    rows = [make_result(seed=3), make_result(seed=3, method_options={"seed": 3})]
    assert frame_of(rows)["newest"].sum() == 1


def test_the_newest_of_a_repeated_run_is_marked():
    rows = [
        make_result(value=50.0, created="2026-01-02"),
        make_result(value=40.0, created="2026-01-01"),
        make_result(value=45.0, seed=1),
    ]
    frame = frame_of(rows)
    assert sorted(frame[frame["newest"]]["value"]) == [45.0, 50.0]
    assert len(frame) == 3


def test_a_dense_value_of_zero_has_no_ratio():
    assert frame_of([make_result(dense=0.0)])["ratio_to_dense"].isna().all()


def test_options_of_several_kinds_become_text_and_go_through_parquet(tmp_path):
    kinds = ({"a": 1, "b": 1, "c": True}, {"a": 0.5, "b": "x", "c": False}, {"a": None})
    frame = frame_of([make_result(method_options=options) for options in kinds])
    assert frame["set.a"].dtype == "Float64"
    assert frame["set.b"].dropna().tolist() == ["1", "x"]
    assert frame["set.c"].dtype == "boolean"
    frame.to_parquet(tmp_path / "scores.parquet")
    assert pd.read_parquet(tmp_path / "scores.parquet").equals(frame)


def test_failed_and_damaged_results_are_reported(tmp_path):
    publish(tmp_path, make_result(), make_result(status="failed", seed=1))
    broken = tmp_path / "m" / "wanda-0.5" / "broken.json"
    broken.write_text("{")
    with pytest.warns(UserWarning, match=r"broken\.json is skipped: not a JSON object"):
        frame = load_results(tmp_path)
    assert len(frame) == 1
    assert frame.attrs["failed"] == 1
    assert frame.attrs["damaged"][0][0] == str(broken)


def test_selectors_are_those_of_the_command_line(tmp_path):
    publish(tmp_path, make_result(), make_result(method="magnitude"))
    assert load_results(str(tmp_path), ["method=mag*"])["method"].tolist() == ["magnitude"]
    with pytest.raises(UsageError, match="unknown selector"):
        load_results(tmp_path, ["methd=wanda"])
    with pytest.raises(MissingResource, match="no result has method=x"):
        load_results(tmp_path, ["method=x"])
    with pytest.raises(MissingResource, match="no results folder"):
        load_results(tmp_path / "nowhere")
