"""The calibration set on its way through the blocks: hidden states, and arguments of every call.

A batch that is too much for the memory runs in parts from then on, see `Calibration.halve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.calibration.stats import StatsAccumulator, Workspace
from prunebench.models.activations import Activations
from prunebench.models.out_of_memory import is_out_of_memory, tell_halved
from prunebench.models.plan import BlockPlan, LaterUse
from prunebench.models.replay import BlockCall, Known, record_calls, share_arguments
from prunebench.models.replicas import BlockReplicas


class Calibration:
    """The hidden states before the current block and the arguments of every block, by batch.

    Args:
        model: The model, under `plain_inference`.
        blocks: Its blocks.
        token_ids: (samples, seqlen).
        plans: How each block uses its linears.
        hidden: An empty place for the hidden states.
        devices: Where the batches run, in turn; the model is on the first.
        part: Sequences in a batch.
        hessian: Whether statistics include the Gram matrix.
        later: For each block the uses of its matrices by later blocks.

    Attributes:
        calls: For every batch the arguments of its parts: one part, or more where a whole batch
            was too much for the memory.
        part: Sequences in a part.
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
        self.samples = len(token_ids)
        self.later = later
        self.leaves_tensors = any(plan.leaves_tensors for plan in plans)
        self._hessian = hessian
        self._model = model
        self._blocks = blocks
        self._token_ids = token_ids
        self._devices = devices
        self._workspace: Workspace = {}
        self._rows = [len(batch) for batch in torch.split(token_ids, part)]
        calls: list[list[list[BlockCall]]] = []
        for batch in torch.split(token_ids, part):
            first, made = self._record(batch)
            hidden.append(first)
            calls.append([share_arguments(made, calls[0][0]) if calls else made])
        self.calls = self._sent(calls)

    def accumulator(self) -> StatsAccumulator:
        """Return an empty accumulator of what the method needs."""
        return StatsAccumulator(self._workspace, hessian=self._hessian, devices=self._devices)

    def halve(self) -> None:
        """Run half as many sequences at a time from now on."""
        self.part = (self.part + 1) // 2
        tell_halved("calibration", self.part)
        size = self._rows[0]
        calls: list[list[list[BlockCall]]] = []
        for batch in torch.split(self._token_ids, size):
            made = [self._record(part)[1] for part in torch.split(batch, self.part)]
            first = calls[0][0] if calls else made[0]
            calls.append([share_arguments(one, first) for one in made])
        self.calls = self._sent(calls)

    def parts(self, batch: int, hidden: Tensor) -> Iterator[tuple[list[BlockCall], Tensor]]:
        """Yield a batch's parts: the arguments of every block, and the rows of `hidden`."""
        calls = self.calls[batch]
        rows = (hidden,) if len(calls) == 1 else torch.split(hidden, self.part)
        return zip(calls, rows, strict=True)

    def can_halve(self) -> bool:
        """Return whether less can run at a time.

        The first axis has to be that of the samples, and nothing may lie in the arguments that
        would have to be made again.
        """
        return (
            self.part > 1
            and not self.leaves_tensors
            and all(
                len(hidden) == rows for hidden, rows in zip(self.hidden, self._rows, strict=True)
            )
        )

    def forward(self, spread: BlockReplicas, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Run a block on a batch, in its parts, and return what it gives."""
        block, device = spread.at(batch)
        parts = [
            call[index].run(block, rows.to(device)) for call, rows in self.parts(batch, hidden)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def propagate(self, spread: BlockReplicas, index: int) -> None:
        """Run a block on all batches: the hidden states are those before the next one."""
        for batch in range(len(self.hidden)):
            while True:
                try:
                    hidden = self.hidden[batch]
                    self.hidden[batch] = self.forward(spread, index, batch, hidden)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or not self.can_halve():
                        raise
                self.halve()

    def _record(self, token_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        returns = [plan.returns for plan in self.plans]
        ids = token_ids.to(self._devices[0])
        return record_calls(self._model, self._blocks, ids, returns_tuple=returns)

    def _sent(self, calls: list[list[list[BlockCall]]]) -> list[list[list[BlockCall]]]:
        """Return the calls with the arguments of every batch where it will run."""
        known: list[Known] = [{} for _ in self._devices]
        sent = []
        for batch, parts in enumerate(calls):
            which = batch % len(self._devices)
            if which:
                device = self._devices[which]
                parts = [[call.to(device, known[which]) for call in part] for part in parts]
            sent.append(parts)
        return sent
