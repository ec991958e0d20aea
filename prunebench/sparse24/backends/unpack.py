"""`reference` and `decompress`: unpack the weight, then multiply dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prunebench.sparse24.backends.protocol import Product, Support, takes_dtype
from prunebench.sparse24.layouts import WeightLayout, Workspace
from prunebench.sparse24.packed import Packed24


class Reference:
    """Unpack into new memory, then multiply: what the other backends are compared with."""

    name = "reference"
    keeps_second_copy = False

    def available(self, device: torch.device) -> Support:
        """Supported on every device."""
        return Support(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Every shape, dtype and number of tokens."""
        return Support(True)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Any layout will do."""
        return None

    def build(self, form: WeightLayout) -> Product:
        """Return a product that unpacks into new memory at each call."""
        return UnpackedProduct(form, None)


class Decompress:
    """Unpack a layer into a workspace that all layers share, then multiply dense.

    Keeps the gain in memory on any GPU, for any number of tokens.
    """

    name = "decompress"
    keeps_second_copy = False

    def __init__(self) -> None:
        self.workspace = Workspace()

    def available(self, device: torch.device) -> Support:
        """Supported on CUDA; on a CPU it would be `reference` with a workspace of its own."""
        if device.type != "cuda":
            return Support(False, f"the device is {device.type}, not cuda")
        return Support(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """All 16-bit matrices."""
        return takes_dtype(dtype)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Any layout will do."""
        return None

    def build(self, form: WeightLayout) -> Product:
        """Return a product that unpacks into the shared workspace at each call."""
        return UnpackedProduct(form, self.workspace)


@dataclass(frozen=True)
class UnpackedProduct:
    """A product by the unpacked matrix, in a shared workspace or in new memory."""

    form: WeightLayout
    workspace: Workspace | None

    @property
    def stored_bytes(self) -> int:
        """Nothing beside the layer's own layout."""
        return 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Unpack and multiply."""
        if self.workspace is None:
            dense = torch.empty(self.form.shape, dtype=self.form.dtype, device=self.form.device)
        else:
            dense = self.workspace.matrix(self.form)
        self.form.write_dense(dense)
        return functional.linear(x, dense, bias)

    def workspace_bytes(self, tokens: int) -> int:
        """The dense matrix."""
        rows, width = self.form.shape
        return rows * width * self.form.dtype.itemsize

    def settings(self, tokens: int) -> str:
        """There is no choice."""
        return ""
