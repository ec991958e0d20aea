"""The gradient of the loss with respect to the weights, summed over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunebench.models.linears import Linear
from prunebench.models.stored_outputs import product_operands
from prunebench.training.shards import Shards


class GradientSums:
    """Accumulates dL/dW: all rows for the block in the backward pass, then the owned rows only.

    Attributes:
        gradients: The sums of the step so far, owned rows, by linear.
        total: The sum of all elements added in this step; not finite if any element is not.
    """

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        self.gradients: dict[Linear, Tensor] = {}
        self.total = torch.zeros(())
        self._shards = shards
        self._dtype = dtype
        self._whole: dict[Linear, Tensor] = {}
        self._scale = 1.0

    def fetch(self, linears: Sequence[Linear], *, scale: float) -> None:
        """Allocate the gradients of a block, which are multiplied by `scale` in the end."""
        self._scale = scale
        for linear in linears:
            self._whole[linear] = torch.zeros(
                linear.out_features, linear.in_features, device=linear.stored.device
            )

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add outer^T inputs, with dL/d(output) `outer` [tokens, out] and `inputs` [tokens, in]."""
        whole = self._whole[linear]
        outer, inputs, how = product_operands(outer, inputs)
        # [out, tokens] @ [tokens, in]
        if how:
            whole.add_(torch.mm(outer.T, inputs, **how))
        else:
            whole.addmm_(outer.T, inputs)

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add a gradient of the weight itself, as autograd computes it for experts."""
        self._whole[linear].add_(gradient.T if linear.transposed else gradient)

    def release(self) -> None:
        """Reduce the block's gradients over all processes and free all but the owned rows.

        Called after the backward pass of each block, so only one block is ever whole in memory. A
        second micro-batch adds to the sums of the first, in `self._dtype`.
        """
        for linear, whole in self._whole.items():
            whole.mul_(self._scale)
            # This process's share, before it is rounded. The loop adds up the totals of all
            # processes, so that a NaN or an overflow stops every one of them.
            total = whole.sum()
            self.total = self.total.to(total.device) + total
            self._keep(linear, self._shards.sum_rows(whole))  # [rows, in]
        self._whole = {}

    def _keep(self, linear: Linear, gradient: Tensor) -> None:
        """Add the gradient of the owned rows, [rows, in], to the sums."""
        gradient = gradient.to(self._dtype)
        if linear in self.gradients:
            self.gradients[linear].add_(gradient)
        else:
            self.gradients[linear] = gradient

    def forget(self) -> None:
        """Drop the sums, but not the check for finite values."""
        self.gradients = {}

    def clear(self) -> None:
        """Drop everything: the end of a step."""
        self.forget()
        self._whole = {}
        self.total = torch.zeros(())
