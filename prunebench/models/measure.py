"""Count the zeros after pruning, and check them against the requested sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunebench.errors import CheckFailed
from prunebench.models.linears import Linear, find_blocks
from prunebench.models.removal import Removal
from prunebench.models.weight_grid import WeightGrid, count_off_grid
from prunebench.sparsity import Sparsity

_TOLERANCE = 1e-4  # allowed difference from the requested sparsity, as a share of the weights


@dataclass(frozen=True)
class Measured:
    """Counts of one matrix.

    Attributes:
        linear: The matrix.
        zeros: Weights that are 0.
        negative_zeros: Those of them that are -0.0.
        violations: N:M groups with more than N non-zeros.
        off_grid: Groups of quantized weights with values that their grid does not have.
    """

    linear: Linear
    zeros: int
    negative_zeros: int
    violations: int
    off_grid: int = 0


def measure_linear(linear: Linear, sparsity: Sparsity, grid: WeightGrid | None = None) -> Measured:
    """Count zeros, the groups that break `sparsity`, and those that leave `grid`."""
    weight = linear.weight  # [out, in]
    zero = weight == 0
    negative = int((zero & torch.signbit(weight)).count_nonzero())
    violations = 0
    if sparsity.group is not None and sparsity.kept is not None:
        violations = count_violations(zero, kept=sparsity.kept, group=sparsity.group)
    off_grid = count_off_grid(weight, grid) if grid else 0
    return Measured(linear, int(zero.count_nonzero()), negative, violations, off_grid)


def count_violations(zero: Tensor, *, kept: int, group: int) -> int:
    """Count groups of `group` consecutive inputs with more than `kept` non-zeros.

    Args:
        zero: (out, in), True where the weight is zero; `group` divides `in`.
        kept: N of N:M.
        group: M of N:M.
    """
    groups = zero.reshape(zero.shape[0], -1, group)  # [out, groups, M]
    # At most N non-zeros is at least M - N zeros. A sum of bools would be int64 by default.
    return int((groups.sum(-1, dtype=torch.int32) < group - kept).count_nonzero())


def count_sparser_groups(weight: Tensor, sparsity: Sparsity) -> int:
    """Count the groups of N:M that hold fewer than N non-zeros; 0 for a ratio.

    Args:
        weight: (out, in).
        sparsity: The pattern, whose M divides `in`.
    """
    if sparsity.group is None or sparsity.kept is None:
        return 0
    groups = (weight != 0).reshape(weight.shape[0], -1, sparsity.group)  # [out, groups, M]
    return int((groups.sum(-1, dtype=torch.int32) < sparsity.kept).count_nonzero())


def require_met(
    after: Sequence[Measured],
    before: Mapping[str, int],
    requested: Mapping[str, Sparsity],
    *,
    beyond: Mapping[str, int] | None = None,
) -> None:
    """Raise unless every matrix has its requested sparsity.

    N:M must hold in every group, and a ratio to one weight of the matrix, whatever groups of
    weights a method compares. More zeros than requested are allowed where the dense weight had
    them, where the method reports them, and up to 0.01% (a weight may round to 0).

    Args:
        after: The pruned matrices.
        before: Zeros of each dense matrix, by name.
        requested: Sparsity of each matrix, by name.
        beyond: Additional zeros that the method reports, by name.

    Raises:
        CheckFailed: A matrix has another sparsity; the message gives its name and counts.
    """
    for measured in after:
        linear, zeros = measured.linear, measured.zeros
        sparsity = requested[linear.name]
        target = sparsity.count(linear.size)
        allowed = before[linear.name] + (beyond or {}).get(linear.name, 0)
        too_few = zeros < target - 1
        # N:M bounds the non-zeros of a group from above: more zeros do not break it.
        too_many = not sparsity.is_pattern and zeros > target + _slack(linear.size) + allowed
        if measured.violations or too_few or too_many:
            broken = f"{measured.violations} groups break it, " if measured.violations else ""
            raise CheckFailed(
                f"{linear.name} was to be pruned to {sparsity} and is not",
                where=f"{broken}{zeros:,} of {linear.size:,} weights are zero, not {target:,}",
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

    Every layer rounds to a whole weight; this check shows that the rounding errors do not add up.

    Args:
        after: The pruned matrices.
        before: Zeros of each dense matrix, by name.
        target: Sparsity of the whole model.
        beyond: Additional zeros that the method reports, by name.

    Raises:
        CheckFailed: The share of zeros differs.
    """
    total = sum(measured.linear.size for measured in after)
    zeros, count = sum(measured.zeros for measured in after), target.count(total)
    allowed = sum(before.values()) + sum((beyond or {}).values())
    # Zeros of the dense model may or may not be among the pruned ones: allowed, not required.
    if not count - _slack(total) <= zeros <= count + _slack(total) + allowed:
        raise CheckFailed(
            f"the model was to be pruned to {target} and is not",
            where=f"{zeros:,} of {total:,} weights are zero ({zeros / total:.3%}), not {count:,}",
            fix="this is an error of the allocation: its ratios do not add up to the target",
        )


def require_on_grid(after: Sequence[Measured], grid: WeightGrid) -> None:
    """Raise unless every group of every matrix holds only values of its grid.

    Raises:
        CheckFailed: A matrix holds others; the message gives its name and how many groups do.
    """
    for measured in after:
        linear = measured.linear
        if measured.off_grid:
            groups = grid.groups(linear.out_features, linear.in_features)
            raise CheckFailed(
                f"{linear.name} was to be rounded to {grid.bits} bits and is not",
                where=f"{measured.off_grid:,} of {groups:,} groups hold other values than a step "
                f"times integers of {grid.bits} bits",
                fix="this is an error of the method: see prunebench check",
            )


def require_removed(
    after: Sequence[Measured], before: Mapping[str, int], removal: Removal, model: nn.Module
) -> None:
    """Raise unless exactly the removed blocks are gone, and the others have the zeros they had.

    Args:
        after: The matrices that are left.
        before: Zeros of each dense matrix, by name.
        removal: What the method says that it removed.
        model: The smaller model.

    Raises:
        CheckFailed: The model has other blocks, or zeros that the dense one did not have.
    """
    prefix, blocks = find_blocks(model)
    stay = [index for index in range(removal.blocks_before) if index not in removal.blocks]
    if len(blocks) != len(stay):
        raise CheckFailed(
            f"{len(removal.blocks)} of {removal.blocks_before} blocks were to be removed",
            where=f"{len(blocks)} are left",
            fix="this is an error of the pruning method: see prunebench check",
        )
    for measured in after:
        linear = measured.linear
        inside = linear.name.removeprefix(f"{prefix}.{linear.block_index}")
        name = f"{prefix}.{stay[linear.block_index]}{inside}"
        if measured.zeros != before[name]:
            raise CheckFailed(
                f"{linear.name} was to stay as it was and did not",
                where=f"it has {measured.zeros:,} zeros, and had {before[name]:,} as {name}",
                fix="this is an error of the pruning method: see prunebench check",
            )


def _slack(size: int) -> int:
    return max(1, int(size * _TOLERANCE))
