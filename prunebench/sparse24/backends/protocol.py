"""The contract of a backend: a kind of kernel that multiplies by a packed 2:4 matrix.

A backend is one class in one file, and one entry in `table.py`. There is no silent fallback: a
backend that cannot be used returns the reason in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.layouts import WeightLayout
from prunebench.sparse24.packed import DTYPES, Packed24

MIN_CAPABILITY = (8, 0)
"""Sparse tensor cores and bfloat16 need sm_80."""


@dataclass(frozen=True)
class Support:
    """Whether a backend can be used; `reason` is why not, or a remark."""

    ok: bool
    reason: str = ""


class Product(Protocol):
    """Multiplies by the matrix of one layer."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that the product stores in addition to the layer's layout."""

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, [tokens, out]."""

    def settings(self, tokens: int) -> str:
        """Return the launch parameters (algorithm, tiles, split); empty if there are none."""


class Backend(Protocol):
    """A kind of kernel.

    Attributes:
        name: The value of `--backend`.
        keeps_second_copy: Whether its product stores the weight once more, in a format of its own;
            such a backend is used only with `--storage speed`, or if forced.
    """

    name: str
    keeps_second_copy: bool

    def available(self, device: torch.device) -> Support:
        """Return whether it runs on this device at all."""

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return whether it supports a matrix (out, in) and a number of tokens."""

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return the weight in the layout that the kernel reads; None if it accepts any."""

    def build(self, form: WeightLayout) -> Product:
        """Return a product by the matrix."""


def takes_dtype(dtype: torch.dtype) -> Support:
    """Return whether weights of a dtype can be packed."""
    if dtype in DTYPES:
        return Support(True)
    return Support(False, f"weights are {str(dtype).removeprefix('torch.')}, not 16 bits")


def has_tensor_cores(device: torch.device) -> Support:
    """Return whether a device is a CUDA device of sm_80 or newer."""
    if device.type != "cuda":
        return Support(False, f"the device is {device.type}, not cuda")
    if not torch.cuda.is_available():
        return Support(False, "no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return Support(False, f"the chip is sm_{major}{minor}, below sm_80")
    return Support(True)
