"""The tensors of a block that is read from disk: where they go in the model, and host buffers."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter or persistent buffer of a block.

    Attributes:
        name: Name in the model.
        module: The module that owns it.
        attribute: Name in the module.
        dtype: Dtype in the model; the file may have another.
    """

    name: str
    module: nn.Module
    attribute: str
    dtype: torch.dtype

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor."""
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.module._parameters[self.attribute] = parameter

    def get(self) -> Tensor:
        """Return the present tensor."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor.data


class BufferPool:
    """Reused host buffers, each large enough for any block.

    Allocating anew for every block would fragment the heap: longer-lived tensors are allocated
    between two blocks, and the freed pieces, too small for the next block's tensors, would add up
    to the size of the model.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """Return a free buffer, or a new one."""
        return self._free.pop() if self._free else torch.empty(self._size, dtype=torch.uint8)

    def give_back(self, buffer: Tensor | None) -> None:
        """Free a buffer; tensors in it must not be used any more."""
        if buffer is not None:
            self._free.append(buffer)


def parameter_slots(
    block: nn.Module, prefix: str, stored: Container[str]
) -> Iterator[ParameterSlot]:
    """Yield the parameters and buffers of a block that are stored in files.

    Args:
        block: The block.
        prefix: Its name in the model, with a dot at the end.
        stored: Names of the stored tensors.
    """
    for path, module in block.named_modules():
        inside = f"{prefix}{path}." if path else prefix
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and f"{inside}{attribute}" in stored:
                yield ParameterSlot(f"{inside}{attribute}", module, attribute, tensor.dtype)
