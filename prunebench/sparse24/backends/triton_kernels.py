"""Triton kernels over tiles of a packed 2:4 matrix: the product by 1 to 4 tokens, and unpacking.

Tiles (`TiledLayout`): `words` [N/BN, K/256, 4, BN, 16], a 32-bit word per group of four inputs: its
two kept values. `meta` [N/BN, K/256, BN, 16]: the places of the same lane in the 4 tiles of 256
inputs, so that a tile of places has the shape of a tile of words and is loaded once for all four.

The product must issue few instructions per word, or it is bound by them and not by the bytes: the
places become a byte selector (shift, mask, multiply), one `prmt` picks both inputs out of the four,
and two multiply-adds per token follow. `tests/sparse24/test_machine_code.py` counts them.

Imported only if Triton is installed. `TRITON_INTERPRET=1` runs it on a CPU.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
STEPS = tl.constexpr(4)  # tiles in 256 inputs
LANES = tl.constexpr(16)  # groups in a row of a tile


@triton.jit
def _places(meta, step: tl.constexpr):
    """Return the places of the two kept values in a group of four, as i0 | i1 << 8."""
    return (meta.to(tl.int32) >> (2 * step)) & 0x0303


@triton.jit
def _permute(low, high, selector, INTERPRETED: tl.constexpr):
    """Return four of the eight bytes of `high:low`, chosen by the nibbles of the selector."""
    if INTERPRETED:  # `prmt` in plain arithmetic
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        picked = tl.zeros_like(both)
        for byte in tl.static_range(4):
            place = (selector.to(tl.int64) >> (4 * byte)) & 7
            picked |= ((both >> (8 * place)) & 255) << (8 * byte)
        return picked.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _first(pair, dtype: tl.constexpr):
    """Return the number of `dtype` in the low half of a word, in float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _second(pair, dtype: tl.constexpr):
    """Return the number of `dtype` in the high half of a word, in float32."""
    if dtype == tl.bfloat16:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _added(total, word, quad, selector, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add the products of kept pairs, [PARTS, BN, LANES], with two inputs of each four.

    The fours are 64-bit elements, [PARTS, 1, LANES]; the selector says which bytes are the inputs.
    """
    # Two 32-bit halves per quad, the same for all rows of the tile.
    low, _ = tl.broadcast(quad.to(tl.int32), word)
    high, _ = tl.broadcast((quad >> 32).to(tl.int32), word)
    pair = _permute(low, high, selector, INTERPRETED)
    total += _first(word, dtype) * _first(pair, dtype)
    return total + _second(word, dtype) * _second(pair, dtype)


@triton.jit
def multiply_kernel(
    words, meta, x, bias, out, n, groups, supers, stride,
    BN: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of BN rows by all tokens, PARTS supers of 256 inputs at a time.

    `x` is read as 64-bit elements, four inputs each, `stride` of them from a token to the next.
    """
    tile = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    inside = tl.arange(0, BN)[None, :, None] * LANES + lane
    words += tile * supers * (STEPS * BN * LANES)
    meta += tile * supers * (BN * LANES)
    dtype = out.dtype.element_ty
    totals = (tl.zeros((PARTS, BN, LANES), dtype=tl.float32),) * TOKENS
    # Only `tl.range` pipelines loads that feed no dot: the launch's own `num_stages` does not.
    for start in tl.range(0, supers, PARTS, num_stages=STAGES):
        s = start + part
        # One load of places for all steps of a super.
        places = tl.load(meta + s * (BN * LANES) + inside, mask=s < supers, other=0)
        for step in tl.static_range(STEPS):
            tile_of_words = words + (s * STEPS + step) * (BN * LANES)
            word = tl.load(tile_of_words + inside, mask=s < supers, other=0)
            # Number i of a quad is its bytes 2 i and 2 i + 1, one nibble of the selector each.
            selector = _places(places, step) * 0x22 + 0x1010
            group = (s * STEPS + step) * LANES + lane
            sums = ()
            for token in tl.static_range(TOKENS):
                # Masked: behind the last input there may be a NaN, and NaN times padding is NaN.
                quad = tl.load(x + token * stride + group, mask=group < groups, other=0)
                sums = sums + (_added(totals[token], word, quad, selector, dtype, INTERPRETED),)
            totals = sums
    row = tile * BN + tl.arange(0, BN)
    for token in tl.static_range(TOKENS):
        # The parts are in different warps: summed in the block, always in the same order.
        total = tl.sum(tl.sum(totals[token], axis=2), axis=0)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
        tl.store(out + token * n + row, total.to(dtype), mask=row < n)


@triton.jit
def unpack_kernel(words, meta, out, n, groups, supers, BN: tl.constexpr):
    """Write the dense matrix of a tile of rows and 256 inputs; `out` is of 64-bit elements."""
    tile, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, LANES)[None, :]
    inside = tl.arange(0, BN)[:, None] * LANES + lane
    row = tile * BN + tl.arange(0, BN)[:, None]
    base = tile * supers + s
    places = tl.load(meta + base * (BN * LANES) + inside)
    for step in tl.static_range(STEPS):
        word = tl.load(words + (base * STEPS + step) * (BN * LANES) + inside).to(tl.int64)
        place = _places(places, step).to(tl.int64)
        low = (word & 0xFFFF) << ((place & 3) * 16)
        high = ((word >> 16) & 0xFFFF) << ((place >> 8) * 16)
        group = (s * STEPS + step) * LANES + lane
        tl.store(out + row * groups + group, low | high, mask=(row < n) & (group < groups))


def multiply(words, meta, x, bias, *, rows, parts, warps, stages):
    """Return x @ W.T + bias, [tokens, rows], for 1 to 4 tokens with any strides."""
    tiles, supers, _, block, _ = words.shape
    quads = _quads(x)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(words):
        multiply_kernel[(tiles,)](
            words, meta, quads, x if bias is None else bias, out,
            rows, quads.shape[1], supers, quads.stride(0),
            BN=block, PARTS=parts, TOKENS=len(x), HAS_BIAS=bias is not None, STAGES=stages,
            INTERPRETED=INTERPRETED, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def unpack(words, meta, out):
    """Write the dense matrix into `out`, [N, K], contiguous."""
    tiles, supers, _, block, _ = words.shape
    quads = out.view(torch.int64)
    with torch.cuda.device_of(words):
        unpack_kernel[(tiles, supers)](words, meta, quads, *quads.shape, supers, BN=block)


def _quads(x):
    """Return x as 64-bit elements, [tokens, in / 4], copied where its strides do not allow that."""
    if x.stride(1) != 1 or x.stride(0) % 4 or x.storage_offset() % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int64)
