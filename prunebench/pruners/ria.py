"""RIA: relative importance of a weight in its row and its column, times a power of the input norm.

Paper: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF:

    S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ^ power

with power 0.5, compared over each output row. Their channel permutation for N:M is not included:
the order of the columns does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.pruners.keep import keep_rows
from prunebench.pruners.layer import LayerPruner
from prunebench.pruners.protocol import Needs
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Ria(LayerPruner):
    """Prunes each output row (or N:M group) by relative importance.

    Attributes:
        power: Exponent of the input norm.
    """

    needs: ClassVar[Needs] = Needs(calibration=True)
    power: float = 0.5

    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return `weight` with the lowest scores of each row zero."""
        size = weight.abs()
        # An all-zero row or column divides 0 by this, not by 0: its scores are 0, not NaN.
        tiny = torch.finfo(size.dtype).tiny
        of_column = size / size.sum(0, keepdim=True).clamp(min=tiny)  # sums [1, in]
        of_row = size / size.sum(1, keepdim=True).clamp(min=tiny)  # sums [out, 1]
        score = of_column + of_row  # [out, in]
        if stats is not None and stats.tokens:
            score = score * stats.norms() ** self.power
        return torch.where(keep_rows(score, sparsity), weight, 0)
