"""Wanda: prune by weight times input norm, compared over each output row.

Paper: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
https://arxiv.org/abs/2306.11695, equation 1: S_ij = |W_ij| * ||X_j||_2.
Original code: https://github.com/locuslab/wanda (commit 8e8fc87), read for its conventions.

What differs from it: statistics are summed in float64 and shared by linears with one input; a row
loses exactly floor(in * ratio) weights; N of N:M counts kept weights; an input that no calibration
token reached (an expert never chosen) falls back to magnitude and is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.pruners.keep import keep_rows
from prunebench.pruners.layer import LayerPruner, Needs
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
        if stats is not None and stats.tokens:
            score = score * stats.norms()
        return torch.where(keep_rows(score, sparsity), weight, 0)
