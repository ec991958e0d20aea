"""Calibration statistics of linears' inputs: sums of squares and Gram matrices.

Linears that read the same tensor (q, k and v; gate and up) share one `InputStats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Workspace = dict[tuple[int, torch.device], Tensor]

# Columns; smaller panels save more products, larger ones run faster, and fill a GPU.
_PANEL = {"cpu": 192, "cuda": 2048}


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs X of one or more linears, over all calibration tokens.

    Attributes:
        samples: Number of calibration sequences.
        tokens: Number of tokens that reached the input; 0 for an expert that was never chosen.
        sum_squares: Sum over tokens of x_j^2, in float64: precise enough for float32 inputs that
            the order of batches cannot change a mask.
        gram: Sum over tokens of x x^T, float32, symmetric; None unless a method needs it.
    """

    samples: int
    tokens: int
    sum_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None = None

    def norms(self) -> Float[Tensor, " in"]:
        """Return ||X_j|| = sqrt(sum_t x_tj^2 / samples), float32, like Wanda's `scaler_row`.

        The division by the number of samples does not change Wanda's masks, but it does change
        those of methods that add another term (GBLM).
        """
        return (self.sum_squares / self.samples).sqrt().to(torch.float32)

    def hessian(self) -> Float[Tensor, "in in"]:
        """Return (2 / samples) * X X^T, float32, a new tensor: the Hessian of ||D X||^2 / samples.

        Raises:
            ValueError: It was not collected, because `needs` of the method has no `hessian=True`.
        """
        if self.gram is None:
            raise ValueError("no Hessian was collected; set Needs(calibration=True, hessian=True)")
        # H = 2 X X^T / n, as in the code of SparseGPT, where n counts sequences; [in, in]
        return self.gram * (2 / self.samples)


class StatsAccumulator:
    """Collects `InputStats` batch by batch.

    Args:
        workspace: Scratch memory by width and device, shared by the accumulators of a model.
            Allocating megabytes for every batch would cost more in page faults than the arithmetic.
        hessian: Whether to collect the Gram matrix too.
        devices: Where the panels of the Gram matrix are summed, in turn; the first also holds the
            result. By default the device of the inputs.
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
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in]
        self.tokens += rows.shape[0]
        if self._hessian:
            # A sum over thousands of tokens in 16 bits would stop growing: small terms round away.
            self._add_gram(rows.to(torch.float32))
        else:
            self._add_squares(rows)

    def _add_squares(self, rows: Tensor) -> None:
        key = (rows.shape[1], rows.device)
        scratch = self._workspace.get(key)
        if scratch is None or len(scratch) < len(rows):
            scratch = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
            self._workspace[key] = scratch
        # copy_ casts to float64, so squares and their sum are both computed in it.
        squares = scratch[: len(rows)].copy_(rows).square_().sum(0)  # [in]
        squares = squares.to(self._devices[0] if self._devices else rows.device)
        if self._sum_squares is None:
            self._sum_squares = squares
        else:
            self._sum_squares += squares

    def _add_gram(self, rows: Tensor) -> None:
        """Add the upper triangle of X^T X, one panel of rows at a time: half of the products."""
        width = rows.shape[1]
        devices = self._devices or (rows.device,)
        if not self._grams:
            self._grams = [torch.zeros(width, width, device=device) for device in devices]
        # Each device has all tokens, and sums every n-th panel.
        copies = [rows.to(device) for device in devices]
        step = _PANEL.get(rows.device.type, _PANEL["cuda"])
        for number, start in enumerate(range(0, width, step)):
            x, gram = copies[number % len(copies)], self._grams[number % len(copies)]
            panel = x[:, start : start + step]  # [tokens, panel]
            # [panel, in - start]: from the diagonal block to the right
            gram[start : start + step, start:].addmm_(panel.T, x[:, start:])

    def result(self, *, samples: int, width: int, device: torch.device) -> InputStats:
        """Return the statistics; zeros of length `width` if no batch was added.

        Args:
            samples: Number of calibration sequences.
            width: Size of the input.
            device: Where the zeros are.
        """
        if self._grams:
            upper, *others = self._grams
            for other in others:  # each device holds its own panels, and zeros elsewhere
                upper += other.to(upper.device)
            upper = upper.triu_()
            squares = upper.diagonal().to(torch.float64)
            # triu copies, so nothing is read that was just written.
            upper += upper.triu(1).T  # symmetric again, [in, in]
            return InputStats(samples, self.tokens, squares, upper)
        sums = self._sum_squares
        if sums is None:
            sums = torch.zeros(width, dtype=torch.float64, device=device)
        return InputStats(samples=samples, tokens=self.tokens, sum_squares=sums)
