"""The ways to multiply by a packed 2:4 matrix, and why one cannot be used here.

Nothing falls back in silence: a backend that is not used says so in one line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prunebench.errors import UsageError, nearest
from prunebench.sparse24.forms import Form, Workspace
from prunebench.sparse24.packed import DTYPES

DECODE_TOKENS = 64
"""Most tokens for which a product is bound by memory, and not by arithmetic."""

MIN_CAPABILITY = (8, 0)
"""2:4 in hardware, and bfloat16, begin with sm_80."""


@dataclass(frozen=True)
class Verdict:
    """Whether something can be done; `reason` says why not, or what to know."""

    ok: bool
    reason: str = ""


class Product(Protocol):
    """A layer's matrix, ready to be multiplied by."""

    @property
    def stored_bytes(self) -> int:
        """What this backend keeps beside the layer's form."""

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, (tokens, out)."""

    def workspace_bytes(self, tokens: int) -> int:
        """What a call takes for a while."""


class Backend(Protocol):
    """A kind of kernel."""

    name: str

    def available(self, device: torch.device) -> Verdict:
        """Whether it runs on this device at all."""

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Verdict:
        """Whether it takes a matrix (out, in) and so many tokens."""

    def build(self, form: Form) -> Product:
        """Return the product by a matrix; it may keep the form, or something made from it."""


# ---------------------------------------------------------------- reference


class Reference:
    """Unpack, then multiply: what the others are compared with."""

    name = "reference"

    def available(self, device: torch.device) -> Verdict:
        """Everywhere."""
        return Verdict(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Verdict:
        """Everything."""
        return Verdict(True)

    def build(self, form: Form) -> Product:
        """Keep the form."""
        return _Unpacked(form, None)


class Decompress:
    """Unpack a layer into a workspace that all share, then multiply dense.

    Keeps the gain in memory on any GPU, for any number of tokens.
    """

    name = "decompress"

    def __init__(self) -> None:
        self.workspace = Workspace()

    def available(self, device: torch.device) -> Verdict:
        """On CUDA; on a CPU it would be `reference` with a memory of its own."""
        if device.type != "cuda":
            return Verdict(False, f"the device is {device.type}, not cuda")
        return Verdict(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Verdict:
        """All 16-bit matrices."""
        return takes_dtype(dtype)

    def build(self, form: Form) -> Product:
        """Keep the form."""
        return _Unpacked(form, self.workspace)


@dataclass(frozen=True)
class _Unpacked:
    form: Form
    workspace: Workspace | None

    @property
    def stored_bytes(self) -> int:
        return 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        if self.workspace is None:
            dense = torch.empty(self.form.shape, dtype=self.form.dtype, device=self.form.device)
        else:
            dense = self.workspace.matrix(self.form)
        self.form.write_dense(dense)
        return functional.linear(x, dense, bias)

    def workspace_bytes(self, tokens: int) -> int:
        rows, width = self.form.shape
        return rows * width * self.form.dtype.itemsize


# ---------------------------------------------------------------- the table


@functools.cache
def backends() -> Mapping[str, Backend]:
    """Return all backends by name, the fastest kinds first."""
    from prunebench.sparse24.cslt import Cslt
    from prunebench.sparse24.tiles import TritonDecode

    found: tuple[Backend, ...] = (TritonDecode(), Cslt(), Decompress(), Reference())
    return {one.name: one for one in found}


def require_backend(name: str, device: torch.device) -> None:
    """Raise `UsageError` unless `name` is a backend that runs on a device."""
    if name not in backends():
        raise UsageError(f"there is no backend {name!r}", fix=nearest(name, backends()))
    verdict = backends()[name].available(device)
    if not verdict.ok:
        raise UsageError(
            f"the backend {name} cannot be used on {device}",
            where=verdict.reason,
            fix="leave --backend out, or use reference",
        )


def takes_dtype(dtype: torch.dtype) -> Verdict:
    """Say whether weights of a dtype can be packed."""
    if dtype in DTYPES:
        return Verdict(True)
    return Verdict(False, f"weights are {str(dtype).removeprefix('torch.')}, not 16 bits")


def has_tensor_cores(device: torch.device) -> Verdict:
    """Say whether a device is a CUDA device of sm_80 or newer."""
    if device.type != "cuda":
        return Verdict(False, f"the device is {device.type}, not cuda")
    if not torch.cuda.is_available():
        return Verdict(False, "no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return Verdict(False, f"the chip is sm_{major}{minor}, below sm_80")
    return Verdict(True)
