"""`triton`: our own kernel for 1 to 4 tokens, and the tiled layout that it reads.

A product by few tokens is bound by the bytes of the weights: 4.5 instead of 8 per group of four
allow a speedup of up to 1.78. The kernel loads packed tiles and picks the inputs of the kept
values. Tiles are contiguous in memory and take as many bytes as the file layout, but for the
padding: of the inputs to a multiple of 256 and of the outputs to whole tiles. `stored_bytes`
includes it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.backends.protocol import (
    Product,
    Support,
    has_tensor_cores,
    takes_dtype,
)
from prunebench.sparse24.layouts import WeightLayout
from prunebench.sparse24.packed import Packed24, join_codes, split_codes, unpack24

SUPER = 256  # inputs whose places are loaded together
STEPS, LANES = 4, 16  # tiles in a super, groups in a row of a tile
MOST_TOKENS = 4
"""Beyond it the instructions of the inputs, five per word and token, outweigh the bytes."""
_FILL = 0b0100  # code of padding: positions 0 and 1, of values that are 0


@dataclass(frozen=True)
class Launch:
    """Launch parameters.

    Attributes:
        parts: Supers of 256 inputs that a block sums at a time; its warps share them (split-K
            inside the block).
        warps: Warps of a block.
        stages: Buffers of the pipelined loads; one less is in flight.
    """

    parts: int = 4
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True, eq=False)
class TiledLayout:
    """A 2:4 matrix [N, K] in the layout that the kernel reads.

    Attributes:
        words: int32 [N/rows, K/256, 4, rows, 16], the two kept values of a group each.
        meta: int16 [N/rows, K/256, rows, 16], the places of the same lane in the 4 tiles of 256
            inputs: the first place of step s in bits 2 s and 2 s + 1, the second 8 bits higher.
        shape: (out, in) without padding.
    """

    words: Tensor
    meta: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    name: str = "tiled"

    @classmethod
    def of(cls, packed: Packed24, rows: int = 16) -> TiledLayout:
        """Pad and reorder a packed matrix into tiles of `rows` rows and 64 inputs.

        The group index of a row is (super, step, lane): a super has 256 inputs, a tile of it 64.
        Rows move inside, so that a tile is contiguous: a program of the kernel owns `rows` rows and
        walks over supers and steps. The places of the steps of a super share one element of `meta`,
        which therefore has the shape of a tile of words, and is loaded once for all steps.
        """
        height, width = packed.shape
        # groups up to a whole super (on the right), rows up to a whole tile (at the bottom)
        more = (0, -width // 4 % (SUPER // 4), 0, -height % rows)
        pad = torch.nn.functional.pad
        words = pad(packed.values.contiguous().view(torch.int32), more)  # [N, K/4], padded
        codes = pad(split_codes(packed), more, value=_FILL)  # [N, K/4], padded
        tiles, supers = words.shape[0] // rows, words.shape[1] * 4 // SUPER
        split = (tiles, rows, supers, STEPS, LANES)
        meta = torch.zeros(tiles, supers, rows, LANES, dtype=torch.int16, device=packed.device)
        # [steps, tiles, supers, rows, lanes]
        for step, part in enumerate(codes.view(split).permute(3, 0, 2, 1, 4)):
            places = (part & 3).to(torch.int16) | (part >> 2).to(torch.int16) << 8
            meta |= places << 2 * step  # i0 | i1 << 8, two bits of this step each
        return cls(
            # [tiles, supers, steps, rows, lanes]
            words.view(split).permute(0, 2, 3, 1, 4).contiguous(),
            meta,
            packed.shape,
            packed.dtype,
        )

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.words.device

    @property
    def stored_bytes(self) -> int:
        """Bytes of words and codes, padding included."""
        return self.words.nbytes + self.meta.nbytes

    def packed(self) -> Packed24:
        """Return the matrix in the file layout."""
        tiles, supers, steps, rows, lanes = self.words.shape
        height, width = tiles * rows, supers * steps * lanes
        # [tiles, rows, supers, steps, lanes] -> [N, K/4], padded
        words = self.words.permute(0, 3, 1, 2, 4).reshape(height, width)
        shifts = 2 * torch.arange(steps, dtype=torch.int16, device=self.device)
        places = self.meta[..., None] >> shifts & 0x0303  # [..., rows, lanes, steps]
        codes = places & 3 | places >> 6  # i0 | i1 << 2
        # [tiles, rows, supers, steps, lanes] -> [N, K/4]
        codes = codes.permute(0, 2, 1, 4, 3).reshape(height, width).to(torch.uint8)
        outputs, groups = self.shape[0], self.shape[1] // 4
        values = words[:outputs, :groups].contiguous().view(self.dtype)
        return Packed24(values, join_codes(codes[:outputs, :groups].contiguous()))

    def write_dense(self, out: Float[Tensor, "out in"]) -> None:
        """Unpack into `out`, [out, in]: by a kernel on CUDA."""
        if self.device.type == "cuda":
            _kernels().unpack(self.words, self.meta, out)
        else:
            unpack24(self.packed(), out=out)


class TritonBackend:
    """The backend.

    Args:
        rows: Rows of a tile of its layout.
    """

    name = "triton"
    keeps_second_copy = False

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows

    def available(self, device: torch.device) -> Support:
        """Return support: CUDA with Triton, or a CPU in Triton's interpreter, for tests."""
        if importlib.util.find_spec("triton") is None:
            return Support(False, "triton is not installed")
        if device.type == "cpu" and interpreted():
            return Support(True, "in Triton's interpreter")
        verdict = has_tensor_cores(device)
        if verdict.ok and not interpreted() and not _has_compiler():
            return Support(False, "triton needs a C compiler, and none is here (CC, gcc, clang)")
        return verdict

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: 1 to 4 tokens, and inputs that need at most 10% padding."""
        if tokens > MOST_TOKENS:
            return Support(False, f"{tokens} tokens: the kernel is for 1 to {MOST_TOKENS}")
        padded = -shape[1] % SUPER
        # Padding is read from memory like weights, and bytes are the time of this kernel.
        if padded * 10 > shape[1] and not interpreted():
            return Support(False, f"{shape[1]} inputs would be padded by {padded}")
        return takes_dtype(dtype)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return the tiled layout."""
        return TiledLayout.of(packed, self.rows)

    def build(self, form: WeightLayout) -> Product:
        """Return the product; a weight in another layout is tiled first, a second copy of it."""
        if isinstance(form, TiledLayout):
            return TritonProduct(form)
        tiled = TiledLayout.of(form.packed(), self.rows)
        return TritonProduct(tiled, stored_bytes=tiled.stored_bytes)


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _has_compiler() -> bool:
    """Return whether there is a C compiler, as Triton looks for one to build its launcher."""
    return bool(os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))))


@dataclass(frozen=True)
class TritonProduct:
    """A tiled matrix, with the launch parameters by number of tokens.

    Attributes:
        form: The matrix.
        launches: Launch parameters by number of tokens, where not the default ones.
        stored_bytes: Bytes beside the layer's layout: 0 if `form` is that.
    """

    form: TiledLayout
    launches: dict[int, Launch] = field(default_factory=dict)
    stored_bytes: int = 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, [tokens, out], for 1 to 4 tokens."""
        launch, form = self.launch_for(x.shape[0]), self.form
        product: Tensor = _operator()(
            form.words, form.meta, x, bias, form.shape[0],
            launch.parts, launch.warps, launch.stages,
        )  # fmt: skip
        return product

    def launch_for(self, tokens: int) -> Launch:
        """Return the launch parameters for a number of tokens."""
        return self.launches.get(tokens) or default_launch(self.form)

    def settings(self, tokens: int) -> str:
        """Return tile rows and launch parameters."""
        # words: [N/rows, K/256, 4, rows, 16]
        return f"{self.form.words.shape[3]} rows, {self.launch_for(tokens)}"


def default_launch(form: TiledLayout) -> Launch:
    """Return launch parameters that keep enough bytes in flight on every multiprocessor."""
    tiles, supers = form.words.shape[:2]
    # Few programs: each sums more inputs at a time, by more warps.
    parts = 8 if tiles < 2 * multiprocessors(form.device) else 4
    while parts >= 2 * supers:  # parts without inputs
        parts //= 2
    return Launch(parts=parts, warps=max(parts, 4))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; 132, those of an H200, where there is none."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _kernels() -> Any:
    """Import the kernels, which needs Triton."""
    from prunebench.sparse24.backends import triton_kernels as kernels

    return kernels


@functools.cache
def _operator() -> Any:
    """Register the product as a torch operator, opaque to `torch.compile`."""

    def decode(
        words: Tensor, meta: Tensor, x: Tensor, bias: Tensor | None, rows: int,
        parts: int, warps: int, stages: int,
    ) -> Tensor:  # fmt: skip
        product: Tensor = _kernels().multiply(
            words, meta, x, bias, rows=rows, parts=parts, warps=warps, stages=stages
        )
        return product

    def shapes(
        words: Tensor, meta: Tensor, x: Tensor, bias: Tensor | None, rows: int,
        parts: int, warps: int, stages: int,
    ) -> Tensor:  # fmt: skip
        # Shapes only, for `torch.compile`: [tokens, out].
        return x.new_empty(x.shape[0], rows)

    schema = (
        "(Tensor words, Tensor meta, Tensor x, Tensor? bias, int rows, int parts, int warps, "
        "int stages) -> Tensor"
    )
    operator = torch.library.custom_op(
        "prunebench::sparse24_decode", decode, mutates_args=(), schema=schema
    )
    operator.register_fake(shapes)
    return operator
