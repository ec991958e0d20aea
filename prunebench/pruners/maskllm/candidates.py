"""The masks that a group of M weights can have, and how to get from masks to choices."""

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
"""Candidates a group that can be learned: those of 4:8. A logit each is kept for every group."""


def require_learnable(sparsity: Sparsity) -> None:
    """Refuse what has no candidates, or too many.

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
    """Return all masks of `group` weights that keep `kept`, as 0 and 1: (choices, group).

    The first keeps the first `kept` weights, the last the last ones.
    """
    rows = torch.zeros(math.comb(group, kept), group)
    for row, places in zip(rows, itertools.combinations(range(group), kept), strict=True):
        row[list(places)] = 1
    return rows


def choose(
    keep: Bool[Tensor, "out in"], table: Float[Tensor, "choices group"]
) -> Integer[Tensor, " groups"]:
    """Return the candidate of every group of a keep mask, uint8.

    A group that keeps fewer than it may gets the first candidate that keeps them all.
    """
    groups = keep.reshape(-1, table.shape[1]).to(table.dtype)
    return (groups @ table.T).argmax(-1).to(torch.uint8)


def mask_of(
    choice: Integer[Tensor, " groups"], table: Float[Tensor, "choices group"], shape: torch.Size
) -> Bool[Tensor, "out in"]:
    """Return the keep mask of choices."""
    return (table > 0)[choice.long()].view(shape)
