"""Trained weights of one block at a time, in a workspace that all blocks share.

The weights of the model itself, the dense ones, are never written during a training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.models.linears import Linear

Fill = Callable[[Linear, Float[Tensor, "out in"]], None]
"""Writes the weight of a linear into a contiguous tensor of the weight's dtype."""


class FilledWeights:
    """A weight store whose blocks contain the weights that `fill` writes.

    Attributes:
        fill: Called for every linear when its block is opened.
    """

    def __init__(self, blocks: nn.ModuleList, linears: Sequence[Linear], fill: Fill) -> None:
        self.fill = fill
        self._blocks = blocks
        self._parameters: list[list[tuple[nn.Parameter, list[Linear]]]] = []
        for index in range(len(blocks)):
            # by identity: all experts of a fused mixture are slices of one parameter
            members: dict[int, tuple[nn.Parameter, list[Linear]]] = {}
            for linear in linears:
                if linear.block_index == index:
                    parameter: nn.Parameter = getattr(linear.module, linear.attribute)
                    members.setdefault(id(parameter), (parameter, []))[1].append(linear)
            self._parameters.append(list(members.values()))
        # Only one block is open at a time: the workspace is as large as the largest.
        largest = max(sum(p.numel() for p, _ in block) for block in self._parameters)
        first = self._parameters[0][0][0]
        self._workspace = torch.empty(largest, dtype=first.dtype, device=first.device)

    @contextlib.contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Replace the dense weights of a block by filled ones, and restore them at the end."""
        views: list[Tensor] = []
        start = 0
        for parameter, members in self._parameters[index]:
            views.append(self._workspace[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
            for linear in members:
                self._fill(linear, views[-1])
        # `.data` is swapped, not the Parameter: hooks and references to it stay valid.
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
            # Masks are along the inputs, which are not contiguous in a Conv1D: fill a copy, then
            # transpose.
            weight = view.new_empty(linear.out_features, linear.in_features)
            self.fill(linear, weight)
            view.copy_(weight.T)  # stored as [in, out]
        else:
            self.fill(linear, view if linear.expert is None else view[linear.expert])
