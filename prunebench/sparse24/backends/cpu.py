"""`cpu`: our own kernel for 1 to 8 tokens on a CPU, and the layout that it reads.

A product by few tokens is bound by the bytes of the weights: 4.5 instead of 8 per group of four
allow a speedup of up to 1.78 over a dense product of 16-bit weights. The kernel expands values to
their places in registers, by a bit per weight. More tokens are bound by arithmetic: the weight is
unpacked into a workspace, and torch multiplies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prunebench.sparse24.backends.cpu_build import Kernels, MatrixArguments, kernels
from prunebench.sparse24.backends.protocol import Product, Support, takes_dtype
from prunebench.sparse24.layouts import WeightLayout, Workspace
from prunebench.sparse24.packed import VALID_CODES, Packed24

MOST_TOKENS = 8
"""Most tokens that the kernel multiplies."""

_FILL = 0b0100  # code of the half byte behind an odd number of groups, as `join_codes` pads
_PARALLEL = 1 << 16  # weights below which a second thread costs more than it saves
_DTYPES = (torch.bfloat16, torch.float16)
_TYPES = {dtype: number for number, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True, eq=False)
class MaskedLayout:
    """A 2:4 matrix [N, K] as the kernel reads it; as many bytes as the file layout.

    Attributes:
        values: The kept pair of every group, [N, K/2], as in files.
        mask: A bit per weight, set if it is stored, the lowest first: uint8 [N, ceil(K/8)].
    """

    values: Tensor
    mask: Tensor
    name: str = "masked"
    arguments: MatrixArguments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        arguments = matrix_arguments(self.values, self.shape, self.mask)
        object.__setattr__(self, "arguments", arguments)

    def __reduce__(self) -> tuple[type[MaskedLayout], tuple[Tensor, Tensor]]:
        """Copy the tensors only: `arguments` has their addresses, and is made anew."""
        return MaskedLayout, (self.values, self.mask)

    @classmethod
    def of(cls, packed: Packed24) -> MaskedLayout:
        """Convert from the file layout; the values are shared."""
        mask = _masks()[packed.codes.to(torch.int32)]  # [N, ceil(K/8)]
        if packed.shape[1] % 8:
            mask[:, -1] &= 15  # half a byte is padding
        return cls(packed.values.contiguous(), mask)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense matrix."""
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
    def stored_bytes(self) -> int:
        """Bytes of values and mask."""
        return self.values.nbytes + self.mask.nbytes

    def packed(self) -> Packed24:
        """Return the matrix in the file layout."""
        mask = self.mask
        if self.shape[1] % 8:
            mask = mask.clone()
            mask[:, -1] |= int(_masks()[_FILL]) << 4 & 0xF0
        return Packed24(self.values, _codes()[mask.to(torch.int32)])

    def write_dense(self, out: Float[Tensor, "out in"]) -> None:
        """Unpack into `out`, [out, in]."""
        loaded = _loaded()
        dense = out if out.is_contiguous() else torch.empty_like(out).contiguous()
        threads = _threads(self.shape, loaded)
        loaded.library.sparse24_unpack(self.arguments, dense.data_ptr(), threads)
        if dense is not out:
            out.copy_(dense)


class CpuBackend:
    """The backend."""

    name = "cpu"
    keeps_second_copy = False

    def available(self, device: torch.device) -> Support:
        """Return support on a CPU with a C++ compiler; the remark names the instruction set."""
        if device.type != "cpu":
            return Support(False, f"the device is {device.type}, not cpu")
        loaded = kernels()
        if isinstance(loaded, str):
            return Support(False, loaded)
        remark = f"compiled for {loaded.instructions}"
        if loaded.instructions == "portable":
            remark += ": this CPU has no AVX2, expect no speedup"
        return Support(True, remark + ("" if loaded.has_threads else ", without threads"))

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: all 16-bit matrices; more than 8 tokens are multiplied dense."""
        verdict = takes_dtype(dtype)
        if verdict.ok and tokens > MOST_TOKENS:
            return Support(True, f"over {MOST_TOKENS} tokens: unpacked, then torch's dense product")
        return verdict

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return the layout with a bit per weight."""
        return MaskedLayout.of(packed)

    def build(self, form: WeightLayout) -> Product:
        """Return the product; a weight in another layout is converted first."""
        masked = form if isinstance(form, MaskedLayout) else MaskedLayout.of(form.packed())
        copied = 0 if masked is form else masked.stored_bytes
        return CpuProduct(masked, copied)


@dataclass(frozen=True)
class CpuProduct:
    """A product by a matrix on a CPU.

    Attributes:
        form: The matrix.
        stored_bytes: Of the matrix, if the layer stores another layout of it, too.
    """

    form: MaskedLayout
    stored_bytes: int = 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, [tokens, out]."""
        if torch.compiler.is_compiling():
            product: Tensor = _opaque_product(x, self.form.values, self.form.mask, bias)
            return product
        if not 1 <= x.shape[0] <= MOST_TOKENS:
            with _workspace().unpacked(self.form) as dense:
                return functional.linear(x, dense, bias)
        return multiply(_loaded(), "sparse24_multiply", self.form.arguments, x, bias)

    def settings(self, tokens: int) -> str:
        """Return the instruction set."""
        return _loaded().instructions if tokens <= MOST_TOKENS else ""


def multiply(
    loaded: Kernels, function: str, matrix: MatrixArguments, x: Tensor, bias: Tensor | None
) -> Tensor:
    """Return `x @ W.T + bias`, [tokens, out], by a function of the library.

    Args:
        loaded: The library.
        function: `sparse24_multiply`, or `dense16_multiply` for a dense matrix.
        matrix: From `matrix_arguments`; its tensors must still exist.
        x: [tokens, in] of 1 to 8 tokens, in the dtype of the matrix.
        bias: [out] in the same dtype, or None.

    Raises:
        RuntimeError: `x` or `bias` is of another dtype than the matrix.
    """
    # The kernels see addresses: they would read any words as the matrix's dtype.
    if _TYPES.get(x.dtype) != matrix.type or (bias is not None and bias.dtype != x.dtype):
        other = f", the bias {bias.dtype}" if bias is not None else ""
        raise RuntimeError(f"the input is {x.dtype}{other}, the matrix {_DTYPES[matrix.type]}")
    x = x.contiguous()
    out = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype)
    # A view of a parameter may be strided.
    bias = bias if bias is None else bias.contiguous()
    getattr(loaded.library, function)(
        matrix, x.data_ptr(), x.shape[0], None if bias is None else bias.data_ptr(),
        out.data_ptr(), _threads((matrix.rows, matrix.width), loaded),
    )  # fmt: skip
    return out


def matrix_arguments(
    values: Tensor, shape: tuple[int, int], mask: Tensor | None = None
) -> MatrixArguments:
    """Return addresses and sizes of a matrix (out, in) for the kernels; a dense one has no mask."""
    stride = 0 if mask is None else mask.shape[1]
    address = None if mask is None else mask.data_ptr()
    return MatrixArguments(values.data_ptr(), address, *shape, stride, _TYPES[values.dtype])


def _threads(shape: tuple[int, int], loaded: Kernels) -> int:
    small = shape[0] * shape[1] < _PARALLEL or not loaded.has_threads
    return 1 if small else torch.get_num_threads()


def _loaded() -> Kernels:
    loaded = kernels()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)  # the policy chooses the backend only where it is available
    return loaded


@functools.cache
def _masks() -> Tensor:
    """Return the bits of the kept weights of eight, by the byte with their codes: uint8 [256]."""
    four = [
        (1 << (code & 3) | 1 << (code >> 2)) if code in VALID_CODES else 0 for code in range(16)
    ]
    return torch.tensor([four[n & 15] | four[n >> 4] << 4 for n in range(256)], dtype=torch.uint8)


@functools.cache
def _codes() -> Tensor:
    """Return the inverse of `_masks`: uint8 [256]."""
    codes = torch.zeros(256, dtype=torch.uint8)
    valid = [low | high << 4 for low in VALID_CODES for high in VALID_CODES]
    codes[_masks()[valid].to(torch.int64)] = torch.tensor(valid, dtype=torch.uint8)
    return codes


@functools.cache
def _workspace() -> Workspace:
    """Return the buffer in which all layers are unpacked for many tokens, one after the other."""
    return Workspace()


@torch.library.custom_op(
    "prunebench::sparse24_cpu", mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor mask, Tensor? bias) -> Tensor",
)  # fmt: skip
def _opaque_product(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply, as a torch operator that `torch.compile` does not look into."""
    return CpuProduct(MaskedLayout(values, mask)).run(x, bias)


@_opaque_product.register_fake
def _shapes(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])  # [tokens, out]
