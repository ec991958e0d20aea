"""The weights of one block at a time, masked into one workspace that all blocks use in turn.

The dense weights stay where they are and are never written while masks are learned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.models.linears import Linear

Fill = Callable[[Linear, Float[Tensor, "out in"]], None]
"""Writes the masked weight of a linear into a contiguous tensor of the weight's dtype."""


class MaskedWeights:
    """A weight store whose blocks hold whatever `fill` writes.

    Attributes:
        fill: Called for every linear when its block is opened.
    """

    def __init__(self, blocks: nn.ModuleList, linears: Sequence[Linear], fill: Fill) -> None:
        self.fill = fill
        self._blocks = blocks
        self._parameters: list[list[tuple[nn.Parameter, list[Linear]]]] = []
        for index in range(len(blocks)):
            found: dict[int, tuple[nn.Parameter, list[Linear]]] = {}
            for one in linears:
                if one.block_index == index:
                    parameter: nn.Parameter = getattr(one.module, one.attribute)
                    found.setdefault(id(parameter), (parameter, []))[1].append(one)
            self._parameters.append(list(found.values()))
        largest = max(sum(p.numel() for p, _ in block) for block in self._parameters)
        first = self._parameters[0][0][0]
        self._workspace = torch.empty(largest, dtype=first.dtype, device=first.device)

    @contextlib.contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Put the masked weights in the place of the dense ones, and put those back afterwards."""
        views: list[Tensor] = []
        begin = 0
        for parameter, members in self._parameters[index]:
            views.append(self._workspace[begin : begin + parameter.numel()].view(parameter.shape))
            begin += parameter.numel()
            for linear in members:
                self._fill(linear, views[-1])
        dense = [parameter.data for parameter, _ in self._parameters[index]]
        try:
            for (parameter, _), view in zip(self._parameters[index], views, strict=True):
                parameter.data = view
            yield self._blocks[index]
        finally:
            for (parameter, _), data in zip(self._parameters[index], dense, strict=True):
                parameter.data = data

    def _fill(self, linear: Linear, view: Tensor) -> None:
        if linear.transposed:
            straight = view.new_empty(linear.out_features, linear.in_features)
            self.fill(linear, straight)
            view.copy_(straight.T)
        else:
            self.fill(linear, view if linear.expert is None else view[linear.expert])
