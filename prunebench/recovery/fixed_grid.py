"""Trained weights of a quantized matrix: rounded to the grid that the method chose.

The masters move freely; the block is run with the nearest values of the grid, and the gradient is
passed through the rounding as if it were none (the straight-through estimator of Bengio et al.,
https://arxiv.org/abs/1308.3432). Steps and range of codes are those of the method.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.weight_grid import WeightGrid, find_codes, grouped


class FixedGrid:
    """The values that a quantized matrix may hold.

    Args:
        weight: The matrix, (out, in), float32, on the grid.
        grid: Its form.
        name: Of the matrix, for messages.

    Raises:
        IncompatibleData: It is not on such a grid.
    """

    def __init__(self, weight: Float[Tensor, "out in"], grid: WeightGrid, name: str) -> None:
        self._grid = grid
        values = grouped(weight, grid)
        steps, codes = find_codes(values, grid)
        self._steps = steps[:, None]  # [groups, 1]
        if not torch.equal(self._steps * codes, values):
            raise IncompatibleData(
                f"{name} cannot be trained on its grid of {grid.bits} bits",
                where="its weights do not tell the steps of the grid: float32 is needed",
                fix="use --dtype float32, or leave --recover out",
            )
        if grid.symmetric:
            middle = 2 ** (grid.bits - 1)
            self._lowest = torch.full_like(self._steps, -middle)
        else:
            # the zero point is not in the weights: the lowest code is one that is used
            self._lowest = codes.amin(1, keepdim=True).clamp(max=0).to(torch.float32)
        self._highest = self._lowest + (2**grid.bits - 1)

    def round(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the nearest values of the grid."""
        values = grouped(weight, self._grid)  # [groups, width], rows padded
        codes = (values / self._steps).round_().clamp_(self._lowest, self._highest)
        rows = codes.mul_(self._steps).view(len(weight), -1)  # [out, in, padded]
        return rows[:, : weight.shape[1]]


class StraightThrough(torch.autograd.Function):
    """Replaces a value by its rounded one; the gradient is that of the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        """Return `rounded`."""
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient unchanged."""
        return gradients[0], None
