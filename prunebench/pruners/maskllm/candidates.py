"""The candidate masks of a group of M weights, and conversion between masks and choices."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from prunebench.errors import UsageError
from prunebench.sparsity import Sparsity

MOST = 70
"""Most candidates per group: those of 4:8. Every group has one logit per candidate."""


def require_learnable(sparsity: Sparsity) -> None:
    """Refuse a sparsity that has no candidates, or too many.

    Raises:
        UsageError: It is a ratio, or a pattern with more than `MOST` candidates.
    """
    if sparsity.kept is None or sparsity.group is None:
        raise UsageError(
            f"maskllm learns N:M masks, and {sparsity} is a ratio",
            fix="use a pattern such as --sparsity 2:4",
        )
    count = math.comb(sparsity.group, sparsity.kept)
    if count > MOST:
        raise UsageError(
            f"maskllm cannot learn {sparsity}",
            where=f"a group has {count:,} candidates, at most {MOST} are possible",
            fix="use 2:4, 1:4 or 4:8",
        )


@functools.cache
def candidates(kept: int, group: int) -> Float[Tensor, "choices group"]:
    """Return all masks of `group` weights that keep `kept` as a 0/1 matrix, [choices, M].

    In lexicographic order: the first row keeps the first `kept` weights, the last row the last.
    """
    rows = torch.zeros(math.comb(group, kept), group)
    for row, places in zip(rows, itertools.combinations(range(group), kept), strict=True):
        row[list(places)] = 1
    return rows


def choose(
    keep: Bool[Tensor, "out in"], table: Float[Tensor, "choices group"]
) -> Integer[Tensor, " groups"]:
    """Return the candidate of every group of a keep mask, uint8.

    A group that keeps fewer than N weights gets the first candidate that keeps all of them.
    """
    groups = keep.reshape(-1, table.shape[1]).to(table.dtype)  # [groups, M]
    # the largest overlap; argmax takes the first of equal ones
    return (groups @ table.T).argmax(-1).to(torch.uint8)  # [groups, choices] -> [groups]


def mask_of(
    choice: Integer[Tensor, " groups"], table: Float[Tensor, "choices group"], shape: torch.Size
) -> Bool[Tensor, "out in"]:
    """Return the keep mask of choices."""
    return (table > 0)[choice.long()].view(shape)  # [groups, M] -> [out, in]
