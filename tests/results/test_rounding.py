"""Rounding as noise: what was measured of it makes differences ties, and nothing else does."""

import math
import tomllib
from importlib import resources

import pytest

from benchmarks.scripts import rounding as script
from prunebench.results import rounding
from prunebench.results.cell_score import within_noise
from prunebench.results.compare import compare
from prunebench.results.finding import finding
from prunebench.results.overview import overview
from tests.factories import make_result


@pytest.fixture
def measured(monkeypatch):
    """Rounding alone moves Wanda's log perplexity by 0.02, and magnitude's by next to nothing."""
    table = {("m", "wanda", "0.5", 32): 0.02, ("m", "magnitude", "0.5", 32): 1e-6}
    monkeypatch.setattr(rounding, "rounding_table", lambda: table)


def row(method, value, **how):
    return make_result(method=method, value=value, calibration_samples=32, **how)


def marks(results, metric="token_ppl"):
    (table,) = compare(results)
    return {
        (cell.name, cell.settings["allocation"]): (score.best, score.within_noise)
        for cell in table.cells
        for score in cell.scores.values()
        if cell.method != "dense" and score.metric == metric
    }


BEST, SAME, WORSE = (True, False), (False, True), (False, False)


def test_a_difference_inside_rounding_is_none(measured):
    near = [row("sparsegpt", 40.0), row("wanda", 41.0)]  # 2.5%; two deviations are 4%
    assert marks(near) == {("sparsegpt", "uniform"): BEST, ("wanda", "uniform"): SAME}
    far = [row("sparsegpt", 40.0), row("wanda", 42.0)]  # 4.9%
    assert marks(far)["wanda", "uniform"] == WORSE


def test_the_sentence_says_so_too(measured):
    (block,) = overview(compare([row("sparsegpt", 40.0), row("wanda", 41.0)])).blocks
    assert "within noise of it: wanda" in finding(block)


def test_a_method_without_rounding_noise_is_told_apart(measured):
    rows = [row("sparsegpt", 40.0), row("magnitude", 40.1)]
    assert marks(rows)["magnitude", "uniform"] == WORSE


@pytest.mark.parametrize(
    "how", [{"recover": "block"}, {"allocation": "owl"}, {"within_block": "sequential"},
            {"dtype": "bfloat16"}, {"model": "other"}, {"calibration": "wiki-sample/rest"},
            {"seqlen": 256}, {"calibration_bos": "window"}, {"method_options": {"steps": 3}}],
)  # fmt: skip
def test_of_other_runs_nothing_is_known(measured, how):
    rows = [row("sparsegpt", 40.0, **how), row("wanda", 41.0, **how)]
    assert SAME not in marks(rows).values()


def test_options_that_are_the_defaults_and_a_part_of_the_text_change_nothing(monkeypatch):
    table = {("m", "sparsegpt", "0.5", 32): 0.02}
    monkeypatch.setattr(rounding, "rounding_table", lambda: table)
    same = {"method_options": {"block_size": 128}, "calibration": "c4-sample/rest"}
    rows = [row("wanda", 40.0), row("sparsegpt", 41.0, **same)]
    assert marks(rows)["sparsegpt", "uniform"] == SAME
    rows = [row("wanda", 40.0), row("sparsegpt", 41.0, method_options={"block_size": 64})]
    assert marks(rows)["sparsegpt", "uniform"] == WORSE


def test_other_numbers_of_windows_are_not_known_either(measured):
    rows = [
        make_result(method=method, value=value, calibration_samples=128)
        for method, value in (("sparsegpt", 40.0), ("wanda", 41.0))
    ]
    assert SAME not in marks(rows).values()


def test_seeds_that_happen_to_agree_are_not_surer_than_rounding(measured):
    """Two seeds: the error of the mean is 0.02 / sqrt(2), so that two of it are 2.8%."""
    values = {"sparsegpt": (40.0, 40.001), "wanda": (41.0, 41.001)}
    rows = [
        row(method, value, seed=seed)
        for method, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    assert marks(rows)["wanda", "uniform"] == SAME
    (table,) = compare(rows)
    best, other = (next(iter(c.scores.values())) for c in table.cells if c.method != "dense")
    assert within_noise(other, best)


def test_the_deviation_is_that_of_the_logarithm(monkeypatch):
    class Data:
        def joinpath(self, name):
            return self

        def read_text(self, encoding):
            base = '[[measured]]\nmodel = "m"\ntarget = "2:4"\nsamples = 4\n'
            return (
                f'{base}method = "wanda"\nvalues = {[100.0, 110.0] * 3}\n'
                f'{base}method = "alps"\nvalues = {[1.0] * 4}\n'
            )

    monkeypatch.setattr(resources, "files", lambda package: Data())
    rounding.rounding_table.cache_clear()
    try:
        step = math.log(1.1) / 2  # three values on each side of the mean, five degrees of freedom
        expected = step * (6 / 5) ** 0.5
        assert rounding.rounding_table() == {("m", "wanda", "2:4", 4): pytest.approx(expected)}
    finally:
        rounding.rounding_table.cache_clear()


def test_what_the_script_writes_is_what_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "DATA", tmp_path / "rounding.toml")
    written = {
        "model": "m", "method": "wanda", "target": "2:4", "samples": 32, "protocol": "p",
        "settings": ["1 thread"], "values": [1.5, 2.0], "least_mask_agreement": 0.9,
        "seconds": 3, "date": "2026-11-29",
    }  # fmt: skip
    script.append(written)
    script.append(written)
    assert tomllib.loads(script.DATA.read_text("utf-8"))["measured"] == [written] * 2
    assert "1.5 to 2, std 20.3422% of 2 settings" in script.line(written)


def test_the_committed_measurements_are_sound():
    text = resources.files("prunebench.results").joinpath("rounding.toml").read_text("utf-8")
    for measurement in tomllib.loads(text).get("measured", []):
        assert {*rounding.FIELDS, "protocol", "values", "settings"} <= measurement.keys()
        assert len(measurement["values"]) == len(measurement["settings"]) >= 5
        assert all(value > 1 for value in measurement["values"])
