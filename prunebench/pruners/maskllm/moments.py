"""Optimizer moments and logits in fewer bytes: bfloat16 with stochastic rounding, or 8 bits.

Updates below half a unit in the last place are lost when rounding to nearest in bfloat16. Rounded
up with the probability of the remainder, they survive on average; the random bits come from the
same counters as the noise, so a run is reproducible. The 8-bit form (as in Dettmers et al.,
arXiv 2110.02861, but linear) has one scale per row of the layer, and stores
square roots of non-negative values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunebench.pruners.maskllm.noise import philox

StateDtype = Literal["float32", "bfloat16", "int8"]

_ROUNDING = 1 << 20  # first counter block of the rounding bits, beyond all blocks of the noise


@dataclass
class PackedMoments:
    """A [choices, groups] tensor in a smaller dtype.

    Attributes:
        values: The stored numbers: float32, bfloat16, int8, or uint8 if never negative.
        scales: [choices, rows] for 8 bits, else [choices, 0].
        width: Groups in a row of the layer; reads and writes are of whole rows.
    """

    values: Tensor
    scales: Float[Tensor, "choices scales"]
    width: int

    @classmethod
    def zeros(
        cls, like: Tensor, dtype: StateDtype, *, width: int, positive: bool = False
    ) -> PackedMoments:
        """Return zeros of the shape of `like`."""
        choices, groups = like.shape
        # A second moment is never negative: all 8 bits for the magnitude.
        kind = torch.uint8 if dtype == "int8" and positive else getattr(torch, dtype)
        rows = groups // width if dtype == "int8" else 0
        return cls(
            torch.zeros(like.shape, dtype=kind, device=like.device),
            torch.zeros(choices, rows, device=like.device),
            width,
        )

    def read(self, part: slice) -> Float[Tensor, "choices part"]:
        """Return some groups in float32, a copy."""
        values = self.values[:, part].to(torch.float32, copy=True)
        if not self.scales.numel():
            return values
        # [choices, rows] -> [choices, rows * width]
        scales = self.scales[:, self._rows(part)].repeat_interleave(self.width, dim=1)
        values *= scales
        return values.square_() if self.values.dtype == torch.uint8 else values

    def write(self, part: slice, new: Float[Tensor, "choices part"]) -> None:
        """Store some groups."""
        if not self.scales.numel():
            self.values[:, part] = new
            return
        positive = self.values.dtype == torch.uint8
        largest = 255 if positive else 127
        # Roots of second moments: they span half as many powers of two, which suits linear steps.
        rows = (new.sqrt() if positive else new).view(len(new), -1, self.width)
        scales = rows.abs().amax(-1) / largest  # rows: [choices, rows, width]
        self.scales[:, self._rows(part)] = scales
        # A row of zeros has the scale 0: the clamp avoids 0 / 0.
        steps = (rows / scales.clamp(min=1e-38)[..., None]).round_().clamp_(-largest, largest)
        self.values[:, part] = steps.view(new.shape).to(self.values.dtype)

    def _rows(self, part: slice) -> slice:
        return slice(part.start // self.width, part.stop // self.width)


def round_at_random(
    values: Float[Tensor, "choices part"],
    groups: Int[Tensor, " part"],
    *,
    seed: int,
    step: int,
    layer: int,
) -> Tensor:
    """Round float32 to bfloat16 stochastically: up or down, with the value as the mean.

    Args:
        values: Finite numbers.
        groups: Index of every group in its layer.
        seed: Of the run.
        step: Of the training.
        layer: Index of the layer in the model.
    """
    bits: list[Tensor] = []
    low, high = groups & 0xFFFFFFFF, groups >> 32
    layers = torch.full_like(low, layer)
    for block in range(-(-len(values) // 8)):  # a block of 128 bits serves eight choices
        counter = (low, high, layers, torch.full_like(low, _ROUNDING + block))
        for word in philox(counter, (seed, step)):
            bits += [word & 0xFFFF, word >> 16]
    drawn = torch.stack(bits[: len(values)]).to(torch.int32)  # [choices, part], 16 bits each
    # Adding 16 random bits below those that are cut off rounds up with the right probability; a
    # carry into the exponent is right, too.
    raw = values.contiguous().view(torch.int32) + drawn
    # Clearing the low 16 bits makes the conversion to bfloat16 exact.
    return (raw & -0x10000).view(torch.float32).to(torch.bfloat16)
