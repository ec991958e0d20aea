"""What a backend is: a kind of kernel that multiplies by a packed 2:4 matrix.

A backend is one file with one class, and one entry in `table.py`. Nothing falls back in silence: a
backend that is not used gives its reason in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.layouts import WeightLayout
from prunebench.sparse24.packed import DTYPES, Packed24

DECODE_TOKENS = 64
"""Most tokens for which a product is bound by memory, and not by arithmetic."""

MIN_CAPABILITY = (8, 0)
"""2:4 in hardware, and bfloat16, begin with sm_80."""


@dataclass(frozen=True)
class Support:
    """Whether a backend can be used; `reason` says why not, or what to know."""

    ok: bool
    reason: str = ""


class Product(Protocol):
    """A layer's matrix, ready to be multiplied by."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that this backend stores beside the layer's own layout."""

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, (tokens, out)."""

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes that a call allocates and frees."""

    def settings(self, tokens: int) -> str:
        """How the kernel is started (algorithm, tiles, split); empty if there is no choice."""


class Backend(Protocol):
    """A kind of kernel.

    Attributes:
        name: As `--backend` takes it.
        keeps_second_copy: Whether its product stores the weight once more, in a form of its own;
            such a backend is used only where memory is traded for speed.
    """

    name: str
    keeps_second_copy: bool

    def available(self, device: torch.device) -> Support:
        """Return whether it runs on this device at all."""

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return whether it takes a matrix (out, in) and that many tokens."""

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return the weight in the layout that the kernel reads; None if it reads any."""

    def build(self, form: WeightLayout) -> Product:
        """Return the product by a matrix."""


def takes_dtype(dtype: torch.dtype) -> Support:
    """Say whether weights of a dtype can be packed."""
    if dtype in DTYPES:
        return Support(True)
    return Support(False, f"weights are {str(dtype).removeprefix('torch.')}, not 16 bits")


def has_tensor_cores(device: torch.device) -> Support:
    """Say whether a device is a CUDA device of sm_80 or newer."""
    if device.type != "cuda":
        return Support(False, f"the device is {device.type}, not cuda")
    if not torch.cuda.is_available():
        return Support(False, "no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return Support(False, f"the chip is sm_{major}{minor}, below sm_80")
    return Support(True)
