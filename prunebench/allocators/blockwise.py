"""OWL and DLP: one ratio a block, from the block's Wanda scores A = |W_ij| ||X_j||.

Papers: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", https://arxiv.org/abs/2310.05175;
Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models",
https://arxiv.org/abs/2505.23807. Both take the scores of the dense model from one pass and spread
the blocks' ratios linearly over a width of twice `strength`.

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
    """Scores every block of the dense model and spreads the ratios over them."""

    needs: ClassVar[Needs] = Needs(calibration=True)
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 0.5:
            raise ValueError("strength must be in [0, 0.5)")

    @abstractmethod
    def importance(self, scores: list[Tensor]) -> float:
        """Return a figure for one block from the Wanda scores of its linears."""

    def spread(self, figures: Mapping[int, float]) -> dict[int, float]:
        """Return how much less than the mean each block is pruned, in [0, 2 * strength]."""
        low, high = min(figures.values()), max(figures.values())
        width = (high - low) or 1.0
        return {b: 2 * self.strength * (f - low) / width for b, f in figures.items()}

    def check(self, target: float) -> None:
        """Accept any ratio: what lies outside [0, 0.99] is clipped and made up for elsewhere."""
        require_range(0.0, max(_HIGHEST, target), target)

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Return one ratio a block."""
        figures: dict[int, float] = {}
        scores: list[Tensor] = []
        last: int | None = None
        for group in walker.survey():
            assert group.stats is not None
            index = group.linears[0].block_index
            if last is not None and index != last:
                figures[last] = self.importance(scores)
                scores = []
            last = index
            scores += [(one.read().abs() * group.stats.norms()).flatten() for one in group.linears]
        assert last is not None
        figures[last] = self.importance(scores)
        kept = self.spread(figures)
        sizes = {one.name: one.size for one in walker.linears}
        ratios = {one.name: target - kept[one.block_index] for one in walker.linears}
        estimates = {one.name: figures[one.block_index] for one in walker.linears}
        exact = shifted(ratios, sizes, target=target, low=0.0, high=max(_HIGHEST, target))
        return Allocation(exact, estimates)


@dataclass(frozen=True)
class Owl(_Blockwise):
    """Prunes blocks with many outliers less.

    Attributes:
        strength: Half of the width of the ratios (lambda; 0.08 in the paper).
        outlier: How many times the mean score an outlier is (M; 5 in the paper).
    """

    strength: float = 0.08
    outlier: float = 5.0

    def importance(self, scores: list[Tensor]) -> float:
        """Return the percentage of outliers."""
        count = sum(one.numel() for one in scores)
        mean = sum(float(one.sum(dtype=torch.float64)) for one in scores) / count
        return 100 * sum(int((one > self.outlier * mean).sum()) for one in scores) / count


@dataclass(frozen=True)
class Dlp(_Blockwise):
    """Prunes blocks with low typical scores less.

    Attributes:
        strength: Half of the width of the ratios (alpha; 0.15 at 70%, 0.1 at 60% in the paper).
        statistic: What stands for a block's scores.
    """

    strength: float = 0.15
    statistic: Literal["median", "mean"] = "median"

    def importance(self, scores: list[Tensor]) -> float:
        """Return the median or mean score."""
        both = torch.cat(scores)
        return float(both.median() if self.statistic == "median" else both.mean())

    def spread(self, figures: Mapping[int, float]) -> dict[int, float]:
        """Return the spread of the importance 1 - figure / sum."""
        total = sum(figures.values())
        return super().spread({b: 1 - f / total for b, f in figures.items()})
