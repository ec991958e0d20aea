"""The block at work on several devices of one machine, so that its batches run side by side.

The first device is the one that holds the model; the others get a copy of one block at a time.
A launch on a GPU does not wait for it, so one thread hands batch after batch to device after
device, and what comes back is used in the order of the batches: the result is that of one device.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from prunebench.models.linears import Linear
from prunebench.models.taps import InputHook, capture_inputs


class BlockReplicas:
    """One block on every device: as it is on the first, a copy on each of the others.

    Args:
        block: The block, with its weights in place on the first device.
        linears: Its prunable matrices.
        devices: Where batches run, in turn.
    """

    def __init__(
        self, block: nn.Module, linears: list[Linear], devices: Sequence[torch.device]
    ) -> None:
        self._devices = devices
        self._blocks = [block, *(copy_to(block, device) for device in devices[1:])]
        self._copies: dict[Linear, list[Linear]] = {linear: [] for linear in linears}
        for copied in self._blocks[1:]:
            twin = dict(zip(block.modules(), copied.modules(), strict=True))
            for linear, copies in self._copies.items():
                copies.append(dataclasses.replace(linear, module=twin[linear.module]))

    def at(self, batch: int) -> tuple[nn.Module, torch.device]:
        """Return the block that runs a batch, and where."""
        which = batch % len(self._devices)
        return self._blocks[which], self._devices[which]

    @contextlib.contextmanager
    def capture_inputs(
        self, linears: list[Linear], tap: InputHook, *, by_product: Collection[Linear] = ()
    ) -> Iterator[None]:
        """Call `tap(linear, input)` before one of `linears` is applied, on whichever device."""
        original = {twin: one for one in linears for twin in (one, *self._copies[one])}
        products = [twin for twin, one in original.items() if one in by_product]
        tell = lambda twin, inputs: tap(original[twin], inputs)  # noqa: E731
        with capture_inputs(list(original), tell, by_product=products):
            yield

    def broadcast_weights(self, linears: Sequence[Linear]) -> None:
        """Bring what was written to some of the matrices to the other devices."""
        for linear in linears:
            for twin in self._copies[linear]:
                twin.stored.copy_(linear.stored)


def copy_to(block: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a block whose tensors are on `device`; nothing is copied in between."""
    memo: dict[int, object] = {}
    for one in block.parameters():
        memo[id(one)] = nn.Parameter(_copied(one, device), requires_grad=one.requires_grad)
    for buffer in block.buffers():
        memo[id(buffer)] = _copied(buffer, device)
    return copy.deepcopy(block, memo)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)
