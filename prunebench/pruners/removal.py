"""The base class of methods that remove whole blocks: the weights that stay are not touched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import nn

from prunebench.errors import CheckFailed, UsageError
from prunebench.models.linears import find_blocks
from prunebench.models.removal import remove_blocks
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs, PruneReport
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class BlockChoice:
    """The blocks that a method chose.

    Attributes:
        blocks: Their indices, in the order in which they were chosen.
        scores: What was measured for each block, by index; the lowest goes first. Empty for a
            method that measures nothing.
    """

    blocks: tuple[int, ...]
    scores: Mapping[int, float] = field(default_factory=dict)


class BlockRemover(ABC):
    """A method that removes whole blocks. A sparsity is the share of the blocks, not of zeros."""

    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def choose_blocks(self, walker: BlockWalker, count: int) -> BlockChoice:
        """Choose `count` blocks; the model must not be changed here.

        Args:
            walker: Of the dense model; `walker.residuals()` gives the hidden states around each
                block, if `needs.calibration` is True.
            count: At least 1.
        """

    def passes(self, count: int) -> int:
        """Return how often the calibration set runs through the model, for the progress bar."""
        return 1

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Remove the blocks that `choose_blocks` chooses, and return what is gone.

        Raises:
            UsageError: The sparsity is N:M, or removes no block or all.
            IncompatibleData: The architecture cannot lose these blocks.
            CheckFailed: Not the wanted number of blocks was chosen.
        """
        depth = len(walker.blocks)
        count = count_of_blocks(next(iter(sparsity.values())), depth)
        choice = self.choose_blocks(walker, count) if count else BlockChoice(())
        if len(set(choice.blocks)) != count or not set(choice.blocks) <= set(range(depth)):
            raise CheckFailed(
                f"{count} of {depth} blocks were to be chosen and were not",
                where=f"{type(self).__name__} chose {list(choice.blocks)}",
                fix="this is an error of the pruning method: see prunebench check",
            )
        tokens = walker.first_windows(1) if self.needs.calibration else None
        removal = remove_blocks(walker.model, choice.blocks, tokens)
        return PruneReport(removal=removal, block_scores=dict(choice.scores))


def require_removed_only(smaller: nn.Module, dense: nn.Module, sparsity: Sparsity) -> None:
    """Raise `CheckFailed` unless blocks are gone and every parameter that stays is what it was."""
    (prefix, dense_blocks), (_, blocks) = find_blocks(dense), find_blocks(smaller)
    wanted = len(dense_blocks) - count_of_blocks(sparsity, len(dense_blocks))
    if len(blocks) != wanted:
        raise _not_only(f"{len(blocks)} of {len(dense_blocks)} blocks are left, not {wanted}")
    left = iter(dense_blocks)
    for index, block in enumerate(blocks):
        # `any` moves the iterator on: the blocks that stay are in their old order
        if not any(_equal(block, other) for other in left):
            raise _not_only(f"{prefix}.{index} is no block of the dense model, in its order")
    parameters = dict(smaller.named_parameters())
    for name, parameter in dense.named_parameters():
        outside = not name.startswith(f"{prefix}.")
        if outside and not torch.equal(parameters[name], parameter):
            raise _not_only(f"{name} is in no block, and changed")


def _equal(block: nn.Module, other: nn.Module) -> bool:
    pairs = zip(block.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(left, right) for (a, left), (b, right) in pairs)


def _not_only(reason: str) -> CheckFailed:
    return CheckFailed("the method did not only remove blocks", where=reason)


def require_ratio(sparsity: Sparsity) -> None:
    """Raise `UsageError` for N:M: blocks have no groups of weights."""
    if sparsity.is_pattern:
        raise UsageError(
            f"sparsity {sparsity} is a pattern, and whole blocks are removed",
            where="the sparsity of such a method is the share of the blocks",
            fix="use a ratio such as --sparsity 0.2",
        )


def count_of_blocks(sparsity: Sparsity, depth: int) -> int:
    """Return how many of `depth` blocks are removed: the nearest number, a half is rounded up.

    Raises:
        UsageError: The sparsity is N:M, or removes no block or all.
    """
    require_ratio(sparsity)
    # the ratio as the decimal that it prints as, see `Sparsity.count`
    count = math.floor(Fraction(repr(sparsity.ratio)) * depth + Fraction(1, 2))
    if (sparsity.ratio and not count) or count == depth:
        raise UsageError(
            f"sparsity {sparsity} removes {'all' if count else 'none'} of {depth} blocks",
            where="the sparsity is the share of the blocks that are removed",
            fix=f"use --sparsity {1 / depth:.2g} to {(depth - 1) / depth:.2g}, or 0",
        )
    return count
