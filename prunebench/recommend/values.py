"""Read from a row what a floor is about: perplexity or accuracy beside the dense model's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.errors import IncompatibleData, UsageError
from prunebench.evaluate.lm_eval_task import LmEvalTask
from prunebench.results.schema import Result, Score

_ACCURACIES = ("acc", "acc_norm", "exact_match")  # the first that a task has counts


@dataclass(frozen=True)
class Value:
    """What a row says.

    Attributes:
        value: In the unit of the floor.
        score, dense: A perplexity, or a mean accuracy, and that of dense.
        protocol: Of what was measured.
        with_seen: Whether the questions of the race could not be taken out.
    """

    value: float
    score: float
    dense: float
    protocol: str
    with_seen: bool = False


def require_accuracy(task: LmEvalTask, *, seen: int) -> None:
    """Refuse a task that a floor of accuracy could not be read from.

    Args:
        task: As it was asked for.
        seen: The most questions that the race scores.

    Raises:
        UsageError: It has no accuracy, or no question beyond those.
    """
    members = task.built["tasks"]
    group = task.built.get("groups", {}).get(task.name)
    if group is not None:
        metrics = [config.metric for config in group.aggregate_metric_list or ()]
    else:
        metrics = list(members[task.name].higher_is_better()) if task.name in members else []
    if not set(metrics) & set(_ACCURACIES):
        raise UsageError(
            f"{task.name} has no accuracy",
            where=f"it is scored by {', '.join(metrics)}" if metrics
            else f"it has no score of its own, and stands for {', '.join(members)}",
            fix=f"use tasks with {', '.join(_ACCURACIES)}",
        )  # fmt: skip
    count = max(task.counts.values())
    if count <= seen:
        raise UsageError(
            f"{task.name} has {count} questions, and the race sees up to {seen}",
            where="none would be left to confirm on",
            fix="use tasks with more questions",
        )


def perplexity_value(result: Result) -> Value:
    """Return times dense's perplexity on the only text of a row."""
    (score,) = [score for score in result.scores if score.metric == "token_ppl"]
    if not score.dense_value:
        raise IncompatibleData(f"{result.id} has no perplexity of dense", where=score.protocol)
    return Value(score.value / score.dense_value, score.value, score.dense_value, score.protocol)


def recovery_value(
    result: Result, tasks: Sequence[str], *, seen: Result | None = None
) -> Value:  # fmt: skip
    """Return the mean over tasks of accuracy beside dense's.

    Args:
        result: A row with all the tasks.
        tasks: Their names.
        seen: A row of the same configuration on the first questions of every task. They are taken
            out: both are means over questions, so those behind the first follow from the two. Not
            if a recovery that is not deterministic gave other weights: then all questions count.

    Raises:
        IncompatibleData: A task has no accuracy, or dense answers nothing of it.
    """
    with_seen = seen is not None and _weights(seen) != _weights(result)
    if with_seen:
        seen = None
    pairs = []
    for task in tasks:
        score = _accuracy(result, task)
        pruned, dense = score.value, score.dense_value
        if seen is not None:
            before = _accuracy(seen, task)
            pruned = _behind(score.value, score.targets, before.value, before.targets, task)
            dense = _behind(
                score.dense_value or 0.0, score.targets, before.dense_value or 0.0,
                before.targets, task,
            )  # fmt: skip
        if not dense:
            raise IncompatibleData(
                f"the dense model answers nothing of {task}",
                where=f"{score.metric} of {score.protocol} is {dense}",
                fix="use another task, or more questions",
            )
        pairs.append((pruned, dense))
    protocol = f"{len(pairs)} tasks" if len(pairs) > 1 else _accuracy(result, tasks[0]).protocol
    return Value(
        statistics.fmean(pruned / dense for pruned, dense in pairs),
        statistics.fmean(pruned for pruned, _ in pairs),
        statistics.fmean(dense for _, dense in pairs),
        protocol,
        with_seen,
    )


def _weights(result: Result) -> str | None:
    return result.model.evaluated_sha256 if result.model else None


def _accuracy(result: Result, task: str) -> Score:
    for metric in _ACCURACIES:
        for score in result.scores:
            # `exact_match,strict-match` of lm-eval: the first of its filters counts
            if score.metric.partition(",")[0] == metric and score.dataset == task:
                return score
    raise IncompatibleData(
        f"{task} has no accuracy",
        where=f"{result.id} has {', '.join(sorted({s.metric for s in result.scores}))}",
        fix=f"use tasks with {', '.join(_ACCURACIES)}",
    )


def _behind(whole: float, count: int, first: float, first_count: int, task: str) -> float:
    """Return the mean over the questions behind the first ones."""
    if count <= first_count:
        raise IncompatibleData(
            f"{task} has {count} questions, and the race has seen them all",
            fix="use tasks with more questions",
        )
    # means of ratios of whole questions: rounding leaves a tiny negative at worst
    return max(0.0, (whole * count - first * first_count) / (count - first_count))
