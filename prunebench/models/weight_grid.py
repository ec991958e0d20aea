"""Quantized weights: which values a matrix may hold, and whether it holds only those.

A group of consecutive weights of a row shares a step s, a float16 number, and holds s (c - z) with
integer codes c of `bits` bits and a zero point z that is one of the codes. `find_codes` derives
steps and codes from the weights alone, so it also notices a wrong step: a float16 number times an
integer below 256 is exact in float32, hence all weights of a group are integer multiples of 2^-24,
and their greatest common divisor is the step (or a multiple of it, if no code is odd).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

_UNIT = 2.0**24  # every float16 number is an integer multiple of 2^-24, its smallest subnormal
WHOLE_ROW = -1


@dataclass(frozen=True)
class WeightGrid:
    """The form of a quantized matrix.

    Attributes:
        bits: Of a code.
        group_size: Consecutive weights of a row that share a step; -1: the whole row.
        symmetric: Whether the zero point is always the middle code, and not stored.

    Raises:
        ValueError: A value is out of range; named as the option of a method.
    """

    bits: int
    group_size: int = WHOLE_ROW
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError("quantize_bits must be in 2..8")
        if self.group_size != WHOLE_ROW and self.group_size < 2:
            raise ValueError("group_size must be at least 2, or -1 for whole rows")

    def width(self, in_features: int) -> int:
        """Return the weights of a group; the last group of a row may be smaller."""
        return in_features if self.group_size == WHOLE_ROW else min(self.group_size, in_features)

    def groups(self, out_features: int, in_features: int) -> int:
        """Return the number of groups of a matrix."""
        return out_features * -(-in_features // self.width(in_features))


def grouped(weight: Float[Tensor, "out in"], grid: WeightGrid) -> Float[Tensor, "groups width"]:
    """Return a matrix with one row a group, the last group of every row filled with zeros."""
    width = grid.width(weight.shape[1])
    padded = functional.pad(weight, (0, -weight.shape[1] % width))
    return padded.reshape(-1, width)


def count_off_grid(weight: Float[Tensor, "out in"], grid: WeightGrid) -> int:
    """Return how many groups of a matrix hold values that their grid cannot hold.

    Only float32 weights are compared exactly. Weights in 16 bits are rounded products of step and
    code: of them no more than 2^bits values a group are required.
    """
    values = grouped(weight, grid)
    if weight.dtype != torch.float32:
        ordered = values.float().sort(dim=1).values
        different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        return int((different > 2**grid.bits).sum())
    steps, codes = find_codes(values, grid)
    exact = (steps[:, None] * codes.float() == values).all(1)  # [groups]
    return int((~(exact & _fits(codes, grid))).sum())


def find_codes(
    values: Float[Tensor, "groups width"], grid: WeightGrid
) -> tuple[Float[Tensor, " groups"], Int[Tensor, "groups width"]]:
    """Return float16 steps (as float32) and integers whose products are the values, if there are.

    For values that are on no such grid, the products differ from them.
    """
    units = (values.double() * _UNIT).round().long()  # exact for values on a grid: below 2^53
    divisor = _common_divisor(units).clamp(min=1)  # [groups]; 1 where all values are 0
    factor = torch.ones_like(divisor)
    wrong = ~_is_step(divisor)
    # the codes of a group may share a factor, and the step times it may be no float16 number
    for candidate in range(2, 2**grid.bits):
        if not wrong.any():
            break
        fits = wrong & (divisor % candidate == 0) & _is_step(divisor // candidate)
        factor[fits] = candidate
        wrong &= ~fits
    steps = divisor // factor
    return (steps.double() / _UNIT).half().float(), units // steps[:, None]


def _fits(codes: Int[Tensor, "groups width"], grid: WeightGrid) -> Bool[Tensor, " groups"]:
    """Return whether all codes minus their zero point have a place in `bits` bits."""
    low, high = codes.amin(1).clamp(max=0), codes.amax(1).clamp(min=0)
    # the zero point, -low or higher, is one of the codes
    fits: Tensor = high - low < 2**grid.bits
    if grid.symmetric:
        middle = 2 ** (grid.bits - 1)
        fits = (low >= -middle) & (high < middle)
    return fits


def _is_step(units: Int[Tensor, " groups"]) -> Bool[Tensor, " groups"]:
    """Return whether some multiples of 2^-24 are float16 numbers."""
    steps = (units.double() / _UNIT).half()
    return steps.isfinite() & (steps.double() * _UNIT == units)


def _common_divisor(units: Int[Tensor, "groups width"]) -> Int[Tensor, " groups"]:
    while units.shape[1] > 1:
        half = units.shape[1] // 2
        pairs = torch.gcd(units[:, :half], units[:, half : 2 * half])
        # an odd one out waits for the next round
        units = torch.cat([pairs, units[:, 2 * half :]], dim=1)
    return units[:, 0].abs()
