"""OWL and DLP: one ratio per block, from the block's Wanda scores A = |W_ij| ||X_j||.

Papers: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", https://arxiv.org/abs/2310.05175;
Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models",
https://arxiv.org/abs/2505.23807. Both take the scores of the dense model from one pass and
spread the blocks' ratios linearly over a range of 2 * `strength`.

- OWL: importance = share of scores above `outlier` times the block's mean score.
- DLP: importance = 1 - (the block's median score) / (the sum over blocks). The paper says median,
  the authors' public code takes the mean: `statistic` offers both.

What differs from the code of both: the mean ratio is exact over weights, not over blocks (they are
the same where all blocks have one size), and so are the zeros (theirs round each row down, 0.06% of
SmolLM2-135M's weights at 70%); a ratio stays within [0, 0.99].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunebench.allocators.allocation import Allocation, require_range, shifted
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs

_HIGHEST = 0.99


class _Blockwise(ABC):
    """Computes a figure per block of the dense model and spreads the ratios accordingly."""

    needs: ClassVar[Needs] = Needs(calibration=True)
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 0.5:
            raise ValueError("strength must be in [0, 0.5)")

    @abstractmethod
    def importance(self, scores: list[Tensor]) -> float:
        """Return the figure of a block from the Wanda scores of its linears, flat tensors."""

    def spread(self, figures: Mapping[int, float]) -> dict[int, float]:
        """Return what is subtracted from each block's ratio, in [0, 2 * strength]."""
        low, high = min(figures.values()), max(figures.values())
        # 1.0 where all blocks are equal: every offset is then 0.
        width = (high - low) or 1.0
        # Both papers: d = 2 lambda (D - min D) / (max D - min D), and the ratio is p - d + mean(d).
        return {b: 2 * self.strength * (f - low) / width for b, f in figures.items()}

    def check(self, target: float) -> None:
        """Accept any ratio: outside [0, 0.99] it is clipped, and compensated in other blocks."""
        require_range(0.0, max(_HIGHEST, target), target)

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Return one ratio per block."""
        figures: dict[int, float] = {}
        scores: list[Tensor] = []
        last: int | None = None
        for group in walker.survey():
            assert group.stats is not None
            index = group.linears[0].block_index
            # Groups come block by block: the scores of one block only are in memory.
            if last is not None and index != last:
                figures[last] = self.importance(scores)
                scores = []
            last = index
            norms = group.stats.norms()  # [in]
            scores += [(linear.read().abs() * norms).flatten() for linear in group.linears]
        assert last is not None
        figures[last] = self.importance(scores)
        offsets = self.spread(figures)
        sizes = {linear.name: linear.size for linear in walker.linears}
        # More important blocks have larger offsets, and so lower ratios.
        ratios = {linear.name: target - offsets[linear.block_index] for linear in walker.linears}
        estimates = {linear.name: figures[linear.block_index] for linear in walker.linears}
        # all offsets are >= 0: the shift restores the mean
        exact = shifted(ratios, sizes, target=target, low=0.0, high=max(_HIGHEST, target))
        return Allocation(exact, estimates)


@dataclass(frozen=True)
class Owl(_Blockwise):
    """Prunes blocks with many outliers less.

    Attributes:
        strength: Half of the range of the ratios (lambda; 0.08 in the paper).
        outlier: Threshold of an outlier in units of the block's mean score (M; 5 in the paper).
    """

    strength: float = 0.08
    outlier: float = 5.0

    def importance(self, scores: list[Tensor]) -> float:
        """Return the percentage of outliers."""
        count = sum(score.numel() for score in scores)
        # Sums by linear, not one concatenated copy of the block's scores.
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
        # D = 100 * #{A > M mean(A)} / numel, the mean over the whole block (arXiv 2310.05175)
        return 100 * sum(int((score > self.outlier * mean).sum()) for score in scores) / count


@dataclass(frozen=True)
class Dlp(_Blockwise):
    """Prunes blocks with low typical scores less.

    Attributes:
        strength: Half of the range of the ratios (alpha; 0.15 at 70%, 0.1 at 60% in the paper).
        statistic: Statistic of a block's scores.
    """

    strength: float = 0.15
    statistic: Literal["median", "mean"] = "median"

    def importance(self, scores: list[Tensor]) -> float:
        """Return the median or mean score."""
        flat = torch.cat(scores)  # [weights of the block]
        # torch's median is the lower of the two middle values; of millions of scores it makes no
        # difference.
        return float(flat.median() if self.statistic == "median" else flat.mean())

    def spread(self, figures: Mapping[int, float]) -> dict[int, float]:
        """Return the spread of the importance 1 - figure / sum; none where all figures are 0."""
        # the median of a checkpoint that is half zeros already
        total = sum(figures.values()) or 1.0
        return super().spread({b: 1 - f / total for b, f in figures.items()})
