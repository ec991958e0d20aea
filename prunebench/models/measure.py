"""What the weights show after pruning: counted, not assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunebench.errors import CheckFailed
from prunebench.models.linears import Linear
from prunebench.sparsity import Sparsity

_TOLERANCE = 1e-4  # "realised equals asked": share of the weights


@dataclass(frozen=True)
class Measured:
    """Counts of one matrix. `violations` are N:M groups with more than N non-zeros."""

    linear: Linear
    zeros: int
    negative_zeros: int
    violations: int


def measure_linear(linear: Linear, sparsity: Sparsity) -> Measured:
    """Count the zeros of a matrix, and the groups that break the pattern of `sparsity`."""
    stored = linear.stored
    weight = stored.T if linear.transposed else stored
    zero = weight == 0
    negative = int((zero & torch.signbit(weight)).sum())
    broken = 0
    if sparsity.group is not None and sparsity.kept is not None:
        broken = count_violations(zero, kept=sparsity.kept, group=sparsity.group)
    return Measured(linear, int(zero.sum()), negative, broken)


def count_violations(zero: Tensor, *, kept: int, group: int) -> int:
    """Count groups of `group` consecutive inputs with more than `kept` non-zeros.

    Args:
        zero: (out, in), True where the weight is zero; `group` divides `in`.
        kept: N of N:M.
        group: M of N:M.
    """
    groups = zero.reshape(zero.shape[0], -1, group)
    return int((groups.sum(-1, dtype=torch.int32) < group - kept).sum())


def count_sparser_groups(weight: Tensor, sparsity: Sparsity) -> int:
    """Count the groups of N:M that hold fewer than N non-zeros; 0 for a ratio.

    Args:
        weight: (out, in).
        sparsity: The pattern, whose M divides `in`.
    """
    if sparsity.group is None or sparsity.kept is None:
        return 0
    kept = (weight != 0).reshape(weight.shape[0], -1, sparsity.group).sum(-1, dtype=torch.int32)
    return int((kept < sparsity.kept).sum())


def require_met(
    after: Sequence[Measured],
    before: Mapping[str, int],
    requested: Mapping[str, Sparsity],
    *,
    beyond: Mapping[str, int] | None = None,
) -> None:
    """Raise unless every matrix has the sparsity that was asked for.

    N:M must hold in every group, and a ratio to one weight of the matrix: whatever a method
    compares with each other, its counts must add up. More zeros than asked are let pass where the
    dense weight had them, where the method has said so, and up to 0.01% (a weight may round to 0).

    Args:
        after: The pruned matrices.
        before: Zeros of each dense matrix, by name.
        requested: Sparsity of each matrix, by name.
        beyond: Zeros that the method says it made on top, by name.

    Raises:
        CheckFailed: A layer misses; it is named with what it has.
    """
    for one in after:
        linear, sparsity = one.linear, requested[one.linear.name]
        wanted = sparsity.count(linear.size)
        allowed = before[linear.name] + (beyond or {}).get(linear.name, 0)
        too_few = one.zeros < wanted - 1
        too_many = not sparsity.is_pattern and one.zeros > wanted + _slack(linear.size) + allowed
        if one.violations or too_few or too_many:
            found = f"{one.violations} groups break it, " if one.violations else ""
            raise CheckFailed(
                f"{linear.name} was to be pruned to {sparsity} and is not",
                where=f"{found}{one.zeros:,} of {linear.size:,} weights are zero, not {wanted:,}",
                fix="this is an error of the pruning method: see prunebench check",
            )


def require_total(
    after: Sequence[Measured],
    before: Mapping[str, int],
    target: Sparsity,
    *,
    beyond: Mapping[str, int] | None = None,
) -> None:
    """Raise unless all matrices together have the target's share of zeros, to 0.01%.

    Every layer may round to a whole weight; this is what shows that the roundings do not add up.

    Raises:
        CheckFailed: They have another share.
    """
    total = sum(one.linear.size for one in after)
    zeros, wanted = sum(one.zeros for one in after), target.count(total)
    allowed = sum(before.values()) + sum((beyond or {}).values())
    if not wanted - _slack(total) <= zeros <= wanted + _slack(total) + allowed:
        raise CheckFailed(
            f"the model was to be pruned to {target} and is not",
            where=f"{zeros:,} of {total:,} weights are zero ({zeros / total:.3%}), not {wanted:,}",
            fix="this is an error of the allocation: its ratios do not add up to the target",
        )


def _slack(size: int) -> int:
    return max(1, int(size * _TOLERANCE))
