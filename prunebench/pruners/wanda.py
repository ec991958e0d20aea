"""Wanda: prune by weight times input norm, compared over each output row.

Paper: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
https://arxiv.org/abs/2306.11695, equation 1: S_ij = |W_ij| * ||X_j||_2.
Original code: https://github.com/locuslab/wanda (commit 8e8fc87), read for its conventions.

What differs from it: statistics are summed in float64 and shared by linears with one input; a row
loses floor(in * ratio) weights as theirs do, and then some rows one more, so that the matrix loses
floor(out * in * ratio) (`keep.keep_rows`); N of N:M counts kept weights; an input that no
calibration token reached (an expert never chosen) falls back to magnitude and is reported.

`WandaVariant` is their `--use_variant`, a row of its own: output rows lose their smallest scores
up to the same share of the row's sum. They search that share by bisection to within 0.001 of the
ratio; here each weight has the share that would just prune it, and the whole matrix is compared by
it, so the count is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.pruners.keep import keep_matrix, keep_rows
from prunebench.pruners.layer import LayerPruner
from prunebench.pruners.protocol import Needs
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Wanda(LayerPruner):
    """Prunes each output row (or N:M group) by |W| times the norm of the inputs."""

    needs: ClassVar[Needs] = Needs(calibration=True)

    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return `weight` with the lowest scores of each row zero."""
        score = weight.abs()
        # Without a token all norms are 0, and so would be all scores.
        if stats is not None and stats.tokens:
            # S_ij = |W_ij| * ||X_j||_2, arXiv 2306.11695, equation 1. [out, in] * [in]
            score = score * stats.norms()
        return torch.where(self.keep(score, sparsity), weight, 0)

    def keep(self, score: Float[Tensor, "out in"], sparsity: Sparsity) -> Bool[Tensor, "out in"]:
        """Return the keep mask: the scores are compared within each output row or N:M group."""
        return keep_rows(score, sparsity)


@dataclass(frozen=True)
class WandaVariant(Wanda):
    """Wanda where rows lose an equal share of their score, not an equal number of weights.

    N:M is not affected.
    """

    def keep(self, score: Float[Tensor, "out in"], sparsity: Sparsity) -> Bool[Tensor, "out in"]:
        """Return the keep mask: compare, over the matrix, cumulative shares of the row's score."""
        if sparsity.is_pattern:
            return keep_rows(score, sparsity)
        # float64: the rounding errors of a running sum grow with the width.
        ordered, places = score.to(torch.float64).sort(dim=1, stable=True)  # [out, in]
        shares = ordered.cumsum(1)  # of the row's score: a weight and all smaller ones
        shares /= shares[:, -1:].clamp(min=1e-300)  # [out, in]; the last is the row's sum
        shares = torch.empty_like(shares).scatter_(
            1, places, shares
        )  # back in the order of the inputs
        return keep_matrix(shares, sparsity)
