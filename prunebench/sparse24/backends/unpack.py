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
    """Unpack into new memory, then multiply: the reference of the other backends, on any device."""

    name = "reference"
    keeps_second_copy = False

    def available(self, device: torch.device) -> Support:
        """Return support: every device."""
        return Support(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: every shape, dtype and number of tokens."""
        return Support(True)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return None: any layout is accepted."""
        return None

    def build(self, form: WeightLayout) -> Product:
        """Return a product that unpacks into new memory at each call."""
        return UnpackedProduct(form, None)


class Decompress:
    """Unpack a layer into a workspace that all layers share, then multiply dense.

    Saves memory on any GPU, for any number of tokens; no speedup.
    """

    name = "decompress"
    keeps_second_copy = False

    def __init__(self) -> None:
        self.workspace = Workspace()

    def available(self, device: torch.device) -> Support:
        """Return support on CUDA; on a CPU it has no advantage over `reference`."""
        if device.type != "cuda":
            return Support(False, f"the device is {device.type}, not cuda")
        return Support(True)

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: all 16-bit matrices."""
        return takes_dtype(dtype)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return None: any layout is accepted."""
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
        """0: nothing beside the layer's layout."""
        return 0

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Unpack and multiply."""
        # `torch.compile` cannot trace a lock; its graphs reuse the memory of their tensors.
        if self.workspace is not None and not torch.compiler.is_compiling():
            with self.workspace.unpacked(self.form) as dense:
                return functional.linear(x, dense, bias)
        dense = torch.empty(self.form.shape, dtype=self.form.dtype, device=self.form.device)
        self.form.write_dense(dense)
        return functional.linear(x, dense, bias)

    def settings(self, tokens: int) -> str:
        """Return "": there are no launch parameters."""
        return ""
