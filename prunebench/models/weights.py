"""Where the weights of a block are while it is worked on.

A pruner reads and writes `Linear`s; the walker opens a block before it hands them out, keeps what
was written, and closes it. What happens in between (nothing, or a read from disk and a write back,
see `models.disk`) is the store's business alone.
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
    """Makes the weights of one block present; a `WeightStore` does so too."""

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return the block with its weights in place, to be used in a `with` statement."""


@runtime_checkable
class WeightStore(Protocol):
    """Makes the weights of one block present, and keeps what was written to them."""

    @property
    def finished(self) -> Sequence[Sequence[Any]]:
        """The notes of the first blocks, which an interrupted run has pruned already."""

    def open_block(
        self, index: int, *, then: int | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Return the block with its weights in place, to be used in a `with` statement.

        Args:
            index: Which one.
            then: The one that will be opened next, so that it can be fetched; by default the
                following one.
        """

    def save_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Keep what was written to an open block.

        Args:
            index: Which one.
            notes: What the pruning method has to say of it, as JSON has it.
            hidden: The calibration activations behind it, if the run could go on from there.
        """

    def saved_hidden(self, index: int) -> list[Tensor] | None:
        """Return the activations before block `index` that an interrupted run has kept, if any."""

    def activations(self, device: torch.device) -> Activations:
        """Return an empty place for hidden states between blocks."""


class ResidentWeights:
    """All weights stay where the model has them, in host memory or on one device."""

    finished: Sequence[Sequence[Any]] = ()

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks

    def open_block(
        self, index: int, *, then: int | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Return the block as it is."""
        return contextlib.nullcontext(self._blocks[index])

    def save_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Do nothing: what was written is in the model."""

    def saved_hidden(self, index: int) -> list[Tensor] | None:
        """Return None: what is only in memory ends with the process."""
        return None

    def activations(self, device: torch.device) -> Activations:
        """Return a place in the memory of `device`."""
        return Activations(device)


_STORES: weakref.WeakKeyDictionary[nn.Module, WeightStore] = weakref.WeakKeyDictionary()


def set_weights_of(model: nn.Module, store: WeightStore) -> None:
    """Say where the weights of a model are that is not whole in memory."""
    _STORES[model] = store


def weights_of(model: nn.Module) -> WeightStore:
    """Return where the weights of a model are; by default where the model has them."""
    return _STORES.get(model) or ResidentWeights(find_blocks(model)[1])
