"""The contract of an allocator, its result, and the allocation file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from prunebench.errors import CheckFailed, IncompatibleData, UsageError
from prunebench.files import write_text
from prunebench.models.linears import Linear
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs
from prunebench.sparsity import Sparsity

_FORMAT = "prunebench-allocation"
_MEAN_TOLERANCE = 1e-6
_ROUNDING = 1e-5  # share of all weights that rounding each layer down may leave unpruned


@dataclass(frozen=True)
class Allocation:
    """A ratio for every layer.

    Attributes:
        ratios: Share of zeros of each linear, by name; in [0, 1).
        estimates: The allocator's figure of each layer (e.g. estimated error), if it has one.
        facts: Further figures for the result, e.g. a range that was chosen automatically.
    """

    ratios: Mapping[str, float]
    estimates: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Allocator(Protocol):
    """Chooses ratios; an implementation is a frozen dataclass whose fields are its options."""

    needs: ClassVar[Needs]

    def check(self, target: float) -> None:
        """Raise `UsageError`, before any work, if the target is out of reach."""

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Return a ratio for every linear of `walker`, with mean `target` over all weights.

        It must leave the weights unchanged.
        """


def mean_ratio(ratios: Mapping[str, float], linears: Sequence[Linear]) -> float:
    """Return the mean over all weights."""
    total = sum(linear.size for linear in linears)
    return math.fsum(ratios[linear.name] * linear.size for linear in linears) / total


def require_sound(allocation: Allocation, linears: Sequence[Linear], target: float) -> None:
    """Raise `CheckFailed` unless every layer has a ratio and their mean is the target."""
    ratios = allocation.ratios
    missing = [linear.name for linear in linears if linear.name not in ratios]
    outside = [name for name, ratio in ratios.items() if not 0 <= ratio < 1]
    wrong = missing or outside
    # With a layer missing there is no mean to compute.
    mean = target if wrong else mean_ratio(ratios, linears)
    if wrong or abs(mean - target) > _MEAN_TOLERANCE:
        raise CheckFailed(
            f"the allocation is not sound: {wrong[0]}" if wrong else f"its mean is {mean:.6f}",
            where="every layer needs a ratio in [0, 1), and the mean must be "
            f"{target:g} over all weights",
            fix="this is an error of the allocator, or of the allocation file",
        )


def layer_sparsities(
    sparsity: Sparsity, allocation: Allocation, linears: Sequence[Linear]
) -> dict[str, Sparsity]:
    """Return the sparsity of each layer; the total is `sparsity`, to 0.01% at any width."""
    if sparsity.is_pattern:
        return {linear.name: sparsity for linear in linears}
    ratios = whole_counts(allocation.ratios, linears, sparsity.ratio)
    return {linear.name: sparsity.with_ratio(ratios[linear.name]) for linear in linears}


def whole_counts(
    ratios: Mapping[str, float], linears: Sequence[Linear], target: float
) -> dict[str, float]:
    """Return the ratios, some raised by less than a weight, so that integer counts meet the target.

    A layer loses floor(size * ratio) weights. If the fractions of a weight that are rounded away
    add up to at most 1e-5 of all weights (layers of ordinary size), the ratios are returned
    unchanged. Otherwise (tiny layers) the layers with the largest fractions lose one weight more,
    of equal ones the earlier layer, until the total is exact. No layer loses all of its weights.
    """
    sizes = {linear.name: linear.size for linear in linears}
    total = sum(sizes.values())
    counts = {name: Sparsity(ratios[name]).count(size) for name, size in sizes.items()}
    missing = Sparsity(target).count(total) - sum(counts.values())
    if missing <= total * _ROUNDING:
        return dict(ratios)
    fraction = {name: ratios[name] * size - counts[name] for name, size in sizes.items()}
    # A layer that would lose all of its weights is not raised.
    spare = [name for name, size in sizes.items() if counts[name] + 1 < size]
    order = sorted(spare, key=lambda name: -fraction[name])  # stable
    raised = {name: _ratio_of(counts[name] + 1, sizes[name]) for name in order[:missing]}
    return {**ratios, **raised}


def _ratio_of(count: int, size: int) -> float:
    """Return the smallest ratio for which `Sparsity.count` is `count`."""
    ratio = count / size  # rounding may put it just below
    # At most a few steps: each moves to the next float.
    while Sparsity(ratio).count(size) < count:
        ratio = math.nextafter(ratio, 1)
    return ratio


def shifted(
    ratios: Mapping[str, float], sizes: Mapping[str, int], *, target: float, low: float, high: float
) -> dict[str, float]:
    """Add one number to all ratios, within [low, high], so that their mean is exactly `target`.

    Raises:
        UsageError: The range cannot reach the mean.
    """
    require_range(low, high, target)
    total = sum(sizes.values())

    def at(shift: float) -> dict[str, float]:
        return {name: min(max(ratio + shift, low), high) for name, ratio in ratios.items()}

    # Continuous and rising in the shift, even where some ratios are at a bound: bisection applies.
    def mean(shift: float) -> float:
        return math.fsum(ratio * sizes[name] for name, ratio in at(shift).items()) / total

    return at(bisect(mean, target, -1.0, 1.0))


def bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return where a continuous rising function is `target`, to the last bit."""
    # 100 halvings: more than a float64 has bits, so the interval is down to neighbors.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def require_range(low: float, high: float, target: float) -> None:
    """Raise `UsageError` unless 0 <= low <= target <= high < 1."""
    if not 0 <= low <= high < 1:
        raise UsageError(
            f"the range [{low:g}, {high:g}] is not a range of ratios",
            where="an allocator's low and high must satisfy 0 <= low <= high < 1",
            fix="change --set allocation.low and allocation.high",
        )
    if not low <= target <= high:
        raise UsageError(
            f"the range [{low:g}, {high:g}] cannot reach the mean {target:g}",
            where="every layer would be above it, or every layer below",
            fix="change --set allocation.low and allocation.high, or give --set "
            "allocation.range=auto where the allocator has it",
        )


def save_allocation(path: Path, ratios: Mapping[str, float], linears: Sequence[Linear]) -> None:
    """Write an allocation as JSON: name, shape and ratio of every layer."""
    rows = [
        {
            "name": linear.name,
            "shape": [linear.out_features, linear.in_features],
            "ratio": ratios[linear.name],
        }
        for linear in linears
    ]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"format": _FORMAT, "version": 1, "mean": mean_ratio(ratios, linears)})
    write_text(path, f'{head[:-1]}, "layers": [\n  {lines}\n]}}\n')


def load_allocation(path: Path, linears: Sequence[Linear]) -> dict[str, float]:
    """Read an allocation and check it against the layers of a model.

    Raises:
        UsageError: The file cannot be read or is not an allocation.
        IncompatibleData: It belongs to another model: a name or a shape differs.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        rows = {
            row["name"]: (tuple(row["shape"]), float(row["ratio"])) for row in document["layers"]
        }
    except OSError as error:
        raise UsageError(f"cannot read the allocation {path}", where=str(error.strerror)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not an allocation",
            where=f"{type(error).__name__}: {error}",
            fix="use a file that --save-allocation wrote",
        ) from None
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        # Names alone do not tell two sizes of one architecture apart: shapes are compared as well.
        if linear.name not in rows or rows[linear.name][0] != shape:
            row = rows.get(linear.name)
            problem = f"it says {row[0]}" if row else "it has no such layer"
            raise IncompatibleData(
                f"{path} is an allocation for another model",
                where=f"{linear.name} is {shape} here, and {problem}",
                fix="use an allocation that was saved for this model",
            )
    # Both directions: a layer of the file that is not in the model is an error too.
    extra = sorted(rows.keys() - {linear.name for linear in linears})
    if extra:
        raise IncompatibleData(
            f"{path} is an allocation for another model",
            where=f"it has {extra[0]}, which this model does not have",
            fix="use an allocation that was saved for this model",
        )
    return {name: ratio for name, (_, ratio) in rows.items()}
