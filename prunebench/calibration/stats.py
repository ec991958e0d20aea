"""`InputStats`: what calibration leaves behind for one input tensor.

Linears that read the same tensor (q, k and v; gate and up) share one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_PANEL = 192  # columns; smaller panels save more products, larger ones run faster


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs X of one or more linears, over all calibration tokens.

    Attributes:
        samples: Number of calibration sequences.
        tokens: Number of tokens that reached the input; 0 for an expert that was never chosen.
        sum_squares: Sum over tokens of x_j^2, in float64, in which products and sums of float32
            inputs are exact enough that the order of batches cannot change a mask.
        gram: Sum over tokens of x x^T, float32, symmetric; None unless it was asked for.
    """

    samples: int
    tokens: int
    sum_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None = None

    def norms(self) -> Float[Tensor, " in"]:
        """Return ||X_j|| = sqrt(sum_t x_tj^2 / samples), float32, as Wanda's `scaler_row` has it.

        The division by the number of samples does not change Wanda's masks; it matters to methods
        that add another term (GBLM).
        """
        return (self.sum_squares / self.samples).sqrt().to(torch.float32)

    def hessian(self) -> Float[Tensor, "in in"]:
        """Return (2 / samples) * X X^T, float32, a new tensor: the Hessian of ||D X||^2 / samples.

        Raises:
            ValueError: It was not collected: the method's `needs` do not ask for it.
        """
        if self.gram is None:
            raise ValueError("no Hessian was collected; set Needs(calibration=True, hessian=True)")
        return self.gram * (2 / self.samples)


class StatsAccumulator:
    """Collects `InputStats` batch by batch.

    Args:
        workspace: Scratch memory by width, shared by the accumulators of a walk. A fresh block of
            megabytes for every batch would cost more in page faults than the arithmetic.
        hessian: Whether to collect the Gram matrix too.
    """

    def __init__(
        self, workspace: dict[int, Tensor] | None = None, *, hessian: bool = False
    ) -> None:
        self.tokens = 0
        self._workspace = {} if workspace is None else workspace
        self._hessian = hessian
        self._sum_squares: Tensor | None = None
        self._gram: Tensor | None = None

    def add(self, inputs: Float[Tensor, "*tokens in"]) -> None:
        """Add the inputs of one batch, in any floating dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # (tokens, in)
        self.tokens += rows.shape[0]
        if self._hessian:
            self._add_gram(rows.to(torch.float32))
        else:
            self._add_squares(rows)

    def _add_squares(self, rows: Tensor) -> None:
        scratch = self._workspace.get(rows.shape[1])
        if scratch is None or len(scratch) < len(rows):
            scratch = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
            self._workspace[rows.shape[1]] = scratch
        squares = scratch[: len(rows)].copy_(rows).square_().sum(0)
        if self._sum_squares is None:
            self._sum_squares = squares
        else:
            self._sum_squares += squares

    def _add_gram(self, rows: Tensor) -> None:
        """Add X^T X, panel by panel from the diagonal to the right: half the products suffice."""
        width = rows.shape[1]
        if self._gram is None:
            self._gram = torch.zeros(width, width, dtype=torch.float32, device=rows.device)
        for start in range(0, width, _PANEL):
            panel = rows[:, start : start + _PANEL]
            self._gram[start : start + _PANEL, start:].addmm_(panel.T, rows[:, start:])

    def result(self, *, samples: int, width: int, device: torch.device) -> InputStats:
        """Return what was collected; zeros of length `width` if nothing ever came."""
        if self._gram is not None:
            upper = self._gram.triu_()
            squares = upper.diagonal().to(torch.float64)
            upper += upper.triu(1).T
            return InputStats(samples, self.tokens, squares, upper)
        sums = self._sum_squares
        if sums is None:
            sums = torch.zeros(width, dtype=torch.float64, device=device)
        return InputStats(samples=samples, tokens=self.tokens, sum_squares=sums)
