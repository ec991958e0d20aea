"""What a floor reads from a row, and a floor of accuracy end to end."""

import json
from types import SimpleNamespace

import pytest

from prunebench.errors import IncompatibleData, UsageError
from prunebench.evaluate.lm_eval_task import LmEvalTask, Protocol
from prunebench.recommend.values import perplexity_value, recovery_value, require_accuracy
from prunebench.results.schema import Score
from prunebench.results.store import ResultStore
from tests.factories import counted, make_result


def row(*scores, weights="e"):
    result = counted(make_result(method="wanda", value=30.0))
    model = result.model.model_copy(update={"evaluated_sha256": weights})
    return result.model_copy(update={"scores": list(scores), "model": model})


def score(dataset, metric, value, dense, count):
    return Score(
        metric=metric, dataset=dataset, origin="o", protocol=f"lm-eval/{dataset}", value=value,
        dense_value=dense, higher_is_better=True, targets=count, limited=True,
        tokens_sha256="0" * 64,
    )  # fmt: skip


def test_recovery_is_a_mean_of_shares_and_acc_goes_first():
    result = row(
        score("a", "acc_norm", 0.1, 0.9, 10), score("a", "acc", 0.4, 0.5, 10),
        score("b", "acc_norm", 0.6, 0.5, 10),
    )  # fmt: skip
    value = recovery_value(result, ["a", "b"])
    assert value.value == pytest.approx((0.8 + 1.2) / 2)
    assert (value.score, value.dense) == (pytest.approx(0.5), pytest.approx(0.5))


def test_the_first_questions_are_taken_out():
    # 6 of 10 first ones right, 10 of 40 in all: 4 of the 30 behind them; dense 8, 20, 12
    seen = row(score("a", "acc", 0.6, 0.8, 10))
    whole = row(score("a", "acc", 0.25, 0.5, 40))
    value = recovery_value(whole, ["a"], seen=seen)
    assert value.score == pytest.approx(4 / 30) and value.dense == pytest.approx(12 / 30)
    assert value.value == pytest.approx(1 / 3)


def test_of_other_weights_all_questions_count_and_that_is_said():
    # a recovery on CUDA gives other weights in the confirmation than in the race
    seen = row(score("a", "acc", 0.6, 0.8, 10), weights="f")
    value = recovery_value(row(score("a", "acc", 0.25, 0.5, 40)), ["a"], seen=seen)
    assert (value.value, value.with_seen) == (0.5, True)
    same = recovery_value(
        row(score("a", "acc", 0.25, 0.5, 40)), ["a"], seen=row(score("a", "acc", 0.6, 0.8, 10))
    )
    assert not same.with_seen


def test_a_score_behind_a_filter_of_lm_eval_counts():
    result = row(
        score("a", "exact_match,strict-match", 0.2, 0.4, 10),
        score("a", "exact_match,flexible-extract", 0.3, 0.3, 10),
    )
    assert recovery_value(result, ["a"]).value == pytest.approx(0.5)


class OfMetrics:
    """A task or group of lm-eval, as far as a floor looks at it."""

    def __init__(self, *metrics):
        self.aggregate_metric_list = [SimpleNamespace(metric=m) for m in metrics]

    def higher_is_better(self):
        return {m.metric: True for m in self.aggregate_metric_list}


def task(name, count, *, tasks, groups=None):
    built = {"tasks": tasks, "groups": groups or {}}
    return LmEvalTask(name, built, {}, dict.fromkeys(tasks, count), Protocol(), None, "")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (task("a", 500, tasks={"a": OfMetrics("acc", "acc_norm")}), ""),
        (task("a", 500, tasks={"a": OfMetrics("exact_match")}), ""),
        (task("a", 500, tasks={"a1": OfMetrics("acc")}, groups={"a": OfMetrics("acc")}), ""),
        (task("a", 500, tasks={"a": OfMetrics("word_perplexity")}), "scored by word_perplexity"),
        (task("a", 500, tasks={"a1": OfMetrics("acc")}, groups={"a": OfMetrics()}), "a1"),
        (task("a", 500, tasks={"a1": OfMetrics("acc"), "a2": OfMetrics("acc")}), "a1, a2"),
        (task("a", 100, tasks={"a": OfMetrics("acc")}), "has 100 questions"),
    ],
)
def test_a_task_that_no_floor_can_be_read_from_is_refused(asked, says):
    if not says:
        require_accuracy(asked, seen=100)
        return
    with pytest.raises(UsageError, match=says):
        require_accuracy(asked, seen=100)


@pytest.mark.parametrize(
    ("result", "seen", "says"),
    [
        (row(score("b", "acc", 0.5, 0.5, 10)), None, "a has no accuracy"),
        (row(score("a", "acc", 0.5, 0.0, 10)), None, "answers nothing of a"),
        (row(score("a", "acc", 0.5, 0.5, 10)), row(score("a", "acc", 0.5, 0.5, 10)), "seen them"),
    ],
)
def test_what_gives_no_honest_share_is_an_error(result, seen, says):
    with pytest.raises(IncompatibleData, match=says):
        recovery_value(result, ["a"], seen=seen)


def test_a_row_without_dense_has_no_value():
    (only,) = make_result(method="wanda", value=30.0).scores
    result = row(only.model_copy(update={"dense_value": None}))
    with pytest.raises(IncompatibleData, match="no perplexity of dense"):
        perplexity_value(result)


@pytest.mark.slow
@pytest.mark.xdist_group("lm-eval")
def test_a_floor_of_accuracy(cli, ask, here, tmp_path, monkeypatch):
    import prunebench.recommend.search as search

    monkeypatch.setattr(search, "_QUESTIONS", (4, 8, 12))
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["fox", "dog", "wizard", "quartz", "jig", "liquor", "jug", "box"] * 5
    (folder / "q.jsonl").write_text(
        "".join(
            json.dumps({"q": f"{i} {w} goes with", "a": w, "b": w[::-1], "label": i % 2}) + "\n"
            for i, w in enumerate(words)
        )
    )
    (folder / "pangram.yaml").write_text(
        f"""task: pangram
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/q.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: "{{{{[a, b]}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 3.0}}
"""
    )
    words = [*ask, "--floor", "recovery=30%", "--tasks", "mine", "--include-path", folder]
    import prunebench.evaluate.tasks as tasks

    with monkeypatch.context() as without:  # of all files: a quarter of a minute
        without.setattr(tasks, "_all_tasks", tasks._few_tasks)
        assert "unknown task 'mine'" in cli(*words, "-q", code=2).stderr
    assert not (tmp_path / "results").exists()
    # a paper's list of tasks stands for them
    monkeypatch.setitem(tasks.task_table()["preset"], "mine", ["pangram"])
    document = json.loads(cli(*words, "-q", "--json").stdout)
    chosen = document["chosen"]
    assert chosen["unseen"] and chosen["value"] >= 0.3
    rows = {r.id: r for r in ResultStore(tmp_path / "results").read()[0]}
    whole = rows[chosen["result_id"]].scores[0]
    assert whole.targets == 40 and not rows[chosen["result_id"]].spec.ppl
    (last,) = [
        t for t in document["trials"]
        if t["name"] == chosen["name"] and t["round"] == chosen["round"] and not t["unseen"]
    ]  # fmt: skip
    first = rows[last["result_id"]].scores[0]
    right = whole.value * 40 - first.value * first.targets
    assert chosen["score"] == pytest.approx(right / (40 - first.targets))
