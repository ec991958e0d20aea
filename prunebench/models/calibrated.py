"""The calibration set on its way through the blocks: hidden states and the arguments of each call.

If a batch runs out of memory, all batches run in smaller parts from then on: `Calibration.halve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.calibration.stats import StatsAccumulator, Workspace
from prunebench.models.activations import Activations
from prunebench.models.out_of_memory import is_out_of_memory, report_halved
from prunebench.models.plan import BlockPlan, LaterUse
from prunebench.models.replay import BlockCall, Copies, record_calls, share_arguments
from prunebench.models.replicas import BlockReplicas


class Calibration:
    """The hidden states before the current block and the arguments of every block, by batch.

    Args:
        model: The model, under `plain_inference`.
        blocks: Its blocks.
        token_ids: (samples, seqlen).
        plans: How each block uses its linears.
        hidden: An empty store for the hidden states.
        devices: Where the batches run, round-robin; the model is on the first.
        part: Sequences in a batch.
        hessian: Whether statistics include the Gram matrix.
        later: For each block the uses of its matrices by later blocks.

    Attributes:
        hidden: For every batch the input of the current block, (samples, seqlen, hidden).
        calls: Arguments by batch, part and block. A batch has one part until a batch has run out
            of memory.
        part: Sequences in a part.
        samples: Sequences in the calibration set.
        seqlen: Tokens of one.
        model: The model.
        device: The model's device.
        leaves_tensors: Whether blocks put tensors into the arguments of later ones.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        token_ids: Int[Tensor, "samples seqlen"],
        plans: list[BlockPlan],
        *,
        hidden: Activations,
        devices: Sequence[torch.device],
        part: int,
        hessian: bool,
        later: Sequence[Sequence[LaterUse]],
    ) -> None:
        self.plans = plans
        self.hidden = hidden
        self.part = part
        self.samples, self.seqlen = token_ids.shape
        self.later = later
        self.leaves_tensors = any(plan.leaves_tensors for plan in plans)
        self._hessian = hessian
        self.model = model
        self.device = devices[0]
        self._blocks = blocks
        self._token_ids = token_ids
        self._devices = devices
        self._workspace: Workspace = {}
        self._call_of: dict[tuple[int, ...], list[BlockCall]] = {}
        self._rows = [len(batch) for batch in torch.split(token_ids, part)]  # fixed; parts halve
        calls: list[list[list[BlockCall]]] = []
        for batch in torch.split(token_ids, part):
            first, recorded = self._record(batch)
            hidden.append(first)  # [samples, seqlen, hidden]
            calls.append([share_arguments(recorded, calls[0][0]) if calls else recorded])
        self.calls = self._to_devices(calls)

    def accumulator(self) -> StatsAccumulator:
        """Return an empty accumulator of the statistics that the method needs."""
        return StatsAccumulator(self._workspace, hessian=self._hessian, devices=self._devices)

    def halve(self) -> None:
        """Run half as many sequences at a time from now on; the batches stay as they are."""
        self.part = (self.part + 1) // 2
        report_halved("calibration", self.part)
        # A mask of 16 sequences does not fit 8: the arguments of every part are recorded again.
        size = self._rows[0]
        calls: list[list[list[BlockCall]]] = []
        for batch in torch.split(self._token_ids, size):
            parts = [self._record(part)[1] for part in torch.split(batch, self.part)]
            first = calls[0][0] if calls else parts[0]
            calls.append([share_arguments(part, first) for part in parts])
        self.calls = self._to_devices(calls)

    def parts(self, batch: int, hidden: Tensor) -> Iterator[tuple[list[BlockCall], Tensor]]:
        """Yield a batch's parts: the arguments of every block, and the rows of `hidden`."""
        calls = self.calls[batch]
        # [samples, seqlen, hidden] -> parts of [part, seqlen, hidden]
        rows = (hidden,) if len(calls) == 1 else torch.split(hidden, self.part)
        return zip(calls, rows, strict=True)

    def can_halve(self) -> bool:
        """Return whether fewer sequences can run at a time.

        The first axis of the hidden states must be the samples, and blocks must not leave tensors
        in their arguments: recording these again would lose them.
        """
        return (
            self.part > 1
            and not self.leaves_tensors
            and all(
                len(hidden) == rows for hidden, rows in zip(self.hidden, self._rows, strict=True)
            )
        )

    def forward(self, replicas: BlockReplicas, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Run a block on a batch, part by part; return its output, (samples, seqlen, hidden)."""
        block, device = replicas.at(batch)
        parts = [
            call[index].run(block, rows.to(device)) for call, rows in self.parts(batch, hidden)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def propagate(
        self,
        replicas: BlockReplicas,
        index: int,
        *,
        source: Activations | None = None,
        into: Activations | None = None,
    ) -> None:
        """Run a block on all batches.

        Args:
            replicas: The block.
            index: Its index.
            source: Its inputs; by default `hidden`.
            into: Where its outputs go; by default `hidden`, which then holds the inputs of the next
                block.
        """
        source = self.hidden if source is None else source
        into = self.hidden if into is None else into
        for batch in range(len(source)):
            while True:
                try:
                    hidden = source[batch]
                    into[batch] = self.forward(replicas, index, batch, hidden)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or not self.can_halve():
                        raise
                self.halve()  # outside the except clause, whose traceback keeps tensors alive

    def call_of(self, windows: tuple[int, ...]) -> list[BlockCall]:
        """Return the arguments of every block for some windows that run together."""
        if windows not in self._call_of:
            calls = self._record(self._token_ids[list(windows)])[1]
            # the arguments of as many windows are mostly equal: one copy
            alike = (known for key, known in self._call_of.items() if len(key) == len(windows))
            self._call_of[windows] = share_arguments(calls, next(alike, calls))
        return self._call_of[windows]

    def _record(self, token_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the first block's input and every block's arguments."""
        returns = [plan.returns for plan in self.plans]
        ids = token_ids.to(self._devices[0])
        return record_calls(self.model, self._blocks, ids, returns_tuple=returns)

    def _to_devices(self, calls: list[list[list[BlockCall]]]) -> list[list[list[BlockCall]]]:
        """Return the calls with the arguments of every batch on the device where it will run."""
        copies: list[Copies] = [{} for _ in self._devices]
        moved = []
        for batch, parts in enumerate(calls):
            replica = batch % len(self._devices)
            if replica:
                device = self._devices[replica]
                parts = [[call.to(device, copies[replica]) for call in part] for part in parts]
            moved.append(parts)
        return moved
