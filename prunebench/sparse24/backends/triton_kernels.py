"""Triton kernels over tiles of a packed 2:4 matrix: decode, its reduction, and unpacking.

Tiles (`TiledLayout`): `words` [N/BN, K/256, STEPS, BN, LANES], a 32-bit word per group of four
inputs: its two kept values. `meta` [N/BN, K/256, BN, LANES]: the codes of the same lane in the
STEPS tiles of 256 inputs, 4 bits each, so that a tile of codes has the shape of a tile of words and
is loaded once for all of them. A product is four strided dots: column j of all groups is built in
registers from the two values and their positions, and multiplied by x[:, j::4].

Imported only if Triton is installed. `TRITON_INTERPRET=1` runs it on a CPU.
"""

import os

import torch
import triton
import triton.language as tl

WIDE = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def _column(word, code, j, dtype: tl.constexpr):
    """Return element j of every group, [BN, LANES]: the value kept there, or zero."""
    high = tl.where((code >> 2) == j, word >> 16, 0)
    bits = tl.where((code & 3) == j, word, high)
    # The low 16 bits, reinterpreted: the shift of a negative word fills only bits that are cut off.
    return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _dot_kernel(
    words, meta, x, bias, out, n, k, tokens, supers,
    BN: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows by up to BT tokens with tensor cores, over a split of the inputs."""
    tile, part = tl.program_id(0), tl.program_id(1)
    rows, lanes, toks = tl.arange(0, BN), tl.arange(0, LANES), tl.arange(0, BT)
    inside = rows[:, None] * LANES + lanes[None, :]
    dtype = x.dtype.element_ty
    # Split-K: this program sums supers part * share to (part + 1) * share.
    share = tl.cdiv(supers, SPLIT)
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for s in range(part * share, min(supers, (part + 1) * share)):
        base = tile.to(tl.int64) * supers + s
        # One load of codes for all STEPS tiles of the super.
        codes = tl.load(meta + base * BN * LANES + inside).to(tl.int32)
        for step in tl.static_range(STEPS):
            word = tl.load(words + (base * STEPS + step) * BN * LANES + inside)
            code = (codes >> (4 * step)) & 15
            first = s * 256 + step * LANES * 4 + lanes * 4
            for j in tl.static_range(4):
                column = first + j
                taken = (column < k)[:, None] & (toks < tokens)[None, :]
                place = x + toks[None, :].to(tl.int64) * k + column[:, None]
                weight = _column(word, code, j, dtype)
                inputs = tl.load(place, mask=taken, other=0.0)  # x[:, j::4].T: [LANES, BT]
                if WIDE:  # the interpreter treats bfloat16 in a dot as integers
                    weight, inputs = weight.to(tl.float32), inputs.to(tl.float32)
                total = tl.dot(weight, inputs, total)  # [BN, BT]
    row = tile * BN + rows
    inner = (row < n)[:, None] & (toks < tokens)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    # [SPLIT, tokens, n]; with one split that is the result itself
    place = out + (part.to(tl.int64) * tokens + toks[None, :]) * n + row[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=inner)


@triton.jit
def _fma_kernel(
    words, meta, x, bias, out, n, k, tokens, supers,
    BN: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same for one or two tokens, without tensor cores: select, multiply, add."""
    tile, part = tl.program_id(0), tl.program_id(1)
    rows, lanes = tl.arange(0, BN), tl.arange(0, LANES)
    inside = rows[:, None] * LANES + lanes[None, :]
    dtype = x.dtype.element_ty
    share = tl.cdiv(supers, SPLIT)
    sum0 = tl.zeros((BN, LANES), dtype=tl.float32)  # token 0
    sum1 = tl.zeros((BN, LANES), dtype=tl.float32)  # token 1
    for s in range(part * share, min(supers, (part + 1) * share)):
        base = tile.to(tl.int64) * supers + s
        codes = tl.load(meta + base * BN * LANES + inside).to(tl.int32)
        for step in tl.static_range(STEPS):
            word = tl.load(words + (base * STEPS + step) * BN * LANES + inside)
            code = (codes >> (4 * step)) & 15
            first = s * 256 + step * LANES * 4 + lanes * 4
            for j in tl.static_range(4):
                column = first + j
                weight = _column(word, code, j, dtype).to(tl.float32)
                # [BN, LANES]: summed over lanes once at the end, not for every tile
                sum0 += weight * tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
                if BT == 2:
                    second = tl.load(x + k + column, mask=column < k, other=0.0)
                    sum1 += weight * second.to(tl.float32)
    row = tile * BN + rows
    added = tl.zeros((BN,), dtype=tl.float32)
    if HAS_BIAS:
        added += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    place = out + part.to(tl.int64) * tokens * n + row
    kind = out.dtype.element_ty
    tl.store(place, (tl.sum(sum0, axis=1) + added).to(kind), mask=row < n)
    if BT == 2:
        tl.store(place + n, (tl.sum(sum1, axis=1) + added).to(kind), mask=row < n)


@triton.jit
def _reduce_kernel(
    parts, bias, out, n, size, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the splits in a fixed order: the result does not change from run to run."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inner = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + place, mask=inner, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + place % n, mask=inner, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inner)


@triton.jit
def _unpack_kernel(
    words, meta, out, n, k, supers,
    BN: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write the dense matrix of a tile of rows and 256 inputs."""
    tile, s = tl.program_id(0), tl.program_id(1)
    rows, lanes = tl.arange(0, BN), tl.arange(0, LANES)
    inside = rows[:, None] * LANES + lanes[None, :]
    row = (tile * BN + rows).to(tl.int64)
    dtype = out.dtype.element_ty
    base = tile.to(tl.int64) * supers + s
    codes = tl.load(meta + base * BN * LANES + inside).to(tl.int32)
    for step in tl.static_range(STEPS):
        word = tl.load(words + (base * STEPS + step) * BN * LANES + inside)
        code = (codes >> (4 * step)) & 15
        first = s * 256 + step * LANES * 4 + lanes * 4
        for j in tl.static_range(4):
            column = first + j
            inner = (row < n)[:, None] & (column < k)[None, :]
            place = out + row[:, None] * k + column[None, :]
            tl.store(place, _column(word, code, j, dtype), mask=inner)


def multiply(words, meta, x, bias, *, rows, split, warps, stages):
    """Return x @ W.T + bias, [tokens, rows], for 1 to 64 contiguous tokens."""
    tokens, width = x.shape
    tiles, supers, steps, block, lanes = words.shape
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    target = out
    if split > 1:
        # float32 partial sums, reduced in a fixed order: no atomics, so results are reproducible.
        target = torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
    # A dot has at least 16 columns: with one or two tokens most of it would multiply padding.
    without_dot = tokens <= 2
    kernel = _fma_kernel if without_dot else _dot_kernel
    add_bias = bias is not None and split == 1  # else the reduction adds it
    kernel[(tiles, split)](
        words, meta, x, bias if add_bias else x, target, rows, width, tokens, supers,
        BN=block, LANES=lanes, STEPS=steps,
        BT=tokens if without_dot else max(16, triton.next_power_of_2(tokens)),
        SPLIT=split, HAS_BIAS=add_bias, WIDE=WIDE, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split > 1:
        size, step = tokens * rows, 1024
        _reduce_kernel[(triton.cdiv(size, step),)](
            target, x if bias is None else bias, out, rows, size,
            SPLIT=split, HAS_BIAS=bias is not None, BLOCK=step,
        )  # fmt: skip
    return out


def unpack(words, meta, out):
    """Write the dense matrix into `out`, [N, K], contiguous."""
    tiles, supers, steps, block, lanes = words.shape
    _unpack_kernel[(tiles, supers)](
        words, meta, out, out.shape[0], out.shape[1], supers, BN=block, LANES=lanes, STEPS=steps
    )
