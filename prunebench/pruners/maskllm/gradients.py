"""The gradient of the loss with respect to the masked weights, summed over micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from prunebench.models.linears import Linear
from prunebench.pruners.maskllm.relaxation import WeightGradient
from prunebench.pruners.maskllm.shards import Shards


class GradientSums:
    """Accumulates dL/dW~: all rows for the block in the backward pass, then the owned rows only.

    Attributes:
        owned: The sums of the step (or draw) so far, owned rows, by linear.
        total: The sum of all elements added in this step; not finite if any element is not.
    """

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        self.owned: dict[Linear, WeightGradient] = {}
        self.total = torch.zeros(())
        self._shards = shards
        self._dtype = dtype
        self._whole: dict[Linear, WeightGradient] = {}

    def fetch(self, linears: Sequence[Linear]) -> None:
        """Allocate the gradients of a block."""
        for linear in linears:
            zeros = functools.partial(torch.zeros, device=linear.stored.device)
            self._whole[linear] = WeightGradient(
                zeros(linear.out_features, linear.in_features),
                zeros(linear.out_features),
                zeros(linear.in_features),
            )

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add outer^T inputs, with dL/d(output) `outer` [tokens, out] and `inputs` [tokens, in]."""
        whole = self._whole[linear]
        if outer.is_cuda and outer.dtype != torch.float32:  # tensor cores sum in float32 as well
            whole.gradient.add_(torch.mm(outer.T, inputs, out_dtype=torch.float32))
            outer, inputs = outer.to(torch.float32), inputs.to(torch.float32)
        else:
            outer, inputs = outer.to(torch.float32), inputs.to(torch.float32)
            # [out, tokens] @ [tokens, in]
            whole.gradient.addmm_(outer.T, inputs)
        # Factors of the diagonal Fisher matrix: its exact diagonal would need a product of the
        # squares.
        whole.rows.add_(outer.square().sum(0))
        whole.columns.add_(inputs.square().sum(0))

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add a gradient of the weight itself (experts), which has no factors of the curvature."""
        self._whole[linear].gradient.add_(gradient.T if linear.transposed else gradient)

    def release(self) -> None:
        """Reduce the block's gradients over all processes and free all but the owned rows.

        Called after the backward pass of each block, so only one block is ever whole in memory. A
        second micro-batch adds to the sums of the first, in `self._dtype`.
        """
        for linear, whole in self._whole.items():
            gradient = self._shards.sum_rows(whole.gradient).to(self._dtype)  # [rows, in]
            rows = self._shards.sum_rows(whole.rows[:, None])[:, 0]  # [rows]
            columns = self._shards.sum_all(whole.columns)
            # This process's share, before it is rounded. The learner adds up the totals of all
            # processes, so that a NaN or an overflow stops every one of them.
            sums = whole.gradient.sum() + rows.sum() + columns.sum()
            self.total = self.total.to(sums.device) + sums
            if linear in self.owned:
                total = self.owned[linear]
                total.gradient.add_(gradient)
                total.rows.add_(rows)
                total.columns.add_(columns)
            else:
                self.owned[linear] = WeightGradient(gradient, rows, columns)
        self._whole = {}

    def forget(self) -> None:
        """Drop the sums, but not the check for finite values: the end of a draw."""
        self.owned = {}

    def clear(self) -> None:
        """Drop the sums and the check: the end of a step."""
        self.forget()
        self.total = torch.zeros(())
