"""Heat maps of the report: what is drawn, which run, on which scale."""

from prunebench.results.report.data import build_report
from prunebench.results.report.heat import heat_map, loss_range, ratio_range
from prunebench.results.report.payload import heat_rows
from tests.report_pages import generated, layer, with_layers


def test_the_heat_map_by_hand():
    layers = [
        layer("model.layers.0.attn.q", 5, loss=1.0), layer("model.layers.1.attn.q", 10, loss=100.0),
        layer("model.layers.1.mlp.experts.up.0", 4, loss=2.0),
        layer("model.layers.1.mlp.experts.up.1", 12, size=(2, 10), loss=3.0),
    ]  # fmt: skip
    heat = heat_map([("run", "m0r1", with_layers(layers))])
    assert heat.modules == ("attn.q", "mlp.experts.up.*")
    assert heat.blocks == (0, 1)
    (run,) = heat.runs
    assert run.ratios == (0.25, 0.5, None, 0.4)  # (4 + 12) / (20 + 20)
    assert run.losses == (1.0, 100.0, None, 5.0)
    assert loss_range(run) == (1.0, 100.0)
    assert ratio_range(run) == (0.25, 0.5)
    assert heat_rows(heat, run, "loss")[1:3] == [
        {"module": "attn.q", "block": 1, "value": 100.0, "low": 1.0, "high": 100.0},
        {"module": "mlp.experts.up.*", "block": 0, "value": None, "low": 1.0, "high": 100.0},
    ]


def test_uniform_runs_without_loss_have_no_heat_map():
    plain = [layer("model.layers.0.q", 10)]
    assert heat_map([("run", "a", with_layers(plain))]) is None
    heat = heat_map([("run", "a", with_layers(plain, allocation="owl"))])
    assert heat.runs[0].losses == () and heat_rows(heat, heat.runs[0], "loss") == []


def test_ratios_that_are_nearly_equal_are_one_color():
    heat = heat_map([("run", "a", with_layers([layer("l.0.q", 10, loss=0.0), layer("l.1.q", 10)]))])
    low, high = ratio_range(heat.runs[0])
    assert low < 0.5 < high and round(high - low, 6) == 0.01
    assert loss_range(heat.runs[0]) is None  # zero has no logarithm


def test_a_loss_that_is_not_finite_is_at_the_end_of_the_scale():
    layers = [layer("l.0.q", 10, loss=2.0), layer("l.1.q", 10, loss=8.0)]
    layers += [layer("l.2.q", 10, loss=float("inf")), layer("l.3.q", 10, loss=float("nan"))]
    heat = heat_map([("run", "a", with_layers(layers))])
    assert [row["value"] for row in heat_rows(heat, heat.runs[0], "loss")] == [2.0, 8.0, 8.0, 8.0]


def test_the_newest_run_of_a_cell_is_shown():
    rows = [
        generated("m", "sparsegpt", seed=seed).model_copy(update={"created_at": f"2026-01-0{day}"})
        for seed, day in ((0, 3), (1, 2))
    ]
    part = build_report(rows).models[0]
    (run,) = part.heat.runs
    (row,) = [row for row in part.rows if row.anchor == run.anchor]
    assert row.results[0].id == rows[0].id


def test_runs_that_are_left_out_are_counted():
    runs = [("run", f"r{i}", with_layers([layer("l.0.q", 10, loss=1.0)])) for i in range(5)]
    heat = heat_map(runs, at_most=3)
    assert [run.anchor for run in heat.runs] == ["r0", "r1", "r2"]
    assert heat.left_out == 2
