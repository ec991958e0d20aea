"""The report: what it holds, that it holds together without a network, and what it survives."""

import random
import re

import pytest

from prunebench.errors import MissingResource
from prunebench.results.bench_schema import Bench
from prunebench.results.published import PublishedValue
from prunebench.results.report.data import MAX_HEAT_RUNS, build_report
from prunebench.results.report.figures import figures_of
from prunebench.results.report.page import page_data, render_page
from prunebench.results.selection import Selection
from tests.factories import counted, make_result, recovered
from tests.report_pages import (
    EVIL,
    Page,
    data_of,
    generated,
    mixed,
    page_of,
    scored,
    with_layers,
    with_training,
)


def data_for(results, **how):
    return page_data(build_report(results, **how))


def bench_of(result, *, decode=1.4):
    ratio = {"median": decode, "low": decode, "high": decode, "blocks": 3} if decode else None
    return Bench(
        created_at="2026-01-01", command="prunebench bench", checkpoint="c", result_id=result.id,
        vs="dense", quality=[], speed="measured" if decode else "no GPU", decode=ratio,
        prefill=ratio, resident_bytes=None, layers=[], cases=[], environment={"gpu": "H100"},
        storage={
            "dense_bytes": 100, "packed24_bytes": 56, "bitmap_bytes": 60, "pruned_bytes": 90,
        },
    )  # fmt: skip


# ---------------------------------------------------------------- what it holds


def test_every_point_tells_where_it_comes_from():
    results = mixed()
    page = page_of(results)
    data = data_of(page)
    runs = {run[0]: run for rows in data["models"][0]["runs"].values() for run in rows}
    assert runs.keys() == {result.id for result in results}
    for result in results:
        _, seed, command, counted, date, spec, weights, scores, values, facts = runs[result.id]
        assert (seed, command, counted) == (result.spec.seed, result.command, 1)
        assert (date, spec) == (result.created_at, result.spec_id)
        assert weights == result.model.evaluated_sha256
        assert len(scores) == len(values) == len(result.scores)
        told = dict(zip(data["facts"], (data["texts"][place] for place in facts), strict=True))
        assert told["hash of the calibration tokens"] == result.calibration.tokens_sha256
        assert told["hash of the dense weights"] == result.model.dense_sha256
        assert result.model.revision in told["model revision"]
        assert "NVIDIA H100" in told["hardware"] and "lm-eval 0.4.13" in told["software"]
    ids = Page(page).ids
    assert len(ids) == len(set(ids))
    assert {row["id"] for row in data["models"][0]["rows"]} == set(data["models"][0]["runs"])


def test_the_table_has_the_values_of_compare():
    rows = [make_result(seed=s, value=v) for s, v in enumerate((40.0, 42.0, 44.0))]
    rows.append(make_result(method="magnitude", value=90.0))
    dense, best, other = scored(data_for(rows)["models"][0])
    assert (dense["text"], dense["method"]) == ("dense 20.00", "dense")
    assert (best["text"], best["relative"], best["seeds"]) == ("42.00 ± 2.00", "2.10 x", 3)
    assert best["best"] and (best["low"], best["high"]) == (40.0, 44.0)
    assert "best" not in other and "low" not in other and other["text"] == "90.00"


def test_protocols_have_short_names_that_are_explained():
    result = make_result(protocol="wiki-sample/held-out/512/v1")
    model = data_for([result])["models"][0]
    (column,) = model["columns"]
    assert (column["title"], column["id"]) == ("ppl wiki", "ppl wiki-sample/held-out/512/v1")
    assert "; wiki = wiki-sample/held-out/512/v1." in model["note"]
    (figure,) = [f for f in figures_of(build_report([result]))[0] if "against" in f.name]
    assert figure.spec["title"] == {
        "text": "ppl wiki against share of zeros", "subtitle": "wiki = wiki-sample/held-out/512/v1",
    }  # fmt: skip


def test_what_cannot_be_told_from_the_best_is_marked():
    rows = [make_result(seed=s, value=40.0 + s) for s in (0, 1)]
    rows += [make_result(method="magnitude", seed=s, value=40.2 + s) for s in (0, 1)]
    _, best, tie = scored(data_for(rows)["models"][0])
    assert best["best"] and tie["tie"] and "tie" not in best


def test_the_first_sentence_says_what_was_found():
    rows = [make_result(value=40.0), make_result(method="magnitude", value=90.0)]
    text = Page(page_of(rows)).text
    assert "At 0.5 wanda is best with 2.00 times the perplexity of dense (magnitude 4.50)" in text
    assert "dense 20.00" in text


def test_the_short_table_has_the_main_setting_and_what_is_better():
    rows = [
        make_result(method="a", calibration_samples=n, value=40.0 + n, seed=seed)
        for n in range(1, 6) for seed in range(2 if n == 3 else 1)
    ]  # fmt: skip
    pruned = [r for r in scored(data_for(rows)["models"][0]) if r["method"] != "dense"]
    assert [row["value"] for row in pruned if row.get("short")] == [41.0, 43.0]
    assert len(pruned) == 5


def test_a_recovery_is_named_behind_its_method_and_its_seconds_are_counted():
    rows = [make_result(method="wanda"), recovered("wanda", 30.0)]
    scores = {row["name"]: row["text"] for row in scored(data_for(rows)["models"][0])}
    assert scores == {
        "dense": "dense 20.00", "wanda 0.5": "40.00", "wanda 0.5 (+ block)": "30.00"
    }  # fmt: skip
    (model,) = data_for(rows)["models"]
    assert [row.get("recovery") for row in model["rows"]] == [None, 120.0, None]
    assert sorted(c.prune_seconds for c in build_report(rows).models[0].costs) == [3.0, 123.0]


def test_accuracies_have_errors_and_the_share_of_dense():
    model = data_for(mixed())["models"][0]
    (place,) = [i for i, c in enumerate(model["columns"]) if c["title"] == "acc piqa"]
    assert model["columns"][place]["metric"] == "acc/linear/+"
    dense, *rows = scored(model, place)
    assert dense["text"].startswith("dense 68.0%")
    for row in rows:
        assert row["low"] < row["value"] < row["high"]
        assert re.fullmatch(r"\d\d\.\d% ± \d\.\d", row["text"])
        assert re.fullmatch(r"\d\d\.\d% of dense", row["relative"])


def test_bytes_and_speed_can_be_set_against_quality_where_they_are_known():
    measured, computed = make_result(), make_result(method="magnitude", value=90.0)
    benches = {measured.id: bench_of(measured), computed.id: bench_of(computed, decode=None)}
    data = data_for([measured, computed], benches=benches)
    _, first, second = data["models"][0]["rows"]
    assert (first["bytes"], first["form"], first["decode"]) == (0.56, "2:4", 1.4)
    assert second["bytes"] == 0.56 and "decode" not in second and second["speed"] == "no GPU"
    (specs,) = data["charts"]["tradeOff"].values()
    assert list(specs) == ["zeros", "decode", "prefill"]
    (plain,) = data_for([measured])["charts"]["tradeOff"].values()
    assert list(plain) == ["zeros"]


def test_bytes_are_set_against_quality_and_rows_that_prune_nothing_have_no_zeros():
    grid = {"bits": 4, "group_size": 100, "symmetric": False, "groups": 10_000, "exact": True}
    quantized = counted(make_result(method="gptq", sparsity="0", value=25.0, realised=0.1))
    quantized = type(quantized).model_validate({**quantized.model_dump(), "quantization": grid})
    data = data_for([quantized, counted(make_result(sparsity="2:4", value=90.0))])
    _, first, second = data["models"][0]["rows"]
    assert (first["size"], first["stored"], first["name"]) == (0.3854, "INT4", "gptq INT4")
    assert (second["size"], second["stored"], second["zeros"]) == (0.6354, "2:4", 0.5)
    assert "zeros" not in first
    (specs,) = data["charts"]["tradeOff"].values()
    assert list(specs) == ["zeros", "size"]


def test_two_protocols_are_two_columns_that_share_no_row():
    rows = [make_result(value=40.0), make_result(method="b", value=30.0, protocol="c4/x/512/v1")]
    model = data_for(rows)["models"][0]
    assert len(model["columns"]) == 2
    assert [[r["method"] for r in scored(model, i)] for i in (0, 1)] == [
        ["dense", "b"], ["dense", "wanda"],
    ]  # fmt: skip


def test_published_values_are_apart_and_only_there_if_given():
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
    plain = data_for(results)
    assert plain["models"][0]["published"] == {} and plain["models"][0]["twins"] == []
    data = data_for(results, published=points)
    values = [row for rows in data["models"][0]["published"].values() for row in rows]
    assert sorted((row["name"], row["text"], row["source"]) for row in values) == [
        ("other 0.6, published", "62.0%", "Table 8"), ("wanda 0.6, published", "33.30", "T 2"),
        ("wanda 2:4, published", "61.0%", "Table 9"),
    ]  # fmt: skip
    assert all(row["hollow"] for row in values)
    twins = data["models"][0]["twins"]
    assert {(t["method"], t["sparsity"], t["theirs"]) for t in twins} == {
        ("wanda", "0.6", "33.30"), ("wanda", "2:4", "61.0%"),
    }  # fmt: skip
    assert all(t["verdict"] in ("agrees", "better", "worse") for t in twins)
    for name in ("text", "best", "tie"):  # ours are marked as before
        before, after = (
            [
                score.get(name)
                for rows in d["models"][0]["scores"].values()
                for score in rows.values()
            ]
            for d in (plain, data)
        )
        assert before == after


def test_costs_of_two_machines_are_apart():
    first, second = generated(), generated("m", "sparsegpt")
    hardware = second.hardware.model_copy(update={"device": "cpu", "cpu": "Slow"})
    model = data_for([first, second.model_copy(update={"hardware": hardware})])["models"][0]
    assert model["machines"] == [
        "cpu: Slow, 16 threads",
        "cuda: NVIDIA H100 (AMD EPYC, 16 threads)",
    ]
    (cost,) = [c for c in model["costs"] if c["machine"].startswith("cuda")]
    assert cost["seconds"] == pytest.approx(first.cost.prune_seconds, rel=1e-4)
    assert cost["gpu"] == pytest.approx(first.cost.peak_gpu_bytes / 1e9, abs=1e-3)


def test_the_cost_of_several_runs_is_their_median_with_both_ends():
    rows = []
    for seed, seconds in enumerate((3.0, 5.0, 40.0)):
        row = make_result(seed=seed)
        rows.append(
            row.model_copy(update={"cost": row.cost.model_copy(update={"prune_seconds": seconds})})
        )
    (cost,) = data_for(rows)["models"][0]["costs"]
    assert (cost["seconds"], cost["least"], cost["most"], cost["runs"]) == (5.0, 3.0, 40.0, 3)


def test_a_repeated_run_is_named_but_not_counted():
    old = make_result(value=50.0, created="2026-01-01")
    new = make_result(value=40.0, created="2026-01-02")
    model = data_for([old, new])["models"][0]
    (row,) = [row for row in scored(model) if row["method"] == "wanda"]
    assert row["value"] == 40.0
    assert [(run[0], run[3]) for run in model["runs"][row["id"]]] == [(new.id, 1), (old.id, 0)]
    assert [cost["runs"] for cost in model["costs"]] == [1]


def test_learning_curves_have_their_measured_steps():
    curve = [250.0, None, 125.0, float("inf")]
    results = [with_training(0, curve), with_training(1, curve[:3]), make_result(value=60.0)]
    data = data_for(results)
    curves = data["models"][0]["curves"]
    assert [one["points"] for one in curves] == [[[0, 0, 250.0], [2, 128, 125.0]]] * 2
    assert [one["training"][-6:] for one in curves] == ["seed 0", "seed 1"]
    assert data["charts"]["curves"] and data_for(results[2:])["charts"]["curves"] is None


def test_heat_maps_are_limited_and_what_is_left_out_is_counted():
    rows = [
        with_layers(generated("m", "sparsegpt").sparsity.layers, calibration_samples=n)
        for n in range(1, MAX_HEAT_RUNS + 4)
    ]
    heat = data_for(rows)["models"][0]["heat"]
    assert (len(heat["runs"]), heat["leftOut"]) == (MAX_HEAT_RUNS, 3)


# ---------------------------------------------------------------- that it holds together


def test_nothing_is_loaded_from_anywhere():
    page = page_of(mixed())
    parsed = Page(page)
    assert "data:," in parsed.links
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert len(scripts) == 4 and not any("src" in attributes for attributes in scripts)
    assert not re.search(r"@import|url\(", re.search(r"<style>.*?</style>", page, re.DOTALL)[0])
    (policy,) = [a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy and "script-src 'sha256-" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


def test_the_same_results_give_the_same_bytes_in_any_order():
    results = [*mixed("a"), *mixed("b")]
    first = page_of(results)
    random.Random(0).shuffle(results)
    assert page_of(results) == first


def test_a_name_with_html_is_text():
    rows = [generated(EVIL), generated(EVIL, "sparsegpt", calibration=EVIL)]
    rows[0] = rows[0].model_copy(update={"command": f"prunebench run -M '{EVIL}' </script>"})
    html = page_of(rows, skipped=[(f"{EVIL}.json", f"because of {EVIL}")])
    page = Page(html)
    assert [tag for tag, _ in page.tags if tag == "img"] == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) > 3
    model = data_of(html)["models"][0]
    assert model["name"] == EVIL
    assert any("</script>" in run[2] for runs in model["runs"].values() for run in runs)


def test_a_layer_or_method_name_cannot_leave_its_script():
    result = generated("m", "sparsegpt")
    name = "</script><img src=x><!--"
    layers = [
        layer.model_copy(update={"name": f"layers.{i}.{name}"})
        for i, layer in enumerate(result.sparsity.layers)
    ]
    spec = result.spec.model_copy(update={"method": name})
    sparsity = result.sparsity.model_copy(update={"layers": layers})
    html = page_of([result.model_copy(update={"sparsity": sparsity, "spec": spec})])
    assert [tag for tag, _ in Page(html).tags if tag == "img"] == []
    data = data_of(html)
    assert data["models"][0]["heat"]["modules"] == [name]
    assert data["methods"] == [name]


def test_values_that_are_no_numbers_have_a_place_at_the_edge():
    rows = [make_result(method="a", value=float("inf")), make_result(method="b", value=30.0)]
    rows.append(make_result(method="c", value=float("nan")))
    rows.append(make_result(method="d", value=5e7))
    by_method = {row["method"]: row for row in scored(data_of(page_of(rows))["models"][0])}
    assert by_method["a"]["value"] == "inf" and by_method["a"]["beyond"]
    assert "value" not in by_method["c"] and by_method["c"]["beyond"]
    assert by_method["d"]["shown"] == 100 * 20.0 and by_method["d"]["text"] == "5.00e7"
    assert "beyond" not in by_method["b"]


def test_failed_and_damaged_are_not_hidden():
    page = page_of([make_result(), make_result(status="failed")], skipped=[("x.json", "torn")])
    assert "1 failed run is not shown" in " ".join(Page(page).text.split())
    assert "<code>x.json</code>: torn" in page


def test_an_empty_selection_is_an_error():
    with pytest.raises(MissingResource):
        build_report(mixed(), Selection.parse(["method=none"]))


@pytest.mark.slow
def test_the_page_of_2000_results_is_at_most_3_megabytes():
    from benchmarks.fixtures.generated import generate_results

    report = build_report(list(generate_results(2000)))
    assert report.results == 2000
    assert len(render_page(report).encode()) <= 3_000_000


def test_the_model_with_the_most_rows_and_a_score_with_a_finding_come_first():
    few = make_result(model="a")
    many = [make_result(model="b", method=method, value=value, calibration=text)
            for method, value, text in (("magnitude", 32.0, None), ("wanda", 30.0, "c4"),
                                        ("sparsegpt", 31.0, "c4"))]  # fmt: skip
    # all but one were calibrated on that kind of text: no finding is told of it
    beside = {"protocol": "c4/test/512/v1", "dataset": "c4"}
    many = [
        row.model_copy(update={"scores": [*row.scores, row.scores[0].model_copy(update=beside)]})
        for row in many
    ]
    first, second = build_report([few, *many]).models
    assert (first.table.model, second.table.model) == ("b", "a")
    assert "wanda is best" in first.finding and first.column == "token_ppl wiki/test/512/v1"
    assert first.table.columns[0] == "token_ppl c4/test/512/v1"
