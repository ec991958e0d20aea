"""`Packed24`: a 2:4 matrix as its kept values and their positions.

Of every four consecutive inputs two values are stored, and a 4-bit code `i0 | i1 << 2` with their
positions `i0 < i1`. A group with fewer than two non-zeros stores +0.0 at a free position. In 16-bit
numbers that is 4.5 bytes instead of 8: 0.5625 of the dense matrix. The format is the same on every
device and in files; the formats of GPU libraries are computed from it and never saved.

Packing works on whole groups: four 16-bit numbers are one 64-bit word, a kept pair two shifts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.out_of_memory import is_out_of_memory

DTYPES = (torch.bfloat16, torch.float16)
# On a CPU a chunk fits the cache; on a GPU it takes about 300 MB of scratch.
_CHUNK_GROUPS = {"cpu": 1 << 17, "cuda": 1 << 23}
_SMALLEST_CHUNK = 1 << 14
# Index: bit j is set if element j is not zero. Value: code of the stored pair, 0 if over-full.
_CODE_OF_BITS = [
    0b0100, 0b0100, 0b1001, 0b0100, 0b1110, 0b1000, 0b1001, 0,
    0b1110, 0b1100, 0b1101, 0, 0b1110, 0, 0, 0,
]  # fmt: skip
VALID_CODES = tuple(c for c in range(16) if c & 3 < c >> 2)
_OVER = [bits for bits in range(16) if bits.bit_count() > 2]
_UNDER = [bits for bits in range(16) if bits.bit_count() < 2]
# Times four bytes of 0 or 1 in an int32: moves the byte at bit 8 j to bit 24 + j, see `_bits`.
_GATHER_BITS = (1 << 24) + (1 << 17) + (1 << 10) + (1 << 3)


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 matrix [N, K].

    Attributes:
        values: The kept pair of every group, [N, K/2], bfloat16 or float16; no -0.0.
        codes: Two 4-bit codes a byte, the first group in the low half, [N, ceil(K/8)].
    """

    values: Float[Tensor, "out pairs"]
    codes: UInt8[Tensor, "out bytes"]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the dense matrix."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.values.device

    @property
    def bytes(self) -> int:
        """Bytes of values and codes."""
        return self.values.nbytes + self.codes.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense matrix."""
        return 2 * self.values.nbytes

    def to(self, device: torch.device) -> Packed24:
        """Return the matrix on a device."""
        return Packed24(self.values.to(device), self.codes.to(device))


@dataclass(frozen=True)
class Report24:
    """The result of checking whether a matrix is 2:4.

    Attributes:
        groups: Number of groups of four.
        over: Groups with more than two non-zeros: the matrix is not 2:4.
        under: Groups with fewer than two, where a zero is stored.
        negative_zeros: Elements that are -0.0; they are packed as +0.0.
        first_over: Row and first column of the first group that is over-full.
    """

    groups: int
    over: int
    under: int
    negative_zeros: int
    first_over: tuple[int, int] | None

    @property
    def holds(self) -> bool:
        """Whether the matrix is 2:4."""
        return self.over == 0


def check_24(weight: Float[Tensor, "out in"], *, name: str = "the matrix") -> Report24:
    """Count the groups of four consecutive inputs that hold more or fewer than two non-zeros.

    Raises:
        IncompatibleData: The width is not a multiple of four.
    """
    _require_width(weight, name)
    flat = weight.detach().contiguous().view(-1)  # [out * in]: group g is 4 g to 4 g + 3
    groups = flat.numel() // 4
    patterns = torch.zeros(16, dtype=torch.int64, device=weight.device)
    negative = 0
    first: tuple[int, int] | None = None

    def count(start: int, stop: int) -> None:
        nonlocal negative, first
        four = flat[4 * start : 4 * stop]
        bits = _bits(four)
        zeros = int((torch.signbit(four) & (four == 0)).count_nonzero())
        # A histogram of the 16 possible patterns: over-full and sparse groups follow from it.
        counts = torch.bincount(bits, minlength=16)
        # The place is computed only where an error needs it.
        if first is None and counts[_OVER].any():
            full = torch.isin(bits, torch.tensor(_OVER, dtype=bits.dtype, device=bits.device))
            row, group = divmod(start + int(full.to(torch.uint8).argmax()), weight.shape[1] // 4)
            first = (row, 4 * group)
        # Last: a chunk that ran out of memory is counted again.
        patterns.add_(counts)
        negative += zeros

    _by_chunks(groups, weight.device, count)
    return Report24(
        groups=groups,
        over=int(patterns[_OVER].sum()),
        under=int(patterns[_UNDER].sum()),
        negative_zeros=negative,
        first_over=first,
    )


def require_24(report: Report24, weight: Float[Tensor, "out in"], *, name: str) -> None:
    """Raise `IncompatibleData` with layer and group unless the matrix is 2:4."""
    if report.first_over is None:
        return
    row, column = report.first_over
    four = ", ".join(f"{value:.4g}" for value in weight[row, column : column + 4].tolist())
    raise IncompatibleData(
        f"{name} is not 2:4: row {row}, columns {column} to {column + 3} hold {four}",
        where=f"{report.over:,} of its {report.groups:,} groups keep more than 2 of 4",
        fix="prune it with --sparsity 2:4; a packer that took it would drop weights",
    )


def pack24(weight: Float[Tensor, "out in"], *, name: str = "the matrix") -> Packed24:
    """Pack a 2:4 matrix; a -0.0 is packed as +0.0, everything else bit for bit.

    Args:
        weight: (out, in) in bfloat16 or float16; groups are along the inputs.
        name: What errors call it.

    Raises:
        IncompatibleData: A group keeps more than two (layer and group are named), the width is no
            multiple of four, or the numbers are not of 16 bits.
    """
    _require_width(weight, name)
    if weight.dtype not in DTYPES:
        raise IncompatibleData(
            f"{name} is {str(weight.dtype).removeprefix('torch.')}, and 2:4 is packed in 16 bits",
            where="no sparse tensor core takes 2:4 weights in float32",
            fix="use --dtype bfloat16",
        )
    rows, width = weight.shape
    groups = rows * width // 4
    flat = weight.detach().contiguous().view(-1)  # [out * in]
    pairs = torch.empty(groups, dtype=torch.int32, device=weight.device)
    codes = torch.empty(groups, dtype=torch.uint8, device=weight.device)
    table = torch.tensor(_CODE_OF_BITS, dtype=torch.uint8, device=weight.device)

    def pack(start: int, stop: int) -> None:
        four = flat[4 * start : 4 * stop] + 0.0  # -0.0 + 0.0 = +0.0
        code = table[_bits(four)]
        if not code.all():  # 0 is no valid code: an over-full group
            require_24(check_24(weight, name=name), weight, name=name)
        word, position = four.view(torch.int64), code.to(torch.int64)  # [groups]
        low = word >> ((position & 3) << 4) & 0xFFFF  # element i0, 16 bits
        high = word >> (position >> 2 << 4) << 16  # element i1; the cast drops what is above it
        pairs[start:stop] = (high | low).to(torch.int32)
        codes[start:stop] = code

    _by_chunks(groups, weight.device, pack)
    values = pairs.view(weight.dtype).view(rows, width // 2)  # [groups] of 32 bits -> [out, in / 2]
    return Packed24(values, join_codes(codes.view(rows, width // 4)))  # codes: [N, K/4]


def unpack24(packed: Packed24, *, out: Tensor | None = None) -> Float[Tensor, "out in"]:
    """Return the dense matrix, bit for bit what was packed.

    Args:
        packed: Any device.
        out: Where to write it, contiguous, of the same shape and dtype; a new matrix if None.
    """
    rows, width = packed.shape
    groups = rows * width // 4
    if out is None:
        out = torch.empty(rows, width, dtype=packed.dtype, device=packed.device)
    words = out.view(-1).view(torch.int64)  # [groups], four elements each
    pairs = packed.values.contiguous().view(-1).view(torch.int32)  # [groups], two elements each
    codes = split_codes(packed).view(-1)  # [groups]

    def unpack(start: int, stop: int) -> None:
        pair, code = pairs[start:stop].to(torch.int64), codes[start:stop].to(torch.int64)
        # Position times 16 bits; the mask removes the sign bits of the conversion from int32.
        low = (pair & 0xFFFF) << ((code & 3) << 4)
        high = (pair >> 16 & 0xFFFF) << (code >> 2 << 4)
        torch.bitwise_or(low, high, out=words[start:stop])

    _by_chunks(groups, packed.device, unpack)
    return out


def split_codes(packed: Packed24) -> UInt8[Tensor, "out groups"]:
    """Return one code per byte, [N, K/4]."""
    # [N, ceil(K/8), 2] -> [N, 2 ceil(K/8)], of which the last may be padding
    both = torch.stack((packed.codes & 15, packed.codes >> 4), dim=-1).flatten(1)
    return both[:, : packed.shape[1] // 4].contiguous()


def join_codes(codes: UInt8[Tensor, "out groups"]) -> UInt8[Tensor, "out bytes"]:
    """Return two codes per byte, [N, ceil(K/8)]: the inverse of `split_codes`."""
    if codes.shape[1] % 2:
        # An odd number of groups: the last half byte is padding.
        codes = torch.nn.functional.pad(codes, (0, 1), value=_CODE_OF_BITS[0])
    pairs = codes.view(codes.shape[0], -1, 2)  # [N, ceil(K/8), 2]
    return pairs[..., 0] | pairs[..., 1] << 4


def require_sound(packed: Packed24, *, name: str) -> None:
    """Raise `IncompatibleData` where codes and values, as read from a file, cannot be 2:4."""
    rows, width = packed.shape
    if packed.dtype not in DTYPES or packed.codes.dtype != torch.uint8 or width % 4:
        raise _unsound(name, f"values are {packed.dtype}, codes {packed.codes.dtype}")
    if tuple(packed.codes.shape) != (rows, (width + 7) // 8):
        raise _unsound(name, f"codes {list(packed.codes.shape)}, values {[rows, width // 2]}")
    # Equal positions would OR two values into one number when unpacked, without an error.
    codes = split_codes(packed)  # uint8, as all below: less than the dense matrix in all
    if not ((codes & 3) < (codes >> 2)).all():
        raise _unsound(name, "a code has equal positions, or positions in descending order")


def _bits(four: Float[Tensor, "numbers"]) -> Int[Tensor, "groups"]:
    """Return for every group of four a number whose bit j is set if element j is not zero."""
    # [4 groups] of bool -> [groups] of int32; the product gathers the four bytes in the top byte
    return ((four != 0).view(torch.int32) * _GATHER_BITS >> 24) & 15


def _unsound(name: str, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{name} is not a packed 2:4 matrix", where=reason, fix="export the checkpoint again"
    )


def _require_width(weight: Int[Tensor, "..."] | Float[Tensor, "..."], name: str) -> None:
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise IncompatibleData(
            f"{name} cannot be 2:4: it has the shape {list(weight.shape)}",
            where="groups are four consecutive inputs of a matrix [out, in]",
            fix="leave it dense",
        )


def _by_chunks(groups: int, device: torch.device, work: Callable[[int, int], None]) -> None:
    """Do `work(start, stop)` chunk by chunk; a chunk that runs out of memory in halves."""
    step, start = _CHUNK_GROUPS.get(device.type, _CHUNK_GROUPS["cuda"]), 0
    while start < groups:
        stop = min(groups, start + step)
        try:
            work(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or step <= _SMALLEST_CHUNK:
                raise
        else:
            start = stop
            continue
        # outside the except clause, whose traceback keeps the failed tensors alive
        step //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
