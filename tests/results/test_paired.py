"""Two runs item by item: exact tests against scipy, the bootstrap against a direct simulation."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.results.paired import (
    MIN_WINDOWS,
    Side,
    bootstrap,
    mcnemar,
    pair,
    read_sides,
)
from prunebench.results.samples import Sample, read_samples, samples_path, write_samples
from prunebench.results.store import ResultStore
from tests.factories import make_result

PIQA = "lm-eval/piqa/0-shot/v1.0"
WIKI = "wiki/test/512/v1"


def side(values, *, metric="acc", protocol=PIQA, start=0, name="x"):
    items = {(protocol, i, f"h{i}"): {metric: float(v)} for i, v in enumerate(values, start)}
    return Side(name, items)


def losses(count, *, shift=0.0, noise=0.0, seed=0):
    rng = random.Random(seed)
    base = [rng.gauss(3.0, 0.5) for _ in range(count)]
    return base, [loss + shift + rng.gauss(0, noise) for loss in base]


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (1, 0), (3, 3), (2, 9), (15, 4), (40, 41), (120, 70), (900, 400)]
)
def test_mcnemar_is_the_binomial_test(a, b):
    expected = stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_by_hand():
    """Of 5 discordant items one favours B: (1 + 5) / 32 on a side, twice that on both."""
    assert mcnemar(4, 1) == 12 / 32


def test_accuracies_and_their_paired_standard_error():
    first = [1, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    second = [1, 0, 0, 0, 0, 1, 1, 0, 1, 1]
    (row,) = pair(side(first), side(second)).comparisons
    assert (row.a, row.b) == (0.7, 0.5)
    assert (row.a_alone, row.b_alone) == (3, 1)
    assert row.difference == pytest.approx(0.2)
    assert row.stderr == pytest.approx(stats.sem(np.array(first) - np.array(second)))
    assert row.p == row.p_holm == 2 * (1 + 4) / 16
    assert row.verdict == "within noise"


def test_the_bootstrap_is_that_of_a_direct_simulation():
    """Another generator, one draw at a time: same quantiles and p but for the noise of drawing."""
    differences = [0.03, -0.02, 0.05, 0.01, 0.08, -0.04, 0.02, 0.06, -0.01, 0.03, 0.00, 0.04]
    rng = random.Random(5)
    draws = sorted(
        sum(rng.choices(differences, k=len(differences))) / len(differences) for _ in range(4000)
    )
    low, high, p = bootstrap(differences)
    assert low == pytest.approx(draws[100], abs=0.002)
    assert high == pytest.approx(draws[3900], abs=0.002)
    below = sum(draw <= 0 for draw in draws) / len(draws)
    assert 0 < below < 0.05
    assert p == pytest.approx(2 * below, abs=0.008)


def test_the_bootstrap_of_a_constant_difference_has_no_width():
    low, high, p = bootstrap([0.25] * 20)
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.25))
    assert p == 2 / 10_001


def test_the_level_of_the_bootstrap_is_about_what_it_says():
    """Without a difference, about 5% of 300 experiments should be called one (40 windows each)."""
    rng = random.Random(1)
    called = sum(
        bootstrap([rng.gauss(0, 1) for _ in range(40)], resamples=500)[2] < 0.05 for _ in range(300)
    )
    assert 5 <= called <= 32


def test_perplexities_their_ratio_and_interval():
    base, shifted = losses(60, shift=0.1, noise=0.05)
    (row,) = pair(
        side(shifted, metric="nll", protocol=WIKI), side(base, metric="nll", protocol=WIKI)
    ).comparisons
    assert row.metric == "token_ppl"
    assert row.a == pytest.approx(math.exp(np.mean(shifted)))
    assert row.ratio == pytest.approx(row.a / row.b)
    assert row.ratio_low < row.ratio < row.ratio_high
    assert math.log(row.ratio_high / row.ratio_low) == pytest.approx(4 * row.stderr, rel=0.15)
    assert row.verdict == "B better"


def test_swapping_mirrors():
    base, shifted = losses(50, shift=0.01, noise=0.05)
    a, b = (side(x, metric="nll", protocol=WIKI) for x in (base, shifted))
    (forward,), (mirrored,) = pair(a, b).comparisons, pair(b, a).comparisons
    assert forward.p == mirrored.p
    assert forward.ratio_low == pytest.approx(1 / mirrored.ratio_high)
    assert forward == pair(a, b).comparisons[0]  # and again gives the same


@pytest.mark.parametrize(("metric", "values"), [("acc", [0, 1, 1, 0] * 5), ("nll", [2.5, 3.5] * 9)])
def test_identical_runs(metric, values):
    (row,) = pair(side(values, metric=metric), side(values, metric=metric)).comparisons
    assert row.p == 1
    assert row.difference == 0
    assert row.verdict == "within noise"


def test_few_windows_get_no_p():
    values = [1.0] * (MIN_WINDOWS - 1)
    worse = [value + 0.5 for value in values]
    (row,) = pair(side(values, metric="nll"), side(worse, metric="nll")).comparisons
    assert (row.p, row.ratio_low, row.verdict) == (None, None, "too few windows")
    assert row.ratio == pytest.approx(math.exp(-0.5))


def test_a_single_item_has_no_standard_error():
    (row,) = pair(side([1]), side([0])).comparisons
    assert row.stderr is None
    assert row.p == 1


def test_several_are_corrected_by_holm():
    """p = 0.04, 0.01, 0.03 become 0.06, 0.03, 0.06 by hand: 3 x 0.01, 2 x 0.03, never less."""
    from dataclasses import replace

    from prunebench.results.paired import correct

    (row,) = pair(side([1, 1, 0]), side([0, 0, 0])).comparisons
    rows = correct([replace(row, p=p, verdict="A better") for p in (0.04, 0.01, 0.03)])
    assert [row.p_holm for row in rows] == pytest.approx([0.06, 0.03, 0.06])
    assert [row.verdict for row in rows] == ["within noise", "A better", "within noise"]


def test_a_metric_of_which_less_is_better():
    a, b = side([1] * 12, metric="toxic"), side([0] * 12, metric="toxic")
    assert pair(a, b).comparisons[0].verdict == "A better"
    (row,) = pair(a, b, lower_is_better=frozenset({"toxic"})).comparisons
    assert row.verdict == "B better"


def test_the_questions_of_all_tasks_together_show_what_no_task_does():
    """4 against 0 in each of two tasks: p = 2/16, no difference. 8 against 0: 2/256."""
    arc = "lm-eval/arc_easy/0-shot/v1.0"
    a = Side("a", {**side([1] * 4 + [0] * 6).items, **side([1] * 4, protocol=arc).items})
    b = Side("b", dict.fromkeys(a.items, {"acc": 0.0}))
    a = Side("a", {**a.items, (PIQA, 10, "of A"): {"acc": 1.0}, (arc, 4, "of A"): {"acc": 1.0}})
    pairing = pair(a, b)
    assert [(row.items, row.p, row.verdict) for row in pairing.comparisons] == [
        (4, 2 / 16, "within noise"), (10, 2 / 16, "within noise"),
    ]  # fmt: skip
    (row,) = pairing.pooled
    assert (row.protocol, row.items, row.a_alone, row.b_alone) == ("2 tasks", 14, 8, 0)
    assert (row.only_a, row.only_b) == (2, 0)
    assert (row.a, row.b, row.difference) == (8 / 14, 0.0, pytest.approx(8 / 14))
    assert (row.p, row.p_holm, row.verdict) == (2 / 256, 2 / 256, "A better")
    # they are no part of the correction of the others, and one task has nothing to pool
    assert [row.p_holm for row in pairing.comparisons] == [4 / 16, 4 / 16]
    assert pair(a, b, protocols=[arc]).pooled == ()
    # losses of several texts are not pooled: a window of another text has another loss
    two_texts = {**side([3.0] * 12, metric="nll").items}
    two_texts |= side([2.0] * 12, metric="nll", protocol=WIKI).items
    assert pair(Side("a", two_texts), Side("b", two_texts)).pooled == ()


# ---------------------------------------------------------------- matching


def test_only_items_of_both_count():
    a, b = side([1, 0, 1, 1]), side([1, 0, 0], start=1)
    changed = {(p, i, "other" if i == 2 else h): v for (p, i, h), v in b.items.items()}
    (row,) = pair(a, Side("b", changed)).comparisons
    assert (row.items, row.only_a, row.only_b) == (2, 2, 1)  # item 1 and item 3 match
    assert (row.a, row.b) == (0.5, 0.5)


def test_protocols_without_a_common_item_are_named():
    a = Side("a", {**side([1, 0]).items, **side([1], protocol="only/a").items})
    b = Side("b", {**side([1, 1]).items, **side([1], protocol="only/b").items})
    pairing = pair(a, b)
    assert [row.protocol for row in pairing.comparisons] == [PIQA]
    assert pairing.unmatched == {"only/a": (1, 0), "only/b": (0, 1)}
    with pytest.raises(IncompatibleData, match="share no item"):
        pair(side([1], protocol="only/a"), side([1], protocol="only/b"))


def test_values_of_another_kind_are_named_and_left_out():
    pairing = pair(side([0.25, 1], metric="f1"), side([0.5, 1], metric="f1"))
    assert pairing.comparisons == ()
    assert pairing.uncompared == (f"f1 {PIQA}",)


def test_a_model_that_broke_is_not_compared():
    broken = [3.0] * 11 + [float("nan")]
    pairing = pair(side([3.0] * 12, metric="nll"), side(broken, metric="nll"))
    assert (pairing.comparisons, pairing.uncompared) == ((), (f"nll {PIQA}",))


def test_selection_is_before_the_correction():
    rows = [{"acc": float(i % 2), "acc_norm": 1.0} for i in range(9)]
    one = Side("a", {(PIQA, i, "h"): row for i, row in enumerate(rows)})
    other = Side("b", {key: {"acc": 0.0, "acc_norm": 0.0} for key in one.items})
    both = pair(one, other).comparisons
    assert [row.metric for row in both] == ["acc", "acc_norm"]
    (alone,) = pair(one, other, metrics=["acc_n*"]).comparisons
    assert alone.p_holm == alone.p == both[1].p == 2 / 2**9
    assert both[1].p_holm == 2 * both[1].p
    with pytest.raises(MissingResource, match="nothing is selected") as caught:
        pair(one, other, metrics=["em"])
    assert f"acc {PIQA}" in str(caught.value)


# ---------------------------------------------------------------- files and the command


def file_run(store, *, right, shift=0.0, windows=12, **options) -> Path:
    """File a result with samples: `right` is how many of 40 questions it answers."""
    path = store.publish(make_result(**options))
    samples = [
        Sample(
            protocol=PIQA, item=i, sha256=f"q{i}",
            values={"acc": float(i < right)}, dense_values={"acc": 1.0},
        )
        for i in range(40)
    ]  # fmt: skip
    base, shifted = losses(windows, shift=shift, noise=0.01)
    samples += [
        Sample(protocol=WIKI, item=i, sha256=f"w{i}", values={"nll": b}, dense_values={"nll": a})
        for i, (a, b) in enumerate(zip(base, shifted, strict=True))
    ]
    write_samples(path, samples)
    return path


@pytest.fixture
def two(tmp_path):
    store = ResultStore(tmp_path / "results")
    return [
        file_run(store, right=20, shift=0.4, method="magnitude"),
        file_run(store, right=33, shift=0.2, sparsity="2:4"),
    ]


def test_two_results_on_the_command_line(cli, two, tmp_path):
    a, b = (path.stem for path in two)
    folder = ["--results-dir", tmp_path / "results"]
    outcome = cli("compare", "--paired", a[:14], b, *folder)
    assert f"A  magnitude 0.5 on m, seed 0, {a}" in outcome.stdout
    assert outcome.stdout.count("B better") == 2
    assert "0 / 13" in outcome.stdout
    assert "50.0%" in outcome.stdout and "82.5%" in outcome.stdout
    assert "Holm" in outcome.stderr
    document = json.loads(cli("compare", "--paired", a, two[1], "--json", *folder).stdout)
    assert (document["a"], document["b"]) == (a, b)
    acc, ppl = document["comparisons"]
    assert acc["p"] == pytest.approx(2 * 0.5**13)
    assert ppl["ratio"] == pytest.approx(math.exp(0.2), rel=0.02)
    chosen = cli("compare", "--paired", a, b, "metric=acc", "--json", *folder).stdout
    assert [row["metric"] for row in json.loads(chosen)["comparisons"]] == ["acc"]


def test_the_command_shows_all_tasks_together(cli, two, tmp_path):
    for path in two:
        samples = read_samples(path)
        tasks = [sample for sample in samples if sample.protocol == PIQA]
        samples_path(path).unlink()
        write_samples(
            path, [*samples, *(s.model_copy(update={"protocol": "lm-eval/rte/0"}) for s in tasks)]
        )
    words = ["compare", "--paired", *(path.stem for path in two)]
    outcome = cli(*words, "--results-dir", tmp_path / "results")
    assert re.search(r"acc 2 tasks +80 +50.0% +82.5% .* 0 / 26 .* B better", outcome.stdout)
    assert "2 tasks: all questions together, each counts alike, corrected apart" in outcome.stderr
    document = json.loads(cli(*words, "--json", "--results-dir", tmp_path / "results").stdout)
    assert [row["items"] for row in document["pooled"]] == [80]


def test_a_title_says_what_made_a_run(cli, tmp_path):
    store = ResultStore(tmp_path / "results")
    a = file_run(store, right=20, recover="block", allocation="owl")
    b = file_run(store, right=33, method="rtn", sparsity="0")
    document = json.loads(b.read_text())
    document["quantization"] = {
        "bits": 4, "group_size": 64, "symmetric": False, "groups": 1, "exact": True,
    }  # fmt: skip
    b.write_text(json.dumps(document))
    run = cli("compare", "--paired", a.stem, b.stem, "protocol=wiki", "--results-dir", store.root)
    assert f"A  wanda + block 0.5, owl on m, seed 0, {a.stem}" in run.stdout
    assert f"B  rtn INT4 on m, seed 0, {b.stem}" in run.stdout
    assert "ppl wiki" in run.stdout and "acc" not in run.stdout


def test_one_result_is_compared_with_its_dense_model(cli, two, tmp_path):
    outcome = cli("compare", "--paired", two[0].stem, "--results-dir", tmp_path / "results")
    assert "the dense model of A" in outcome.stdout
    assert "20 / 0" not in outcome.stdout and "0 / 20" in outcome.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "one or two results, 0 are named"),
        (["a", "b", "c"], 2, "3 are named"),
        (["{a}", "seed=1"], 2, "does not select by 'seed'"),
        (["{a}", "metrik=acc"], 2, "unknown selector 'metrik'"),
        (["{a}", "metric=em"], 3, "nothing is selected"),
        (["{a}x"], 2, "did you mean {a}?"),
        (["{a}", "--format", "csv"], 2, "no format 'csv'"),
    ],
)
def test_wrong_words(cli, two, tmp_path, words, code, says):
    a = two[0].stem
    words = [word.replace("{a}", a) for word in words]
    outcome = cli("compare", "--paired", *words, "--results-dir", tmp_path / "results", code=code)
    assert says.replace("{a}", a) in outcome.output


def test_an_ambiguous_beginning_names_the_candidates(two, tmp_path):
    store = ResultStore(tmp_path / "results")
    again = file_run(store, right=1, method="magnitude")
    with pytest.raises(UsageError, match="the beginning of 2 results") as caught:
        store.find(again.stem[:8])
    assert again.stem in str(caught.value) and two[0].stem in str(caught.value)
    assert store.find(again.stem) == again


def test_missing_samples(cli, two, tmp_path):
    samples_path(two[0]).unlink()
    outcome = cli(
        "compare", "--paired", two[1], two[0], "--results-dir", tmp_path / "results", code=3
    )
    assert f"{two[0].stem} has no samples" in outcome.output
    assert "--log-samples" in outcome.output


def test_samples_that_are_not_finite_are_read_again(tmp_path):
    values = {"nll": float("nan"), "acc": float("inf")}
    path = write_samples(
        tmp_path / "x.json",
        [Sample(protocol=WIKI, item=0, sha256="h", values=values, dense_values={"nll": 3.0})],
    )
    (sample,) = read_samples(tmp_path / "x.json")
    assert math.isnan(sample.values["nll"]) and math.isinf(sample.values["acc"])
    assert path.name == "x.samples.jsonl"


def test_damaged_samples(cli, two, tmp_path):
    path = samples_path(two[0])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:30] + "\n", *lines[3:]]))
    outcome = cli("compare", "--paired", two[0], code=4)
    assert "line 3" in outcome.output
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(IncompatibleData, match="is damaged") as caught:
        read_sides(two[0])
    assert f"item 0 of {PIQA} is there twice" in str(caught.value)


def test_a_real_run_logs_what_is_compared(cli, tiny_run, tmp_path):
    """From `run --log-samples` to the verdict: the perplexities are those of the rows."""
    folder = ["--results-dir", tmp_path / "results"]
    cli(*tiny_run, "-m", "magnitude", "--sparsity", "0.9", "--log-samples")
    cli(*tiny_run, "-m", "wanda", "--sparsity", "0.3", "--log-samples")
    results = {r.spec.method: r for r in ResultStore(tmp_path / "results").read()[0]}
    first, second = results["magnitude"], results["wanda"]
    document = json.loads(cli("compare", "--paired", first.id, second.id, "--json", *folder).stdout)
    (row,) = document["comparisons"]
    assert row["a"] == pytest.approx(first.scores[0].value, rel=1e-6)
    assert row["b"] == pytest.approx(second.scores[0].value, rel=1e-6)
    assert row["items"] == first.scores[0].targets // 63
    (row,) = json.loads(cli("compare", "--paired", second.id, "--json", *folder).stdout)[
        "comparisons"
    ]
    assert row["b"] == pytest.approx(second.scores[0].dense_value, rel=1e-6)
