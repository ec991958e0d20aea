"""Is one model better than another, or is it noise? Two runs compared item by item.

Only items that both answered count: same protocol, same number, same hash (`results/samples.py`).
The items of a run are the noise here, so two runs of one seed can be compared; how much a
method varies with its seed is another question, which repeated runs answer (`results/compare.py`).

- Metrics whose values are all 0 or 1 (`acc`, `acc_norm`, `exact_match`): McNemar's test in its
  exact form (McNemar 1947, Psychometrika 12:153). Items that both or neither got right say nothing;
  of the others, as many should favour A as favour B. p is the two-sided binomial tail, at most 1.
- `nll`, the mean cross-entropy of each window, reported as perplexity: paired bootstrap over
  windows (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 15; for paired
  systems Koehn 2004, EMNLP, W04-3250). Windows are drawn with replacement, as many as there are,
  10,000 times, from a seeded generator; each draw gives the mean difference of the losses, which is
  the log of the ratio of the perplexities. The interval is the 2.5th to the 97.5th percentile; p is
  twice the smaller share of draws on either side of zero (draws at zero count on both sides, and
  the sample itself as one more draw on each), at most 1: the level at which the interval just
  reaches zero. Below `MIN_WINDOWS` windows no p is given: a percentile interval of so few is far
  too narrow. Windows are taken as independent, which neighbours in one document are not quite.

Several comparisons at once are corrected by Holm's method (Holm 1979, Scand. J. Statist. 6:65),
which holds however they depend on each other; verdicts are by the corrected p at 5%. The questions
of all tasks together are one more test, with a correction of its own: it asks another question.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from prunebench.errors import IncompatibleData, MissingResource
from prunebench.results.names import short_protocol
from prunebench.results.samples import read_samples, samples_path

RESAMPLES = 10_000
LEVEL = 0.05
MIN_WINDOWS = 10
_CHUNK_RESAMPLES = 250  # bounds the memory for drawn indices, whatever the number of windows
_LOSS, _PERPLEXITY = "nll", "token_ppl"

Key = tuple[str, int, str]
"""Protocol, number and hash of an item."""

Verdict = Literal["A better", "B better", "within noise", "too few windows"]


@dataclass(frozen=True)
class Side:
    """One model of a comparison: what it got for every item, by metric."""

    name: str
    items: Mapping[Key, Mapping[str, float]]


@dataclass(frozen=True)
class Comparison:
    """A against B under one metric and protocol, on the items that both have.

    Attributes:
        items: Number of items in both.
        only_a: Items of this protocol that B lacks, or has with another hash.
        only_b: The same the other way round.
        a: Accuracy (a ratio) or perplexity of A on the shared items.
        b: The same of B.
        difference: Mean of A minus B over the items: of accuracies, or of losses in nats.
        stderr: Paired standard error of `difference`; null for a single item.
        ratio: Perplexity of A over that of B; null for accuracies.
        ratio_low: Lower end of its 95% interval; null where there are too few windows.
        ratio_high: Upper end.
        a_alone: Items that only A got right; null for perplexities.
        b_alone: Items that only B got right.
        p: Two-sided, of this comparison alone; null where there are too few windows.
        p_holm: Corrected for all comparisons made at once.
        verdict: By `p_holm` at 5%.
    """

    metric: str
    protocol: str
    test: Literal["exact McNemar", "paired bootstrap"]
    items: int
    only_a: int
    only_b: int
    a: float
    b: float
    difference: float
    stderr: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    a_alone: int | None
    b_alone: int | None
    p: float | None
    p_holm: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Pairing:
    """All comparisons of two sides.

    Attributes:
        pooled: A metric on the questions of all its tasks together, where it has several; a
            question counts alike, whatever its task. Corrected among themselves.
        unmatched: Protocols that have no item in both, with the items of A and of B.
        uncompared: `metric protocol` of values that are neither 0 or 1 nor losses, or NaN.
    """

    comparisons: tuple[Comparison, ...]
    pooled: tuple[Comparison, ...] = ()
    unmatched: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    uncompared: tuple[str, ...] = ()


def read_sides(path: Path) -> tuple[Side, Side]:
    """Read the samples of a result: its pruned model, and the dense one.

    Raises:
        MissingResource: The run logged none.
        IncompatibleData: The file is damaged, or holds an item twice.
    """
    samples = read_samples(path)
    pruned: dict[Key, Mapping[str, float]] = {}
    dense: dict[Key, Mapping[str, float]] = {}
    for sample in samples:
        key = (sample.protocol, sample.item, sample.sha256)
        if key in pruned:
            raise IncompatibleData(
                f"{samples_path(path)} is damaged",
                where=f"item {sample.item} of {sample.protocol} is there twice",
                fix="restore the file, or repeat the run with --log-samples",
            )
        pruned[key], dense[key] = sample.values, sample.dense_values
    return Side(path.stem, pruned), Side(f"dense of {path.stem}", dense)


def pair(
    a: Side,
    b: Side,
    *,
    lower_is_better: frozenset[str] = frozenset(),
    metrics: Sequence[str] = ("*",),
    protocols: Sequence[str] = ("*",),
) -> Pairing:
    """Compare two sides under every metric and protocol that both have, and correct for them all.

    Args:
        a: One model.
        b: The other.
        lower_is_better: Metrics with values of 0 or 1 of which fewer are better.
        metrics: Names or patterns of the metrics to compare.
        protocols: The same of the protocols.

    Raises:
        MissingResource: No metric and protocol that both have is selected.
        IncompatibleData: They share no item.
    """
    shared = _shared(a, b)
    sizes = {
        protocol: (_count(a, protocol), _count(b, protocol))
        for protocol in sorted({key[0] for side in (a, b) for key in side.items})
    }
    rows, there, uncompared = [], [], []
    tasks: dict[str, list[tuple[Comparison, list[tuple[float, float]]]]] = {}
    for protocol, keys in shared.items():
        only = (sizes[protocol][0] - len(keys), sizes[protocol][1] - len(keys))
        for metric, pairs in _pairs(a, b, keys).items():
            name = _PERPLEXITY if metric == _LOSS else metric
            there.append(f"{name} {protocol}")
            names = (protocol, short_protocol(protocol))
            if not (_matches(name, metrics) and any(_matches(n, protocols) for n in names)):
                continue
            row = _compared(metric, protocol, pairs, lower_is_better=metric in lower_is_better)
            if row is None:
                uncompared.append(f"{metric} {protocol}")
            else:
                row = replace(row, only_a=only[0], only_b=only[1])
                rows.append(row)
                if row.test == "exact McNemar":
                    tasks.setdefault(metric, []).append((row, pairs))
    if not rows and not uncompared:
        raise MissingResource(
            "nothing is selected",
            where=f"both have {'; '.join(there) or 'no metric in common'}",
            fix="leave metric= or protocol= out, or choose from these",
        )
    unmatched = {protocol: size for protocol, size in sizes.items() if protocol not in shared}
    pooled = tuple(correct(_pooled(tasks, lower_is_better)))
    return Pairing(tuple(correct(rows)), pooled, unmatched, tuple(uncompared))


def _shared(a: Side, b: Side) -> dict[str, list[Key]]:
    """Return the items that both have, by protocol."""
    shared: dict[str, list[Key]] = {}
    # sorted: the bootstrap draws by position, so the order of the files must not matter
    for key in sorted(a.items.keys() & b.items.keys()):
        shared.setdefault(key[0], []).append(key)
    if not shared:
        raise IncompatibleData(
            "the two share no item: nothing can be compared",
            where=f"A has {_protocols(a)}; B has {_protocols(b)}",
            fix="run both with the same --ppl and --tasks, and --log-samples",
        )
    return shared


def _pooled(
    tasks: Mapping[str, Sequence[tuple[Comparison, list[tuple[float, float]]]]],
    lower_is_better: frozenset[str],
) -> list[Comparison]:
    """Return the tests of all questions together, of the metrics that several tasks have."""
    return [
        replace(
            _tested(
                metric, f"{len(of_metric)} tasks", [p for _, pairs in of_metric for p in pairs],
                lower_is_better=metric in lower_is_better,
            ),
            only_a=sum(row.only_a for row, _ in of_metric),
            only_b=sum(row.only_b for row, _ in of_metric),
        )
        for metric, of_metric in tasks.items() if len(of_metric) > 1
    ]  # fmt: skip


def _compared(
    metric: str, protocol: str, pairs: list[tuple[float, float]], *, lower_is_better: bool
) -> Comparison | None:
    """Return the test that fits the values; None where there is none for them."""
    values = {value for pair_values in pairs for value in pair_values}
    # a NaN fails both tests: the scores of a broken model are listed as uncompared
    if metric == _LOSS and all(map(math.isfinite, values)):
        return _bootstrapped(protocol, pairs)
    if values <= {0.0, 1.0}:
        return _tested(metric, protocol, pairs, lower_is_better=lower_is_better)
    return None


def _pairs(a: Side, b: Side, keys: Sequence[Key]) -> dict[str, list[tuple[float, float]]]:
    """Return the values of both, item by item, of every metric that all items have in both."""
    # a metric that some item lacks would be compared on other items than the rest
    metrics = set.intersection(*(set(side.items[key]) for side in (a, b) for key in keys))
    return {
        metric: [(a.items[key][metric], b.items[key][metric]) for key in keys]
        for metric in sorted(metrics)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _count(side: Side, protocol: str) -> int:
    return sum(key[0] == protocol for key in side.items)


def _protocols(side: Side) -> str:
    return ", ".join(sorted({key[0] for key in side.items})) or "no items"


def _tested(
    metric: str, protocol: str, pairs: Sequence[tuple[float, float]], *, lower_is_better: bool
) -> Comparison:
    # values are 0 or 1: a > b is an item that only A got right
    a_alone = sum(a > b for a, b in pairs)
    b_alone = sum(b > a for a, b in pairs)
    difference, stderr = _difference(pairs)
    return Comparison(
        metric=metric,
        protocol=protocol,
        test="exact McNemar",
        items=len(pairs),
        only_a=0,
        only_b=0,
        a=statistics.fmean(a for a, _ in pairs),
        b=statistics.fmean(b for _, b in pairs),
        difference=difference,
        stderr=stderr,
        ratio=None,
        ratio_low=None,
        ratio_high=None,
        a_alone=a_alone,
        b_alone=b_alone,
        p=mcnemar(a_alone, b_alone),
        p_holm=None,
        # the direction only: `correct` has the last word once all p are known
        verdict=_better(a_alone < b_alone if lower_is_better else a_alone > b_alone),
    )


def _bootstrapped(protocol: str, pairs: Sequence[tuple[float, float]]) -> Comparison:
    difference, stderr = _difference(pairs)
    enough = len(pairs) >= MIN_WINDOWS
    low, high, p = bootstrap([a - b for a, b in pairs]) if enough else (None, None, None)
    return Comparison(
        metric=_PERPLEXITY,
        protocol=protocol,
        test="paired bootstrap",
        items=len(pairs),
        only_a=0,
        only_b=0,
        # PPL = exp(mean loss); all windows have as many targets, so means may be averaged
        a=_exp(statistics.fmean(a for a, _ in pairs)),
        b=_exp(statistics.fmean(b for _, b in pairs)),
        difference=difference,
        stderr=stderr,
        ratio=_exp(difference),  # PPL_A / PPL_B = exp(loss_A - loss_B)
        ratio_low=None if low is None else _exp(low),
        ratio_high=None if high is None else _exp(high),
        a_alone=None,
        b_alone=None,
        p=p,
        p_holm=None,
        verdict=_better(difference < 0),
    )


def _better(a_is_better: bool) -> Verdict:
    return "A better" if a_is_better else "B better"


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond it a float overflows; no model is that bad


def _difference(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """Return the mean of the differences and its standard error."""
    differences = [a - b for a, b in pairs]
    if len(differences) < 2:
        return differences[0], None
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), stderr


def mcnemar(a_alone: int, b_alone: int) -> float:
    """Return the two-sided exact p of McNemar's test, in exact arithmetic up to the division.

    Args:
        a_alone: Items that only A got right.
        b_alone: Items that only B got right.
    """
    discordant, fewer = a_alone + b_alone, min(a_alone, b_alone)
    term, tail = 1, 0  # the binomial coefficients of `discordant`, and their sum
    for count in range(fewer + 1):
        tail += term
        # C(n, k + 1) = C(n, k) (n - k) / (k + 1), without a remainder
        term = term * (discordant - count) // (count + 1)
    # p = 2 sum_{k <= fewer} C(n, k) / 2^n; at equal counts both tails hold the middle term,
    # which gives more than 1
    return min(1.0, 2 * tail / (1 << discordant))


def bootstrap(
    differences: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Resample the mean of paired differences; see the module for the rule.

    Args:
        differences: One a window, A minus B.
        resamples: Number of draws.
        seed: Of the generator: equal inputs give equal outputs, and A and B swapped mirror them.

    Returns:
        Both ends of the 95% interval of the mean, and the two-sided p that it is zero.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK_RESAMPLES):
        rows = min(_CHUNK_RESAMPLES, resamples - start)
        drawn = generator.integers(values.size, size=(rows, values.size))  # [rows, windows]
        means[start : start + rows] = values[drawn].mean(axis=1)  # [rows]
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    # never 0: 10,000 draws cannot show a p below 2e-4
    smaller = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (smaller + 1) / (resamples + 1))


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Fill in the p values corrected by Holm's method, and the verdicts that follow from them."""
    tested = sorted(
        (row.p, index) for index, row in enumerate(comparisons) if row.p is not None
    )  # smallest first
    rows = [
        replace(row, verdict="too few windows") if row.p is None else row for row in comparisons
    ]
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        # Holm: the i-th smallest of m is multiplied by m - i + 1, and no corrected p is
        # smaller than the one before it
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        row = replace(rows[index], p_holm=largest)
        rows[index] = row if largest < LEVEL else replace(row, verdict="within noise")
    return rows
