"""Replicas of one block on several devices of a machine, which run its batches in parallel.

The first device holds the model; the others get a copy of one block at a time. GPU launches are
asynchronous, so one thread launches batch after batch on device after device. Results are used in
the order of the batches, and are therefore those of one device.
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
    """One block on every device: the block itself on the first, a copy on each of the others.

    Args:
        block: The block, with its weights loaded on the first device.
        linears: Its prunable matrices.
        devices: Where batches run, round-robin.
    """

    def __init__(
        self, block: nn.Module, linears: list[Linear], devices: Sequence[torch.device]
    ) -> None:
        self._devices = devices
        self._blocks = [block, *(copy_to(block, device) for device in devices[1:])]
        self._copies: dict[Linear, list[Linear]] = {linear: [] for linear in linears}
        for copied in self._blocks[1:]:
            copy_of = dict(zip(block.modules(), copied.modules(), strict=True))
            for linear, copies in self._copies.items():
                copies.append(dataclasses.replace(linear, module=copy_of[linear.module]))

    def at(self, batch: int) -> tuple[nn.Module, torch.device]:
        """Return the replica that runs a batch, and its device."""
        replica = batch % len(self._devices)
        return self._blocks[replica], self._devices[replica]

    @contextlib.contextmanager
    def capture_inputs(
        self, linears: list[Linear], hook: InputHook, *, by_product: Collection[Linear] = ()
    ) -> Iterator[None]:
        """Call `hook(linear, input)` before one of `linears` is applied on any device."""
        original = {
            replica: linear for linear in linears for replica in (linear, *self._copies[linear])
        }
        products = [replica for replica, linear in original.items() if linear in by_product]

        def call_hook(replica: Linear, inputs: Tensor) -> None:
            hook(original[replica], inputs)

        with capture_inputs(list(original), call_hook, by_product=products):
            yield

    def broadcast_weights(self, linears: Sequence[Linear]) -> None:
        """Copy the weights of some linears from the first device to the others."""
        for linear in linears:
            for replica in self._copies[linear]:
                replica.stored.copy_(linear.stored)


def copy_to(block: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a block on `device`; no copy is made on the block's own device."""
    # deepcopy takes what is in its memo instead of copying: the tensors go straight to `device`
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(
            _copied(parameter, device), requires_grad=parameter.requires_grad
        )
    for buffer in block.buffers():
        memo[id(buffer)] = _copied(buffer, device)
    return copy.deepcopy(block, memo)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)
