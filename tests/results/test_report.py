"""The report: what it holds, that it holds together without a network, and what it survives."""

import json
import math
import random
import re

import pytest

from prunebench.results.published import PublishedValue
from prunebench.results.report.data import build_report, pareto_front
from prunebench.results.report.drawing import (
    Label,
    Mark,
)
from prunebench.results.report.page import drawings_of, render_page
from tests.factories import make_result
from tests.report_pages import EVIL, Page, generated, mixed, page_of, with_training

# ---------------------------------------------------------------- the page


def test_every_point_tells_where_it_comes_from():
    results = mixed()
    page = page_of(results)
    for result in results:
        for fact in (
            result.id, result.spec_id, result.command, result.created_at, result.model.revision,
            result.model.evaluated_sha256, result.model.dense_sha256,
            result.calibration.tokens_sha256, "NVIDIA H100", "torch 2.13.0", "lm-eval 0.4.13",
        ):  # fmt: skip
            assert fact in page
    links = Page(page)
    assert {link[1:] for link in links.links if link.startswith("#")} <= set(links.ids)
    assert len(links.ids) == len(set(links.ids))


def test_the_table_has_the_cells_of_compare():
    rows = [make_result(seed=s, value=v) for s, v in enumerate((40.0, 42.0, 44.0))]
    rows.append(make_result(method="magnitude", value=90.0))
    page = page_of(rows)
    assert "<strong>42.00 ± 2.00</strong>" in page
    assert "(+22.00)" in page
    assert "90.00 (+70.00)" in page


def test_what_cannot_be_told_from_the_best_is_marked_and_said():
    rows = [make_result(seed=s, value=40.0 + s) for s in (0, 1)]
    rows += [make_result(method="magnitude", seed=s, value=40.2 + s) for s in (0, 1)]
    page = page_of(rows)
    assert '<span aria-hidden="true">~</span>' in page
    assert "within noise of the best: </span>40.70 ± 0.71" in page


def test_accuracies_have_bars_with_error_bars_beside_dense():
    part = build_report(mixed()).models[0]
    (figure, *_) = [figure for figure in part.figures if figure.metric == "acc"]
    assert figure.dense.dense_stderr > 0
    assert all(score.error > 0 for _, score in figure.rows)
    page = page_of(mixed())
    assert "acc lm-eval/piqa/0-shot/v1.0" in page
    assert "dense 68.0%" in page
    assert re.search(r"\d\d\.\d% ± \d\.\d \(\d\d\.\d% of dense\)", page)


def test_rows_of_one_sparsity_have_a_dot_each_by_the_option_that_tells_them_apart():
    base = {"steps": 12, "noise": 0.0, "rate": 1.0}
    rows = [
        make_result(method="maskllm", method_options=base, value=80.0),
        make_result(method="maskllm", method_options=base | {"noise": 1.0}, value=90.0),
        make_result(method="maskllm", method_options=base | {"steps": 24}, value=70.0),
        make_result(method="maskllm", method_options=base | {"rate": 9.0}, value=1e9),
    ]
    ((_, drawing), *_) = drawings_of(build_report(rows))[0]
    labels = [shape.text for shape in drawing.shapes if isinstance(shape, Label)]
    assert [label for label in labels if "=" in label] == ["steps=24", "noise=1.0", "rate=9.0"]
    assert "maskllm" in labels and "against" not in drawing.title
    dots = [shape for shape in drawing.shapes if isinstance(shape, Mark)]
    assert [dot.y for dot in dots] == sorted(dot.y for dot in dots)
    best, base, worse, beyond = (dot.x for dot in dots)
    assert base - best == pytest.approx((worse - base) * math.log(8 / 7) / math.log(9 / 8))
    assert worse < beyond < drawing.width and "beyond the scale" in dots[-1].title


def test_the_curves_that_are_left_out_are_counted():
    trained = [with_training(seed, [250.0, 125.0]) for seed in range(9)]
    assert "The first 8 of 9 trainings" in page_of(trained)
    assert "trainings, in the order" not in page_of(trained[:8])


def test_nothing_is_loaded_from_anywhere():
    page = page_of(mixed())
    links = Page(page).links
    assert "data:," in links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\(|//cdn", page)
    assert "default-src 'none'" in page


def test_the_same_results_give_the_same_bytes_in_any_order_and_at_any_time():
    results = [*mixed("a"), *mixed("b")]
    first = page_of(results)
    random.Random(0).shuffle(results)
    assert page_of(results) == first
    moments = set(re.findall(r"\d{4}-\d\d-\d\dT[\d:]+", first))
    assert moments == {r.created_at[:19] for r in results}


def test_a_name_with_html_is_text():
    rows = [generated(EVIL), generated(EVIL, "sparsegpt", calibration=EVIL)]
    rows[0] = rows[0].model_copy(update={"command": f"prunebench run -M '{EVIL}' </script>"})
    page = Page(page_of(rows, skipped=[(f"{EVIL}.json", f"because of {EVIL}")]))
    assert [tag for tag, _ in page.tags if tag == "img"] == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) > 5


def test_a_layer_name_cannot_leave_its_script():
    result = generated("m", "sparsegpt")
    layers = [
        layer.model_copy(update={"name": f"layers.{i}.</script><img src=x>"})
        for i, layer in enumerate(result.sparsity.layers)
    ]
    sparsity = result.sparsity.model_copy(update={"layers": layers})
    page = page_of([result.model_copy(update={"sparsity": sparsity})])
    assert [tag for tag, _ in Page(page).tags if tag == "img"] == []
    data = json.loads(re.search(r'class="runs">(.*?)</script>', page, re.DOTALL)[1])
    assert data["modules"] == ["</script><img src=x>"]


def test_two_protocols_are_two_figures():
    rows = [make_result(value=40.0), make_result(method="b", value=30.0, protocol="c4/x/512/v1")]
    (part,) = build_report(rows).models
    assert [len(figure.rows) for figure in part.figures] == [1, 1]
    page = page_of(rows)
    assert "2 protocols, each in a column of its own" in page
    assert page.count("against sparsity</strong>") == 2


def test_published_values_are_hollow_and_only_there_if_given():
    results = mixed()
    perplexity, accuracy = (
        ("token_ppl", "wikitext2-raw/test/2048/v1"),
        ("acc", "lm-eval/piqa/0-shot"),
    )
    points = [
        PublishedValue("wanda", "m", "0.6", *perplexity, 33.3, "T 2"),
        PublishedValue("wanda", "m", "2:4", *accuracy, 0.61, "Table 9"),
        PublishedValue("other", "m", "0.6", *accuracy, 0.62, "Table 8"),
        PublishedValue("wanda", "m", "0.6", "token_ppl", "of another protocol", 1.0, "nowhere"),
        PublishedValue("wanda", "other model", "0.6", *perplexity, 1.0, "nowhere"),
    ]
    assert "published" not in page_of(results)
    report = build_report(results, published=points)
    page = render_page(report)
    assert "wanda 0.6, published in T 2" in page
    assert "33.30" in page
    assert "nowhere" not in page
    hollow = [
        (drawing.name, shape.title)
        for _, drawing in drawings_of(report)[0]
        for shape in drawing.shapes
        if isinstance(shape, Mark) and shape.hollow and shape.title
    ]
    assert sorted(title for _, title in hollow) == [
        "other 0.6: 62.0%, in Table 8", "wanda 0.6: 33.30, published in T 2",
        "wanda 2:4: 61.0%, in Table 9",
    ]  # fmt: skip
    best = [s.best for t in (report.models[0].table,) for c in t.cells for s in c.scores.values()]
    ours = build_report(results).models[0].table
    assert best == [s.best for c in ours.cells for s in c.scores.values()]


def test_the_pareto_front_by_hand():
    points = [
        ("dense", 0.0, 20.0), ("a", 0.5, 40.0), ("b", 0.5, 41.0), ("c", 0.4, 45.0),
        ("d", 0.6, 60.0), ("e", 0.3, 40.0), ("f", 0.2, 30.0),
    ]  # fmt: skip
    assert pareto_front(points) == {"dense", "f", "a", "d"}


def test_costs_of_two_machines_are_apart():
    first, second = generated(), generated("m", "sparsegpt")
    hardware = second.hardware.model_copy(update={"device": "cpu", "cpu": "Slow"})
    report = build_report([first, second.model_copy(update={"hardware": hardware})])
    assert [(machine.name, len(machine.costs)) for machine in report.models[0].machines] == [
        ("cpu: Slow, 16 threads", 1), ("cuda: NVIDIA H100 (AMD EPYC, 16 threads)", 1),
    ]  # fmt: skip
    page = render_page(report)
    assert "Speed of the pruned models: not measured" in page
    assert f"{first.cost.prune_seconds:.1f}" in page
    assert f"{first.cost.peak_gpu_bytes / 1e9:.2f}" in page


def test_a_repeated_run_is_named_but_not_counted():
    old = make_result(value=50.0, created="2026-01-01")
    new = make_result(value=40.0, created="2026-01-02")
    (part,) = build_report([new, old]).models
    (row,) = [row for row in part.rows if row.cell.method == "wanda"]
    assert row.counted == {new.id}
    assert "repeated later: not counted" in page_of([old, new])


def test_many_rows_are_drawn_as_the_best_of_each_method_and_sparsity():
    rows = [
        make_result(method=m, calibration_samples=n, value=40.0 + n + (m == "b"))
        for m in "ab" for n in range(1, 20)
    ]  # fmt: skip
    (part,) = build_report(rows).models
    assert part.drawn_of == 38
    (figure,) = part.figures
    assert [(row.cell.method, score.mean) for row, score in figure.rows] == [
        ("a", 41.0), ("b", 42.0),
    ]  # fmt: skip
    assert len(part.rows) == 39
    assert "Of 38 rows, for each method and sparsity the one that is best in" in page_of(rows)


def test_failed_and_damaged_are_not_hidden():
    page = page_of([make_result(), make_result(status="failed")], skipped=[("x.json", "torn")])
    assert "1 failed run is not shown" in page
    assert "<code>x.json</code>: torn" in page


def test_values_that_are_no_numbers_do_not_break_the_page():
    rows = [make_result(method="a", value=float("inf")), make_result(method="b", value=30.0)]
    page = page_of(rows)
    assert 'data-key="Infinity"' in page
    assert "beyond the scale" in page
    assert "nan" not in re.findall(r'(?:x|y|points)="([^"]*)"', page)
