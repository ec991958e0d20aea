"""Fused Triton kernels for `relaxation`, `optimize` and `noise`: one pass over the logits each.

A program processes a block of groups; all values of a group are in the registers of one thread, and
loops over choices are unrolled. Noise is recomputed wherever it is used, from the same counters as
in `noise`, bit for bit, so that results do not depend on device, tiling or number of processes.
Multiply-adds are not fused (`enable_fp_fusion=False`), as in plain PyTorch.

`triton_ops` launches them, `dispatch` selects them. With TRITON_INTERPRET=1, set before Triton is
imported, they run on a CPU: slow, for tests.
"""

from typing import no_type_check

import triton
import triton.language as tl

BLOCK = 128  # groups per program: one per thread, so that no value moves between threads
NUMBERS = [
    "total",
    "width",
    "base",
    "seed",
    "step",
    "layer",
    "begin",
    "end",
]  # not specialized by value: each kernel is compiled once

# ---------------------------------------------------------------- noise


@triton.jit
@no_type_check
def _philox(group, layer, block: tl.constexpr, seed, step):
    """Return the four words of `noise.philox`; `group` is int64."""
    c0, c1 = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    # Broadcast by adding: all four words need the shape [B].
    c2 = tl.zeros_like(c0) + layer.to(tl.uint32)
    c3 = tl.zeros_like(c0) + block
    k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
    m0 = tl.full((1,), 0xD2511F53, tl.uint32)
    m1 = tl.full((1,), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        # Wrapping is intended here; Triton's debug mode would report it as an overflow.
        low0 = tl.mul(c0, m0, sanitize_overflow=False)
        low1 = tl.mul(c2, m1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
@no_type_check
def _uniform(words, field: tl.constexpr):
    """Return field 0 to 5 of 21 bits of a 128-bit block as a uniform in (0, 1)."""
    high, low = words[2 * (field // 3)], words[2 * (field // 3) + 1]
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    bits = ((both >> (21 * (field % 3))) & 0x1FFFFF).to(tl.int32)
    return (bits.to(tl.float32) + 0.5) * 4.76837158203125e-07  # 2^-21


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def uniforms_kernel(out, total, base, seed, step, layer, C: tl.constexpr, B: tl.constexpr):
    """Write what `noise.uniforms` returns."""
    g = tl.program_id(0) * B + tl.arange(0, B)
    for block in tl.static_range((C + 5) // 6):
        words = _philox(g.to(tl.int64) + base, layer, block, seed, step)
        for field in tl.static_range(6):
            if block * 6 + field < C:
                # int64: choices * groups of a large matrix can exceed 2^31.
                place = out + (block * 6 + field) * total.to(tl.int64) + g
                tl.store(place, _uniform(words, field), mask=g < total)


# ---------------------------------------------------------------- groups of weights


@triton.jit
@no_type_check
def _cut2(tile, B: tl.constexpr):
    return tl.split(tile)  # [B, 2] -> two of [B]


@triton.jit
@no_type_check
def _cut4(tile, B: tl.constexpr):
    even, odd = tl.split(tl.reshape(tile, (B, 2, 2)))  # [B, 4] -> columns 0, 2 and 1, 3: [B, 2]
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
@no_type_check
def _columns(place, g, inside, M: tl.constexpr, B: tl.constexpr):
    """Load a tile of whole groups [B, M], and return its M columns [B] in float32."""
    at = place + g[:, None] * M + tl.arange(0, M)[None, :]
    tile = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    if M == 2:
        return _cut2(tile, B)
    elif M == 4:
        return _cut4(tile, B)
    else:
        even, odd = tl.split(tl.reshape(tile, (B, 4, 2)))  # columns 0, 2, 4, 6 and 1, 3, 5, 7
        a, c, e, g_ = _cut4(even, B)
        b, d, f, h = _cut4(odd, B)
        return a, b, c, d, e, f, g_, h


@triton.jit
@no_type_check
def _tile(columns, M: tl.constexpr, B: tl.constexpr):
    """Join M columns [B] to a tile [B, M]: the inverse of `_columns`."""
    if M == 2:
        return tl.join(columns[0], columns[1])
    elif M == 4:
        even, odd = tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3])
        return tl.reshape(tl.join(even, odd), (B, 4))  # [B, 2, 2] -> [B, 4]
    else:
        # `join` adds a last dimension of 2, so that reshapes interleave: [B, 2, 2] -> 0, 2, 4, 6.
        even = tl.join(tl.join(columns[0], columns[4]), tl.join(columns[2], columns[6]))
        odd = tl.join(tl.join(columns[1], columns[5]), tl.join(columns[3], columns[7]))
        both = tl.join(tl.reshape(even, (B, 4)), tl.reshape(odd, (B, 4)))
        return tl.reshape(both, (B, 8))  # [B, 4, 2] -> [B, 8]


@triton.jit
@no_type_check
def _rounded(value, dtype: tl.constexpr):
    """Round float32 to nearest, ties to even; by hand, because the interpreter truncates."""
    if dtype == tl.bfloat16:
        raw = value.to(tl.uint32, bitcast=True)
        near = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        # a NaN could be rounded to infinity
        return tl.where(value != value, 0x7FC0, near).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return value.to(dtype)


# ---------------------------------------------------------------- the relaxed choice


@triton.jit
@no_type_check
def _chosen(
    logits, g, inside, total, base, seed, step, layer, tau, kappa, noise,
    NOISY: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return y: a tuple of C values [B]."""
    values = ()
    for block in tl.static_range((C + 5) // 6):
        if NOISY:
            words = _philox(g + base, layer, block, seed, step)
        for field in tl.static_range(6):
            if block * 6 + field < C:
                place = logits + (block * 6 + field) * total.to(tl.int64) + g
                value = tl.load(place, mask=inside, other=0.0).to(tl.float32) * kappa
                if NOISY:
                    # Gumbel: -log(-log u)
                    value += noise * -tl.log(-tl.log(_uniform(words, field)))
                values = values + (value,)
    largest = values[0]
    for k in tl.static_range(1, C):
        largest = tl.maximum(largest, values[k])
    exps = ()
    total_exp = tl.zeros_like(largest)
    for k in tl.static_range(C):
        exps = exps + (tl.exp((values[k] - largest) / tau),)
        total_exp += exps[k]
    probabilities = ()
    for k in tl.static_range(C):
        probabilities = probabilities + (exps[k] / total_exp,)
    return probabilities


@triton.jit
@no_type_check
def _mask(chosen, TABLE: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Return m = S^T y: a tuple of M columns [B]."""
    mask = ()
    for j in tl.static_range(M):
        total = tl.zeros_like(chosen[0])
        for k in tl.static_range(C):
            # TABLE is a constexpr: this is decided at compile time, and leaves only additions.
            if (TABLE >> (k * M + j)) & 1:
                total += chosen[k]
        mask = mask + (total,)
    return mask


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def soften_kernel(
    logits, weight, out, total, base, seed, step, layer, tau, kappa, noise,
    NOISY: tl.constexpr, TABLE: tl.constexpr, C: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write W~ = W * m; the mask is rounded to the weight's dtype first, as in plain PyTorch."""
    g = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = g < total
    chosen = _chosen(
        logits, g, inside, total, base, seed, step, layer, tau, kappa, noise, NOISY, C
    )  # fmt: skip
    mask = _mask(chosen, TABLE, C, M)
    columns = _columns(weight, g, inside, M, B)
    dtype: tl.constexpr = weight.dtype.element_ty
    masked = ()
    for j in tl.static_range(M):
        product = columns[j] * _rounded(mask[j], dtype).to(tl.float32)
        masked = masked + (_rounded(product, dtype).to(tl.float32),)
    place = out + g[:, None] * M + tl.arange(0, M)[None, :]
    # [B, M], contiguous in memory
    tl.store(place, _rounded(_tile(masked, M, B), out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def certainty_kernel(
    logits, parts, total, tau, kappa, C: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Write the sum of the largest probabilities of a block of groups, without noise."""
    g = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = g < total
    chosen = _chosen(logits, g, inside, total, 0, 0, 0, 0, tau, kappa, 0.0, False, C)
    largest = chosen[0]
    for k in tl.static_range(1, C):
        largest = tl.maximum(largest, chosen[k])
    # One partial sum per program instead of atomics: the total does not depend on their order.
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(inside, largest, 0.0), axis=0))


# ---------------------------------------------------------------- the gradient of the logits


@triton.jit
@no_type_check
def _ascent(
    logits, weight, gradient, rows, columns, g, inside, total, width, base, seed, step, layer,
    tau, kappa, noise, factor, reward, curvature,
    NOISY: tl.constexpr, REWARDED: tl.constexpr, CURVED: tl.constexpr, MIRROR: tl.constexpr,
    TABLE: tl.constexpr, C: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Return the gradient of every logit: dL/dz, or s - mean(s) for mirror descent.

    `factor` is kappa / tau, `reward` 2 lambda, and `curvature` c / 2.
    """
    chosen = _chosen(
        logits, g, inside, total, base, seed, step, layer, tau, kappa, noise, NOISY, C
    )  # fmt: skip
    w = _columns(weight, g, inside, M, B)
    slope = _columns(gradient, g, inside, M, B)
    if REWARDED or CURVED:
        mask = _mask(chosen, TABLE, C, M)
    if CURVED:
        row, place = g // width, g % width  # of the matrix, and of the group in its row
        outer = tl.load(rows + row, mask=inside, other=0.0)
        inner = _columns(columns, place, inside, M, B)
    h = ()
    for j in tl.static_range(M):
        h_j = slope[j] * w[j]
        if REWARDED:
            h_j -= reward * (w[j] * w[j]) * mask[j]
        if CURVED:
            h_j += outer * inner[j] * (w[j] * w[j]) * (mask[j] * -2 + 1) * curvature
        h = h + (h_j,)
    scores = ()
    mean = tl.zeros_like(chosen[0])
    for k in tl.static_range(C):
        score = tl.zeros_like(mean)
        for j in tl.static_range(M):
            if (TABLE >> (k * M + j)) & 1:
                score += h[j]
        scores = scores + (score,)
        # mean(s), or <y, s>: the baseline that the score is compared with
        mean += score / C if MIRROR else score * chosen[k]
    direction = ()
    for k in tl.static_range(C):
        ahead = scores[k] - mean
        direction = direction + (ahead if MIRROR else ahead * chosen[k] * factor,)
    return direction


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def directions_kernel(
    logits, weight, gradient, rows, columns, total, width, base, seed, step, layer,
    tau, kappa, noise, factor, reward, curvature, out, begin, end,
    NOISY: tl.constexpr, REWARDED: tl.constexpr, CURVED: tl.constexpr, MIRROR: tl.constexpr,
    SUM: tl.constexpr, TABLE: tl.constexpr, C: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits from `begin` to `end`, or its sum of squares by block."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    g = at + begin
    inside = g < end
    direction = _ascent(
        logits, weight, gradient, rows, columns, g, inside, total, width, base, seed, step, layer,
        tau, kappa, noise, factor, reward, curvature,
        NOISY, REWARDED, CURVED, MIRROR, TABLE, C, M, B,
    )  # fmt: skip
    if SUM:
        # Groups outside load zeros as weight and gradient: they add nothing.
        squares = tl.zeros((B,), tl.float32)
        for k in tl.static_range(C):
            squares += direction[k] * direction[k]
        tl.store(out + tl.program_id(0), tl.sum(squares, axis=0))
    else:
        for k in tl.static_range(C):
            tl.store(out + k * (end - begin).to(tl.int64) + at, direction[k], mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def update_kernel(
    logits, weight, gradient, rows, columns, total, width, base, seed, step, layer,
    tau, kappa, noise, factor, reward, curvature, first, second,
    unit, rate, decay, b1, new1, b2, new2, grown2, eps, outlier,
    NOISY: tl.constexpr, REWARDED: tl.constexpr, CURVED: tl.constexpr, MIRROR: tl.constexpr,
    ADAMW: tl.constexpr, TABLE: tl.constexpr, C: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Update logits and moments in place. `new1` is 1 - b1 and `grown2` is 1 - b2^t."""
    g = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = g < total
    direction = _ascent(
        logits, weight, gradient, rows, columns, g, inside, total, width, base, seed, step, layer,
        tau, kappa, noise, factor, reward, curvature,
        NOISY, REWARDED, CURVED, MIRROR, TABLE, C, M, B,
    )  # fmt: skip
    stored: tl.constexpr = logits.dtype.element_ty
    moments: tl.constexpr = first.dtype.element_ty
    for block in tl.static_range((C + 7) // 8):
        if stored == tl.bfloat16:
            # 1 << 20: the counter block of the rounding bits, see `moments.round_at_random`
            words = _philox(g + base, layer, 1048576 + block, seed, step)
        for i in tl.static_range(8):
            if block * 8 + i < C:
                at = (block * 8 + i) * total.to(tl.int64) + g
                new = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
                mean = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
                # As in `Optimizer._adamw` and `_momentum`; AdamW's `rate` has the bias correction
                # in it.
                slope = direction[block * 8 + i] / unit
                if ADAMW:
                    spread = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
                    mean += (slope - mean) * new1
                    spread = spread * b2 + slope * slope * new2
                    tl.store(second + at, _rounded(spread, moments), mask=inside)
                    new = new * decay - rate * (mean / (tl.sqrt(spread / grown2) + eps))
                else:
                    slope = tl.minimum(tl.maximum(slope, -outlier), outlier)
                    mean = mean * b1 + slope
                    new -= rate * mean
                tl.store(first + at, _rounded(mean, moments), mask=inside)
                if stored == tl.bfloat16:
                    # A word of 32 bits serves two choices, a block of four words eight.
                    drawn = (words[i // 2] >> (16 * (i % 2))) & 0xFFFF
                    raw = (new.to(tl.uint32, bitcast=True) + drawn) >> 16
                    tl.store(logits + at, raw.to(tl.uint16).to(stored, bitcast=True), mask=inside)
                else:
                    tl.store(logits + at, new, mask=inside)
