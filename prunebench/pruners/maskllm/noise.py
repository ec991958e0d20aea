"""Counter-based Gumbel noise: the same on any device, for any tiling and number of processes.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = (seed,
step), counter = (group index low, group index high, layer, block). A block of 128 bits gives six
uniforms of 21 bits. Nothing is stored: the backward pass computes the same noise again.

torch has no unsigned 32-bit multiplication with a high half; the wrapped int64 product holds the
same bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNIFORMS = 6
"""Uniforms in one block of 128 bits."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_BITS = 21


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of counters, as four int64 tensors that hold 32-bit words.

    Args:
        counter: Four int64 tensors of one shape with values in [0, 2^32).
        key: Two 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (word & _MASK for word in key)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c0 and c2 use the old c1 and c3, which are therefore replaced afterwards.
        c0 = _high(p1).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = _high(p0).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    """Return the high 32 bits of a 64-bit product."""
    return (product >> 32).bitwise_and_(_MASK)


def gumbel(
    groups: Int[Tensor, " groups"], choices: int, *, seed: int, step: int, layer: int
) -> Float[Tensor, "choices groups"]:
    """Return standard Gumbel noise -log(-log u) for some groups of one layer, float32.

    Args:
        groups: Indices of the groups in their layer, int64, not negative.
        choices: Noise values per group.
        seed: Of the run.
        step: Training step, or draw; each has noise of its own.
        layer: Index of the layer in the model.
    """
    noise = uniforms(groups, choices, seed=seed, step=step, layer=layer)
    # In place: four passes over one buffer. u is never 0 or 1, so the result is finite.
    return noise.log_().neg_().log_().neg_()


def uniforms(
    groups: Int[Tensor, " groups"], choices: int, *, seed: int, step: int, layer: int
) -> Float[Tensor, "choices groups"]:
    """Return the uniforms in (0, 1) behind `gumbel`, [choices, groups]; exact on every device."""
    low, high = groups & _MASK, groups >> 32
    layers = torch.full_like(low, layer)
    fields: list[Tensor] = []
    for block in range(-(-choices // UNIFORMS)):
        words = philox((low, high, layers, torch.full_like(low, block)), (seed, step))
        # [groups] each, six per block
        fields += _fields(*words)
    drawn = torch.stack(fields[:choices]).to(torch.float32)  # [choices, groups]
    # 21 bits and the half fit float32's 24 exactly, and 2^-21 is a power of two: no rounding
    # anywhere.
    return drawn.add_(0.5).mul_(2.0**-_BITS)


def _fields(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> list[Tensor]:
    """Split 128 bits into six fields of 21 bits; the top bit of each half is not used."""
    # shifts of a negative int64 fill with ones: the mask removes them
    first, second = (w0 << 32).bitwise_or_(w1), (w2 << 32).bitwise_or_(w3)
    mask = (1 << _BITS) - 1
    return [(word >> shift) & mask for word in (first, second) for shift in (0, _BITS, 2 * _BITS)]
