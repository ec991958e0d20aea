"""A score folded over seeds, and the test whether two scores differ by more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunebench.results.schema import Score

_NOISE_STANDARD_ERRORS = 2.0  # about 95% of a normal distribution


@dataclass(frozen=True)
class CellScore:
    """A metric of one cell.

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

    @classmethod
    def of(cls, scores: Sequence[Score]) -> CellScore:
        """Fold the scores of the seeds, all of one metric and protocol."""
        values = tuple(score.value for score in scores)
        return cls(
            metric=scores[0].metric,
            values=values,
            mean=statistics.fmean(values),
            std=_deviation(values) if len(values) > 1 else None,
            seeds=len(values),
            dense=_mean(score.dense_value for score in scores),
            stderr=_mean(score.stderr for score in scores),
            dense_stderr=_mean(score.dense_stderr for score in scores),
            higher_is_better=scores[0].higher_is_better,
        )

    def of_dense(self) -> CellScore | None:
        """Return the dense model's score that these were measured beside, if there is one."""
        if self.dense is None:
            return None
        return CellScore(
            metric=self.metric, values=(self.dense,), mean=self.dense, std=None, seeds=1,
            dense=self.dense, stderr=self.dense_stderr, dense_stderr=self.dense_stderr,
            higher_is_better=self.higher_is_better,
        )  # fmt: skip

    @property
    def loss(self) -> float:
        """The mean, turned so that lower is better."""
        return -self.mean if self.higher_is_better else self.mean

    @property
    def error(self) -> float | None:
        """What stands behind the plus-minus: deviation over seeds, else `error_of_one_seed`."""
        return self.error_of_one_seed if self.std is None else self.std

    @property
    def error_of_one_seed(self) -> float | None:
        """The standard error over questions, of an accuracy.

        None for a loss: all rows have the same windows, so the spread between windows is no noise
        of their difference, and beside deviations over seeds it would be read as one.
        """
        return self.stderr if self.higher_is_better else None

    def in_noise_of(self, other: CellScore) -> bool:
        """Whether the difference is at most two standard errors of what is known to vary.

        Perplexities are compared as mean losses: they are exponentials, and their tails are heavy.
        """
        (mean, error), (other_mean, other_error) = self._noise(), other._noise()
        # perplexities of a single seed: nothing is known to vary, so no tie is claimed
        if error is None and other_error is None:
            return False
        # standard error of a difference of independent means: sqrt(a^2 + b^2)
        both = math.hypot(error or 0.0, other_error or 0.0)
        return abs(mean - other_mean) <= _NOISE_STANDARD_ERRORS * both

    def _noise(self) -> tuple[float, float | None]:
        """Return the mean and its standard error, of a perplexity those of its logarithm."""
        # log PPL is the mean loss; a value of 0 or less has no logarithm
        logarithmic = self.metric.endswith("_ppl") and min(self.values) > 0
        values = [math.log(value) for value in self.values] if logarithmic else list(self.values)
        if len(values) > 1:
            # standard error of the mean over n seeds: s / sqrt(n)
            return statistics.fmean(values), _deviation(values) / math.sqrt(len(values))
        return values[0], self.error_of_one_seed


def _deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; `statistics.stdev` is exact, and 30 times slower."""
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None
