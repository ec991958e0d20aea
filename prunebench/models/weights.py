"""Where the weights of a block are while it is worked on.

A pruner reads and writes `Linear`s; the walker opens a block before it hands them out and closes it
afterwards. What happens in between (nothing, a copy to a GPU, a read from disk) is the store's
business alone.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class WeightStore(Protocol):
    """Makes the weights of one block present, and keeps what was written to them."""

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return the block with its weights in place, to be used in a `with` statement."""


class ResidentWeights:
    """All weights stay where the model has them, in host memory or on one device."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return the block as it is."""
        return contextlib.nullcontext(self._blocks[index])
