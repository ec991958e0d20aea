"""Depth pruning: whole decoder blocks are removed (ShortGPT, Men et al. 2024, arXiv 2403.03853).

The block influence of block l says how much it turns the residual stream (their equation 1):

    BI_l = 1 - E_t [ x_l,t . x_l+1,t / (|x_l,t| |x_l+1,t|) ]

x_l,t is the hidden state of token t before block l, and x_l+1,t the one after it. The blocks with
the lowest influence are removed; nothing is trained and no other weight changes.

`order=one-shot` is the paper's: all are chosen from one pass of the dense model. `iterative` scores
the remaining blocks again after each removal, one pass each. `score=last` is a control without
data: the deepest blocks, but not the last one, which all papers find to be needed.

What we do differently: E is over all tokens of all calibration windows, each counted once. The
cosine is computed in float32 and summed in float64.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs
from prunebench.pruners.removal import BlockChoice, BlockRemover


@dataclass(frozen=True)
class Depth(BlockRemover):
    """Removes the blocks that change the residual stream least.

    Attributes:
        score: `influence`, or `last`: the deepest blocks but the last one, without data.
        order: `one-shot`: one pass chooses all blocks; `iterative`: one pass for each block.
    """

    score: Literal["influence", "last"] = "influence"
    order: Literal["one-shot", "iterative"] = "one-shot"

    def __post_init__(self) -> None:
        if self.score == "last" and self.order != "one-shot":
            raise ValueError("order=iterative scores blocks again, and score=last reads no data")

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Calibration windows, but for `score=last`."""
        return Needs(calibration=self.score == "influence")

    def passes(self, count: int) -> int:
        """Return how often the calibration set runs through the model."""
        return count if self.order == "iterative" else 1

    def choose_blocks(self, walker: BlockWalker, count: int) -> BlockChoice:
        """Return the blocks with the lowest influence, the lowest first; of equals the first."""
        if self.score == "last":
            return BlockChoice(_deepest(len(walker.blocks), count))
        if self.order == "one-shot":
            scores = block_influence(walker)
            return BlockChoice(tuple(sorted(scores, key=scores.__getitem__)[:count]), scores)
        removed: list[int] = []
        scores = {}
        for _ in range(count):
            # those that are removed keep the score that they were removed for
            scores |= (left := block_influence(walker, without=removed))
            removed.append(min(left, key=left.__getitem__))
        return BlockChoice(tuple(removed), dict(sorted(scores.items())))


def _deepest(depth: int, count: int) -> tuple[int, ...]:
    if count > depth - 1:
        raise UsageError(f"score=last keeps the last of {depth} blocks", fix="remove fewer blocks")
    return tuple(range(depth - 2, depth - 2 - count, -1))


def block_influence(walker: BlockWalker, *, without: Collection[int] = ()) -> dict[int, float]:
    """Return the influence of every block by index, in [0, 2].

    Args:
        walker: With calibration tokens.
        without: Blocks that are skipped, and have none.

    Raises:
        IncompatibleData: Hidden states are NaN or infinite.
    """
    scores: dict[int, float] = {}
    for index, batches in walker.residuals(without=without):
        total, tokens = 0.0, 0
        for before, after in batches:
            # [samples, seqlen, hidden] -> [samples, seqlen]
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            total += float(cosine.sum(dtype=torch.float64))
            tokens += cosine.numel()
        scores[index] = 1 - total / tokens
        if not torch.isfinite(torch.tensor(scores[index])):
            raise IncompatibleData(
                f"the hidden states after block {index} are NaN or infinite",
                where="the activations overflow on the calibration text",
                fix="use --dtype float32 or bfloat16, or check the weights",
            )
    return scores
