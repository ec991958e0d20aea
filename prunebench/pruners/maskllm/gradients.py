"""Gradients of the masked weights with the factors of their curvature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunebench.models.linears import Linear
from prunebench.pruners.maskllm.relaxation import WeightGradient
from prunebench.training.gradients import GradientSums
from prunebench.training.shards import Shards


class FactoredSums(GradientSums):
    """Accumulates dL/dW~ and the factors of the diagonal Fisher matrix.

    Attributes:
        owned: The sums of the step (or draw) so far, owned rows, by linear.
    """

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        super().__init__(shards, dtype)
        self.owned: dict[Linear, WeightGradient] = {}
        self._factors: dict[Linear, tuple[Tensor, Tensor]] = {}  # of the block: [out], [in]

    def fetch(self, linears: Sequence[Linear], *, scale: float) -> None:
        """Allocate the gradients of a block, which are multiplied by `scale` in the end."""
        super().fetch(linears, scale=scale)
        for linear in linears:
            device = linear.stored.device
            self._factors[linear] = (
                torch.zeros(linear.out_features, device=device),
                torch.zeros(linear.in_features, device=device),
            )

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add outer^T inputs, with dL/d(output) `outer` [tokens, out] and `inputs` [tokens, in]."""
        super().add_product(linear, outer, inputs)
        # Factors of the diagonal Fisher matrix: its exact diagonal would need a product of the
        # squares.
        rows, columns = self._factors[linear]
        rows.add_(outer.to(torch.float32).square().sum(0))
        columns.add_(inputs.to(torch.float32).square().sum(0))

    def _keep(self, linear: Linear, gradient: Tensor) -> None:
        rows, columns = self._factors.pop(linear)
        rows.mul_(self._scale**2)
        total = rows.sum() + columns.sum()
        self.total = self.total.to(total.device) + total
        rows = self._shards.sum_rows(rows[:, None])[:, 0]  # [rows]
        columns = self._shards.sum_all(columns)
        first = linear not in self.owned
        super()._keep(linear, gradient)
        if first:
            self.owned[linear] = WeightGradient(self.gradients[linear], rows, columns)
        else:
            self.owned[linear].rows.add_(rows)
            self.owned[linear].columns.add_(columns)

    def forget(self) -> None:
        """Drop the sums, but not the check for finite values: the end of a draw."""
        super().forget()
        self.owned = {}
