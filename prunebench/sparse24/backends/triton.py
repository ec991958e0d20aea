"""`triton`: our own kernel for 1 to 64 tokens, and the tiled layout that it reads.

A product by few tokens is bound by the bytes of the weights: 4.5 instead of 8 per group of four
allow a speedup of up to 1.78. The kernel loads packed tiles and builds dense columns in registers.
Tiles are contiguous in memory and take as many bytes as the file layout, but for the padding: of
the inputs to a multiple of 256 and of the outputs to whole tiles. `stored_bytes` includes it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.backends.protocol import (
    DECODE_TOKENS,
    Product,
    Support,
    has_tensor_cores,
    takes_dtype,
)
from prunebench.sparse24.layouts import WeightLayout
from prunebench.sparse24.packed import Packed24, join_codes, split_codes, unpack24

SUPER = 256  # inputs whose codes are loaded together
_META = {2: torch.uint8, 4: torch.int16, 8: torch.int32}  # by STEPS: so many codes of 4 bits
_FILL = 0b0100  # code of padding: positions 0 and 1, of values that are 0
_PROGRAMS = 396  # three per multiprocessor of an H100 or H200


@dataclass(frozen=True)
class Tiling:
    """Rows and inputs of a tile; with 64 or 128 inputs a strided dot has 16 or 32 terms.

    32 x 64 are 16 bytes of words per thread of four warps: the widest load.
    """

    rows: int = 32
    columns: int = 64

    @property
    def steps(self) -> int:
        """Tiles in 256 inputs."""
        return SUPER // self.columns

    @property
    def lanes(self) -> int:
        """Groups in a row of a tile."""
        return self.columns // 4


@dataclass(frozen=True)
class Launch:
    """Launch parameters: splits of the input dimension (split-K), warps, pipeline stages."""

    split: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, eq=False)
class TiledLayout:
    """A 2:4 matrix [N, K] in the layout that the kernel reads.

    Attributes:
        words: int32 [N/rows, K/256, steps, rows, lanes], the two kept values of a group each.
        meta: [N/rows, K/256, rows, lanes], the codes of the same lane in all `steps` tiles of 256
            inputs, 4 bits each.
        shape: (out, in) without padding.
    """

    words: Tensor
    meta: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    name: str = "tiled"

    @classmethod
    def of(cls, packed: Packed24, tiling: Tiling) -> TiledLayout:
        """Pad and reorder a packed matrix into tiles.

        The group index of a row is (super, step, lane): a super has 256 inputs, a tile of it
        `tiling.columns`. Rows move inside, so that a tile is contiguous: a program of the kernel
        owns `tiling.rows` rows and walks over supers and steps. The codes of the steps of a super
        share one element of `meta`, which therefore has the shape of a tile of words, and is loaded
        once for all steps.
        """
        rows, width = packed.shape
        # groups up to a whole super (on the right), rows up to a whole tile (at the bottom)
        more = (0, -width // 4 % (SUPER // 4), 0, -rows % tiling.rows)
        pad = torch.nn.functional.pad
        words = pad(packed.values.contiguous().view(torch.int32), more)  # [N, K/4], padded
        codes = pad(split_codes(packed), more, value=_FILL)  # [N, K/4], padded
        tiles, supers = words.shape[0] // tiling.rows, words.shape[1] * 4 // SUPER
        split = (tiles, tiling.rows, supers, tiling.steps, tiling.lanes)
        meta = torch.zeros(tiles, supers, tiling.rows, tiling.lanes, dtype=torch.int32)
        meta = meta.to(packed.device)
        # [steps, tiles, supers, rows, lanes]
        for step, part in enumerate(codes.view(split).permute(3, 0, 2, 1, 4)):
            # [tiles, supers, rows, lanes]: 4 bits of this step
            meta |= part.to(torch.int32) << 4 * step
        return cls(
            # [tiles, supers, steps, rows, lanes]
            words.view(split).permute(0, 2, 3, 1, 4).contiguous(),
            meta.to(_META[tiling.steps]),
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
        shifts = 4 * torch.arange(steps, dtype=torch.int32, device=self.device)
        codes = self.meta.to(torch.int32)[..., None] >> shifts & 15  # [..., rows, lanes, steps]
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
        tiling: Of its layout.
    """

    name = "triton"
    keeps_second_copy = False

    def __init__(self, tiling: Tiling | None = None) -> None:
        self.tiling = tiling or Tiling()

    def available(self, device: torch.device) -> Support:
        """Return support: CUDA with Triton, or a CPU in Triton's interpreter, for tests."""
        if importlib.util.find_spec("triton") is None:
            return Support(False, "triton is not installed")
        if device.type == "cpu" and interpreted():
            return Support(True, "in Triton's interpreter")
        return has_tensor_cores(device)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: 1 to 64 tokens, and inputs that need at most 10% padding."""
        if tokens > DECODE_TOKENS:
            return Support(False, f"{tokens} tokens: the kernel is for 1 to {DECODE_TOKENS}")
        padded = -shape[1] % SUPER
        # Padding is read from memory like weights, and bytes are the time of this kernel.
        if padded * 10 > shape[1] and not interpreted():
            return Support(False, f"{shape[1]} inputs would be padded by {padded}")
        return takes_dtype(dtype)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return the tiled layout."""
        return TiledLayout.of(packed, self.tiling)

    def build(self, form: WeightLayout) -> Product:
        """Return the product; a weight in another layout is tiled first."""
        tiled = (
            form if isinstance(form, TiledLayout) else TiledLayout.of(form.packed(), self.tiling)
        )
        return TritonProduct(tiled)


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class TritonProduct:
    """A tiled matrix, with the launch parameters by number of tokens."""

    form: TiledLayout
    launches: dict[int, Launch] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """0: nothing beside the layer's layout."""
        return 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, [tokens, out], for 1 to 64 tokens."""
        launch, form = self.launch_for(x.shape[0]), self.form
        product: Tensor = _operator()(
            form.words, form.meta, x.contiguous(), bias, form.shape[0],
            launch.split, launch.warps, launch.stages,
        )  # fmt: skip
        return product

    def launch_for(self, tokens: int) -> Launch:
        """Return the launch parameters for a number of tokens."""
        return self.launches.get(tokens) or default_launch(self.form)

    def settings(self, tokens: int) -> str:
        """Return tile sizes and launch parameters."""
        # words: [N/rows, K/256, steps, rows, lanes], four inputs per lane
        rows, lanes = self.form.words.shape[3:]
        return f"{Tiling(rows, 4 * lanes)}, {self.launch_for(tokens)}"


def default_launch(form: TiledLayout) -> Launch:
    """Return launch parameters with enough programs to fill the GPU."""
    tiles, supers = form.words.shape[:2]
    split = 1
    # Split-K only while programs are too few: each split writes float32 partial sums to reduce.
    while tiles * split < _PROGRAMS and split * 2 <= min(supers, 8):
        split *= 2
    return Launch(split=split)


def _kernels() -> Any:
    """Import the kernels, which needs Triton."""
    from prunebench.sparse24.backends import triton_kernels as kernels

    return kernels


@functools.cache
def _operator() -> Any:
    """Register the product as a torch operator, opaque to `torch.compile`."""

    def decode(
        words: Tensor, meta: Tensor, x: Tensor, bias: Tensor | None, rows: int,
        split: int, warps: int, stages: int,
    ) -> Tensor:  # fmt: skip
        product: Tensor = _kernels().multiply(
            words, meta, x, bias, rows=rows, split=split, warps=warps, stages=stages
        )
        return product

    def shapes(
        words: Tensor, meta: Tensor, x: Tensor, bias: Tensor | None, rows: int,
        split: int, warps: int, stages: int,
    ) -> Tensor:  # fmt: skip
        # Shapes only, for `torch.compile`: [tokens, out].
        return x.new_empty(x.shape[0], rows)

    schema = (
        "(Tensor words, Tensor meta, Tensor x, Tensor? bias, int rows, int split, int warps, "
        "int stages) -> Tensor"
    )
    operator = torch.library.custom_op(
        "prunebench::sparse24_decode", decode, mutates_args=(), schema=schema
    )
    operator.register_fake(shapes)
    return operator
