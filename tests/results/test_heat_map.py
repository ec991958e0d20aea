"""Heat maps of the report: what is drawn, which run, which colour."""

import pytest

from prunebench.results.report.data import build_report
from prunebench.results.report.drawing import (
    fit,
    heat_color,
    text_width,
)
from prunebench.results.report.heat import heat_map
from prunebench.results.report.heat_chart import HeatScale, loss_scale, ratio_scale
from tests.report_pages import generated, layer, with_layers


def test_the_heat_map_by_hand():
    layers = [
        layer("model.layers.0.attn.q", 5, loss=1.0), layer("model.layers.1.attn.q", 10, loss=100.0),
        layer("model.layers.1.mlp.experts.up.0", 4, loss=2.0),
        layer("model.layers.1.mlp.experts.up.1", 12, size=(2, 10), loss=3.0),
    ]  # fmt: skip
    heat = heat_map([("run", with_layers(layers))])
    assert heat.modules == ("attn.q", "mlp.experts.up.*")
    assert heat.blocks == (0, 1)
    (run,) = heat.runs
    assert run.ratios == (0.25, 0.5, None, 0.4)  # (4 + 12) / (20 + 20)
    assert run.losses == (1.0, 100.0, None, 5.0)
    scale = loss_scale(run)
    assert [scale.share(v) for v in (1.0, 10.0, 100.0)] == pytest.approx([0, 0.5, 1])
    assert (ratio_scale(run).low, ratio_scale(run).high) == (0.25, 0.5)


def test_uniform_runs_without_loss_have_no_heat_map():
    plain = [layer("model.layers.0.q", 10)]
    assert heat_map([("run", with_layers(plain))]) is None
    assert heat_map([("run", with_layers(plain, allocation="owl"))]).runs[0].losses == ()


def test_equal_ratios_are_one_color_in_the_middle():
    heat = heat_map([("run", with_layers([layer("l.0.q", 10, loss=0.0), layer("l.1.q", 10)]))])
    scale = ratio_scale(heat.runs[0])
    assert scale.share(0.5) == pytest.approx(0.5)
    assert loss_scale(heat.runs[0]) is None  # zero has no logarithm


def test_the_newest_run_of_a_cell_is_shown():
    rows = [
        generated("m", "sparsegpt", seed=seed).model_copy(update={"created_at": f"2026-01-0{day}"})
        for seed, day in ((0, 3), (1, 2))
    ]
    (run,) = build_report(rows).models[0].heat.runs
    assert run.result_id == rows[0].id


def test_colors_go_from_dark_to_bright():
    assert (heat_color(0.0), heat_color(0.5), heat_color(2.0)) == (
        "#440154",
        "#21918c",
        "#fde725",
    )
    assert HeatScale(1.0, 100.0, logarithmic=True).middle() == 10


def test_a_long_label_is_cut_to_its_width():
    cut = fit("a very long label", 60)
    assert cut.endswith("…")
    assert text_width(cut) <= 60 < text_width("a very long label")
