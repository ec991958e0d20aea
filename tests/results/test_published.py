"""Published values beside ours: same model, method, sparsity, metric, protocol, or nothing."""

import json
import re
from dataclasses import replace

import pytest

from prunebench.evaluate.records import task_table
from prunebench.models.source import find_model
from prunebench.results.compare import compare
from prunebench.results.published import PublishedValue, find_twins, published_values
from prunebench.results.store import ResultStore
from tests.factories import make_result

WIKI = "wikitext2-raw/test/4096/v1"


def with_scores(result, **values):
    """The result with an accuracy on each of the tasks."""
    score = result.scores[0].model_dump()
    tasks = [
        {
            **score, "metric": "acc", "dataset": task, "value": value, "dense_value": 0.7,
            "protocol": f"lm-eval/{task}/0-shot/v1.0", "higher_is_better": True, "stderr": 0.01,
        }
        for task, value in values.items()
    ]  # fmt: skip
    return type(result).model_validate({**result.model_dump(), "scores": tasks})


def ours(*results):
    """The pairs of pruned rows, by the place that the published value is printed in."""
    twins = find_twins(compare(list(results)))
    return {t.published.source: t for t in twins if t.published.method != "dense"}


def llama(value, **more):
    more = {"model": "llama2-7b", "protocol": WIKI, "dense": 5.12} | more
    return make_result(value=value, **more)


def test_what_is_compared_is_the_same_thing():
    matches = ours(llama(6.42))
    assert set(matches) == {
        "arXiv 2306.11695, Table 3", "arXiv 2306.11695, Table 18",
    }  # fmt: skip
    assert matches["arXiv 2306.11695, Table 3"].published.value == 6.42
    assert matches["arXiv 2306.11695, Table 18"].published.std == 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "wikitext2-raw/test/2047/v1"},
        {"protocol": "wikitext2-raw/test/4096/v1/first-1000"},
        {"protocol": "wiki-sample/held-out/4096/v1"},
        {"model": "llama2-7b-chat"},
        {"method": "ria"},
        {"sparsity": "0.55"},
        {"allocation": "owl"},
    ],
)
def test_another_protocol_model_method_sparsity_or_allocation_is_no_twin(change):
    assert ours(llama(6.42, **change)) == {}


def test_the_dense_model_has_twins_too():
    twins = [t for t in find_twins(compare([llama(6.42)])) if t.published.method == "dense"]
    assert len(twins) > 1
    assert {(t.published.value, t.mean, t.verdict) for t in twins} == {(5.12, 5.12, "agrees")}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(6.42, "agrees"), (6.54, "agrees"), (6.56, "worse"), (6.30, "agrees"), (6.28, "better")],
)
def test_a_perplexity_agrees_within_two_percent(value, verdict):
    assert ours(llama(value))["arXiv 2306.11695, Table 3"].verdict == verdict


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_broke_is_worse(value):
    assert ours(llama(value))["arXiv 2306.11695, Table 3"].verdict == "worse"


def test_quantized_weights_are_no_twin_of_those_in_16_bits():
    row = llama(6.42)
    codes = {"bits": 4, "group_size": 64, "symmetric": False, "groups": 1, "exact": True}
    row = type(row).model_validate({**row.model_dump(), "quantization": codes})
    assert ours(row) == {}
    expected = PublishedValue(
        method="wanda", model="llama2-7b", sparsity="0.5", metric="token_ppl", protocol=WIKI,
        value=6.5, source="this recipe",
    )  # fmt: skip
    assert find_twins(compare([row]), [expected]) == []
    (twin,) = find_twins(compare([row]), [replace(expected, bits=4)])
    assert (twin.mean, twin.verdict) == (6.42, "agrees")


def test_the_noise_of_the_seeds_widens_what_agrees():
    values = (6.3, 6.7, 7.1)
    twin = ours(*(llama(v, seed=i) for i, v in enumerate(values)))["arXiv 2306.11695, Table 3"]
    assert twin.mean == pytest.approx(6.7, abs=0.01)
    assert twin.difference == pytest.approx(twin.mean / 6.42 - 1)
    assert twin.verdict == "agrees"


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.4105, "agrees"), (0.42, "agrees"), (0.43, "better"), (0.40, "worse")],
)
def test_an_accuracy_is_a_ratio_and_more_is_better(value, verdict):
    result = with_scores(llama(11.0, sparsity="2:4"), hellaswag=value)
    twin = ours(result)["arXiv 2409.17481, Table 1"]
    assert (twin.published.value, twin.verdict) == (pytest.approx(0.4105), verdict)
    assert twin.difference == pytest.approx(value - 0.4105)


def test_a_mean_of_tasks_needs_all_of_them():
    tasks = dict.fromkeys(task_table()["preset"]["wanda7"], 0.5624)
    whole = with_scores(llama(6.42), **tasks)
    mean = ours(whole)["arXiv 2306.11695, Table 2"]
    assert (mean.published.dataset, mean.published.value) == ("mean_of_7", pytest.approx(0.5624))
    assert (mean.mean, mean.verdict) == (pytest.approx(0.5624), "agrees")
    tasks.pop("rte")
    part = ours(with_scores(llama(6.42), **tasks))
    assert part and not [t for t in part.values() if t.published.dataset == "mean_of_7"]


def test_the_means_of_papers_are_our_presets():
    presets = task_table()["preset"]
    means = {v.paper: set(v.tasks) for v in published_values() if v.dataset.startswith("mean_of")}
    assert means == {
        "2306.11695": set(presets["wanda7"]),
        "2409.17481": set(presets["maskllm7"]),
        "2311.04902": set(presets["gblm6"]),
    }


def test_every_value_has_a_model_of_ours_a_method_and_a_sane_number():
    values = published_values()
    assert len(values) > 1200
    assert all(find_model(model).entry for model in {v.model for v in values})
    assert all(0.1 < v.value < 1 for v in values if v.metric == "acc")
    assert all(v.value > 2 for v in values if v.metric == "token_ppl")
    assert any(v.note == "likely an erratum for 4.10" for v in values)


def test_a_model_that_is_2_4_in_part_or_one_line_of_an_ablation_is_left_out():
    of_opt = {
        (v.method, v.value) for v in published_values()
        if (v.model, v.sparsity, v.protocol) == ("opt-125m", "0.5", "wikitext2-raw/test/2048/v1")
        and v.paper == "2306.11695"
    }  # fmt: skip
    assert ("wanda", 38.96) in of_opt and ("wanda", 46.95) not in of_opt
    assert all(v.sparsity.replace(":", "").replace(".", "").isdigit() for v in published_values())


def test_the_command_shows_both(cli, tmp_path):
    store = ResultStore(tmp_path / "results")
    store.publish(llama(6.7))
    where = ["--results-dir", tmp_path / "results"]
    text = cli("compare", "--published", *where).stdout
    assert "6.42" in text and "6.70" in text and "+4.4%" in text and "worse" in text
    assert "Table 18" in text and "6.44 ± 0.01" in text
    records = json.loads(cli("compare", "--published", "--json", *where).stdout)
    assert {r["verdict"] for r in records if r["method"] == "wanda"} == {"worse"}
    page = tmp_path / "report.html"
    cli("report", "-o", page, *where)
    assert re.search(r"2306\.11695[^\n]{0,40}Table 3", page.read_text())


@pytest.mark.parametrize(
    ("arguments", "result", "says"),
    [
        (["--published"], {"model": "mine"}, "no paper has a value for mine"),
        (["--published"], {"model": "opt-125m"}, "has the protocol of a paper"),
        (["--published", "--format", "csv"], {"model": "opt-125m"}, "has no format 'csv'"),
        (["--published", "--paired"], {"model": "opt-125m"}, "choose one"),
    ],
)
def test_nothing_to_show_is_said(cli, tmp_path, arguments, result, says):
    ResultStore(tmp_path / "results").publish(make_result(**result))
    code = 3 if len(arguments) == 1 else 2
    where = ["--results-dir", tmp_path / "results"]
    assert says in cli("compare", *arguments, *where, code=code).output


def test_a_measured_value_of_any_text_file_is_of_the_text_file():
    value = PublishedValue("wanda", "m", "0.5", "token_ppl", "file-0123/all/64/v1", 1.0, "here")
    assert (value.dataset, value.seqlen, value.limit) == ("file", 64, None)
