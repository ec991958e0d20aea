"""Weight stores: load the weights of a block, and save what was written to them.

A pruner reads and writes `Linear`s; the walker opens a block before it yields them, saves what was
written, and closes the block. A store implements these steps: `ResidentWeights` does nothing,
`models.disk` reads a block from disk and writes it back.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunebench.models.activations import Activations
from prunebench.models.linears import find_blocks


@runtime_checkable
class Blocks(Protocol):
    """Loads the weights of one block at a time; every `WeightStore` is one."""

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return a context manager that yields the block with its weights loaded."""


@runtime_checkable
class WeightStore(Protocol):
    """Loads the weights of one block at a time, and saves what was written to them."""

    @property
    def finished(self) -> Sequence[Sequence[Any]]:
        """The notes of the blocks that an interrupted run has already pruned, from the first."""

    def open_block(
        self, index: int, *, then: int | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Return a context manager that yields the block with its weights loaded.

        Args:
            index: Index of the block.
            then: Index of the block that will be opened next, so that it can be prefetched; by
                default `index + 1`.
        """

    def save_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Save what was written to an open block.

        Args:
            index: Index of the block.
            notes: Events and losses of the pruning method (JSON-serializable).
            hidden: Calibration activations after the block, so that a run can resume there.
        """

    def saved_hidden(self, index: int) -> list[Tensor] | None:
        """Return the saved activations before block `index` of an interrupted run, if any."""

    def unpruned(self) -> AbstractContextManager[None]:
        """Return a context in which blocks open with their dense weights; nothing may be saved."""

    def activations(self, device: torch.device) -> Activations:
        """Return an empty store for hidden states between blocks."""


class ResidentWeights:
    """All weights stay in the model, in host memory or on one device."""

    finished: Sequence[Sequence[Any]] = ()

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks

    def open_block(
        self, index: int, *, then: int | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Return the block; its weights are in memory."""
        return contextlib.nullcontext(self._blocks[index])

    def save_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Do nothing: what was written is in the model."""

    def saved_hidden(self, index: int) -> list[Tensor] | None:
        """Return None: nothing is saved."""
        return None

    def unpruned(self) -> AbstractContextManager[None]:
        """Do nothing: no block is finished when a walk begins."""
        return contextlib.nullcontext()

    def activations(self, device: torch.device) -> Activations:
        """Return an empty store in the memory of `device`."""
        return Activations(device)


# a global, because any code that has a model may need to open its blocks
_STORES: weakref.WeakKeyDictionary[nn.Module, WeightStore] = weakref.WeakKeyDictionary()


def set_weights_of(model: nn.Module, store: WeightStore) -> None:
    """Register the weight store of a model that is not entirely in memory."""
    _STORES[model] = store


def weights_of(model: nn.Module) -> WeightStore:
    """Return the weight store of a model; `ResidentWeights` if none is registered."""
    return _STORES.get(model) or ResidentWeights(find_blocks(model)[1])
