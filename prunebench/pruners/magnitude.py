"""Magnitude pruning: score |W|, compared over each matrix, no data, no update.

Paper: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626 (its layer-wise form, as the baseline of SparseGPT and Wanda).

What differs from the papers' code: exactly floor(out * in * ratio) weights are pruned, ties by
position; their threshold takes one weight more and all its ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.pruners.keep import keep_matrix
from prunebench.pruners.layer import LayerPruner
from prunebench.sparsity import Sparsity


def smallest_dropped(
    weight: Float[Tensor, "out in"], sparsity: Sparsity
) -> Float[Tensor, "out in"]:
    """Return `weight` with its smallest entries zero, over the matrix or in each N:M group.

    The fallback of methods that need calibration, for experts that no token reached.
    """
    return torch.where(keep_matrix(weight.abs(), sparsity), weight, 0)


@dataclass(frozen=True)
class Magnitude(LayerPruner):
    """Prunes the smallest weights of each matrix, or of each N:M group."""

    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return `weight` with its smallest entries zero."""
        return smallest_dropped(weight, sparsity)
