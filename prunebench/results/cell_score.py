"""A score folded over seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

NOISE_STANDARD_ERRORS = 2.0  # about 95% of a normal distribution


@dataclass(frozen=True)
class CellScore:
    """A metric of one cell, as `fold` made it.

    Attributes:
        metric: As in `Score`.
        values: One value a seed.
        mean: Mean over the seeds.
        std: Sample standard deviation over the seeds; None with a single one.
        seeds: Number of seeds.
        dense: The dense model's value, same protocol and dtype.
        stderr: Standard error over documents or windows, mean over the seeds; None if unknown.
        dense_stderr: The same of `dense`.
        higher_is_better: Whether the best value is the highest.
        best: True for the best of its sparsity in its column, where there is more than one.
        within_noise: True if its difference from the best is within noise.
        known_std: Standard deviation that a log perplexity has at least: that of rounding, or, of
            a single seed, that of its rivals over their seeds; None where neither is known.
        member_of: The group of tasks that it is a part of; empty where there is none.
    """

    metric: str
    values: tuple[float, ...]
    mean: float
    std: float | None
    seeds: int
    dense: float | None
    stderr: float | None = None
    dense_stderr: float | None = None
    higher_is_better: bool = False
    best: bool = False
    within_noise: bool = False
    known_std: float | None = None
    member_of: str = ""

    @property
    def loss(self) -> float:
        """The mean, turned so that lower is better."""
        return -self.mean if self.higher_is_better else self.mean

    @property
    def error(self) -> float | None:
        """What stands behind the plus-minus: the deviation over seeds, or that over questions.

        None for a perplexity of a single seed: all rows have the same windows, so the spread
        between windows is no noise of their difference, and would be read as one.
        """
        if self.std is None:
            return self.stderr if self.higher_is_better else None
        return self.std


def within_noise(score: CellScore, best: CellScore) -> bool:
    """Return whether two scores are the same within noise, as `fold` marks rows of a sparsity."""
    logarithmic = score.metric.endswith("_ppl") and min(*score.values, *best.values) > 0
    loss, error = _loss_and_error(score, logarithmic=logarithmic)
    best_loss, best_error = _loss_and_error(best, logarithmic=logarithmic)
    if error is None and best_error is None:
        return False
    both = math.hypot(error or 0.0, best_error or 0.0)
    return abs(loss - best_loss) <= NOISE_STANDARD_ERRORS * both


def _loss_and_error(score: CellScore, *, logarithmic: bool) -> tuple[float, float | None]:
    """Return the mean as it is compared, and its standard error; None if nothing varies."""
    losses = [math.log(value) if logarithmic else value for value in score.values]
    mean = statistics.fmean(losses)
    least = None if score.known_std is None else score.known_std / len(losses) ** 0.5
    if len(losses) == 1:
        return mean, score.stderr if score.higher_is_better else least
    if not all(map(math.isfinite, losses)):
        return mean, math.nan
    return mean, max(statistics.stdev(losses) / len(losses) ** 0.5, least or 0.0)
