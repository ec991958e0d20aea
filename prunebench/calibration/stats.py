"""`InputStats`: what calibration leaves behind for one input tensor.

Linears that read the same tensor (q, k and v; gate and up) share one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Workspace = dict[tuple[int, torch.device], Tensor]

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
        workspace: Scratch memory by width and device, shared by the accumulators of a walk. A fresh
            block of megabytes for every batch would cost more in page faults than the arithmetic.
        hessian: Whether to collect the Gram matrix too.
        devices: Where the Gram matrix is summed, panel by panel in turn, and the first is where
            the result will be; by default where the inputs are.
    """

    def __init__(
        self,
        workspace: Workspace | None = None,
        *,
        hessian: bool = False,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self.tokens = 0
        self._workspace = {} if workspace is None else workspace
        self._hessian = hessian
        self._devices = devices
        self._sum_squares: Tensor | None = None
        self._grams: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "*tokens in"]) -> None:
        """Add the inputs of one batch, in any floating dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # (tokens, in)
        self.tokens += rows.shape[0]
        if self._hessian:
            self._add_gram(rows.to(torch.float32))
        else:
            self._add_squares(rows)

    def _add_squares(self, rows: Tensor) -> None:
        key = (rows.shape[1], rows.device)
        scratch = self._workspace.get(key)
        if scratch is None or len(scratch) < len(rows):
            scratch = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
            self._workspace[key] = scratch
        squares = scratch[: len(rows)].copy_(rows).square_().sum(0)
        squares = squares.to(self._devices[0] if self._devices else rows.device)
        if self._sum_squares is None:
            self._sum_squares = squares
        else:
            self._sum_squares += squares

    def _add_gram(self, rows: Tensor) -> None:
        """Add X^T X, panel by panel from the diagonal to the right: half the products suffice."""
        width = rows.shape[1]
        devices = self._devices or (rows.device,)
        if not self._grams:
            self._grams = [torch.zeros(width, width, device=device) for device in devices]
        there = [rows.to(device) for device in devices]
        for number, start in enumerate(range(0, width, _PANEL)):
            x, gram = there[number % len(there)], self._grams[number % len(there)]
            panel = x[:, start : start + _PANEL]
            gram[start : start + _PANEL, start:].addmm_(panel.T, x[:, start:])

    def result(self, *, samples: int, width: int, device: torch.device) -> InputStats:
        """Return what was collected; zeros of length `width` if nothing ever came."""
        if self._grams:
            upper, *others = self._grams
            for other in others:  # each has other panels, and zeros where those are not
                upper += other.to(upper.device)
            upper = upper.triu_()
            squares = upper.diagonal().to(torch.float64)
            upper += upper.triu(1).T
            return InputStats(samples, self.tokens, squares, upper)
        sums = self._sum_squares
        if sums is None:
            sums = torch.zeros(width, dtype=torch.float64, device=device)
        return InputStats(samples=samples, tokens=self.tokens, sum_squares=sums)
