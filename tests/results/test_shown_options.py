"""A row shows the options that someone who repeats it has to give, and no others."""

from pathlib import Path

import pytest

from prunebench.allocators import ALLOCATORS
from prunebench.pruners import METHODS
from prunebench.recovery import join_options, resolve_parts
from prunebench.results.compare import compare
from prunebench.results.selection import without_seeds
from prunebench.results.shown_options import shown_options
from prunebench.results.store import ResultStore
from tests.factories import make_result, only_table

ROOT = Path(__file__).parents[2]
C4 = "c4-sample/rest"


def shown(kind, name, *rows, texts=C4):
    return shown_options(kind, name, rows, [texts] * len(rows))


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_not_the_default_is_shown_in_every_row_that_has_it(count):
    rows = [{"range": "auto", "low": 0.6}] * count
    assert shown("allocation", "hessian", *rows) == ([{"range": "auto"}] * count, {})


def test_the_default_is_left_out_and_not_what_most_rows_have():
    rows = [{"steps": 12, "optimizer": "momentum"}, {"steps": 12}, {"steps": 12}, {"steps": 24}]
    told, usual = shown("method", "maskllm", *rows)
    assert told == [{"optimizer": "momentum", "steps": 12}, {"steps": 12}, {"steps": 12}, {}]
    assert usual == {"steps": 24}


def test_a_preset_has_defaults_of_its_own():
    rows = [{"preset": "laptop", "steps": 24}, {"preset": "paper", "steps": 2000, "clip": 0.5}]
    told, usual = shown("method", "maskllm", *rows)
    assert told == [{}, {"preset": "paper", "clip": 0.5}]
    assert usual == {"preset": "laptop"}  # steps left unsaid are other steps in each
    told, _ = shown("recover", "distill", {"preset": "hour", "steps": 256, "batch": 4})
    assert told == [{"preset": "hour", "batch": 4}]


def test_a_training_text_is_shown_where_it_is_not_that_of_the_calibration():
    rows = [{"train_data": C4, "masks": None}, {"train_data": "wiki-sample/rest", "masks": None}]
    told, usual = shown("method", "maskllm", *rows)
    assert told == [{}, {"train_data": "wiki-sample/rest"}] and usual == {}


def test_options_of_recoverers_that_follow_have_their_names_before_them():
    row = {"block.epochs": 3, "block.lr": 0.016, "distill.steps": 12, "distill.data": C4}
    told, _ = shown("recover", "block+distill", row)
    assert told == [{"block.lr": 0.016, "distill.steps": 12}]


def test_of_a_method_that_is_not_known_the_rarer_values_are_shown():
    rows = [{"steps": 12, "x": 1}, {"steps": 12, "x": 1}, {"steps": 24, "x": 1}]
    assert shown("method", "my_package:Mine", *rows) == ([{}, {}, {"steps": 24}], {"steps": 12})


def test_a_table_of_one_row_says_its_options():
    options = {"range": "auto", "low": 0.6}
    table = only_table([make_result(allocation="hessian", allocation_options=options)])
    assert table.cells[1].shown["allocation_options"] == {"range": "auto"}
    assert "allocation_options" in table.settings


def resolved(cell, calibration):
    """All options of a run that is given what the row of a cell shows."""
    given = {name: cell.shown[name] or {} for name in cell.shown if name.endswith("_options")}
    method = dict(given["method_options"])
    if cell.bits is not None:
        method["quantize_bits"] = cell.bits  # the target of the row says it
    options = METHODS.resolve_options(cell.method, method, seed=0)
    if cell.method == "maskllm":
        pruner = METHODS.make(cell.method, options)
        options = pruner.for_model(None, calibration).options()
    recover = cell.settings["recover"]
    parts = resolve_parts(recover, given["recover_options"], seed=0) if recover != "none" else []
    for _, of_part in (part for part in parts if part[0] == "distill"):
        from prunebench.recovery.distill.recoverer import Distill

        of_part |= Distill(**of_part).for_run(calibration).options()
    name = cell.settings["allocation"]
    allocation = ALLOCATORS.resolve_options(name, given["allocation_options"], seed=0)
    return {
        "method_options": options,
        "allocation_options": allocation,
        "recover_options": join_options(parts) if parts else {},
    }


def test_the_words_of_every_committed_row_give_the_options_of_its_run():
    """By the code that resolves the options of a run, not by the table of defaults."""
    checked = 0
    for table in compare(ResultStore(ROOT / "results").read(layers=False)[0]):
        for cell in (cell for cell in table.cells if cell.method != "dense"):
            recorded = cell.settings
            if str((recorded["method_options"] or {}).get("prior")).startswith("sha256:"):
                continue  # masks are named by their file when they are given
            for name, options in resolved(cell, recorded["calibration"]).items():
                assert without_seeds(recorded[name] or {}) == without_seeds(options), cell.name
            checked += 1
    assert checked > 50
