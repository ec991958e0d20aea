"""The dense stream beside the pruned one, and the recovery of a block between the two.

    dense   xb[l+1] = f_l(xb[l]; dense weights)      the target of block l
    pruned  xs[l+1] = f_l(xs[l]; recovered weights)  what the next block reads

The dense stream is one more store of hidden states. The dense weights of a block are needed once,
before it is pruned. With the target `local` the store holds f_l(xs[l]; dense weights) instead.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import CheckFailed, IncompatibleData
from prunebench.models.activations import Activations
from prunebench.models.calibrated import Calibration
from prunebench.models.linears import Linear
from prunebench.models.pruned_block import PrunedBlock, RecoveredBlock, Recovery, WindowBatch
from prunebench.models.replay import BlockCall
from prunebench.models.replicas import BlockReplicas
from prunebench.models.weights import WeightStore

_MOST_FAILURES = 3  # blocks in a row whose training failed


class Streams:
    """Computes the targets of each block before it is pruned, and has it recovered afterwards.

    Args:
        recovery: What trains the blocks.
        data: The calibration set on its way through the pruned model.
        store: An empty store for the dense stream.
        repeats: Uses of an earlier block's matrix by a later block.

    Raises:
        IncompatibleData: Blocks share weights, or pass each other more than the hidden state.
    """

    def __init__(
        self,
        recovery: Recovery,
        data: Calibration,
        store: Activations,
        *,
        repeats: Mapping[Linear, Linear],
    ) -> None:
        for repeat, linear in repeats.items():
            raise IncompatibleData(
                f"{linear.name} cannot be recovered with its block",
                where=f"blocks {linear.block_index} and {repeat.block_index} share its weight",
                fix="leave --recover out",
            )
        self._recovery = recovery
        self._data = data
        self._targets = store
        self._tokens: dict[str, int] | None = None
        self._seconds = 0.0
        self._batch = WindowBatch()
        self._places = [
            (batch, row) for batch, hidden in enumerate(data.hidden) for row in range(len(hidden))
        ]
        if len(self._places) != data.samples or data.leaves_tensors:
            raise IncompatibleData(
                f"the blocks of {type(data.model).__name__} cannot be recovered one by one",
                where="blocks leave tensors for later blocks beside the hidden state"
                if data.leaves_tensors
                else "the first axis of its hidden states is not the window",
                fix="leave --recover out",
            )
        # no copy: neither stream is changed in place
        for hidden in data.hidden:
            store.append(hidden)

    @property
    def is_dense(self) -> bool:
        """Whether the store holds the dense stream, so that it is saved with every block."""
        return self._recovery.recoverer.target == "dense"

    @property
    def stored(self) -> Activations:
        """The dense stream (or the local targets), by batch."""
        return self._targets

    def advance(self, replicas: BlockReplicas, index: int, linears: Sequence[Linear] = ()) -> None:
        """Run the dense block: the store then holds the targets of block `index`.

        Args:
            replicas: The block, not yet pruned.
            index: Its index.
            linears: Its matrices, to count the tokens of each where the text decides.
        """
        start_time = time.perf_counter()
        source = self._targets if self.is_dense else self._data.hidden
        plan = self._data.plans[index]
        self._tokens = None
        if plan.dynamic and linears:
            counts = {linear.name: 0 for linear in linears}

            def count(linear: Linear, inputs: Tensor) -> None:
                counts[linear.name] += inputs.shape[:-1].numel()

            with replicas.capture_inputs(list(linears), count, by_product=plan.by_product):
                self._data.propagate(replicas, index, source=source, into=self._targets)
            self._tokens = counts
        else:
            self._data.propagate(replicas, index, source=source, into=self._targets)
        self._seconds = time.perf_counter() - start_time

    def recover(
        self, module: nn.Module, index: int, linears: list[Linear], notes: Sequence[Sequence[Any]]
    ) -> dict[str, Any]:
        """Have a pruned block recovered; return the note of it.

        Args:
            module: The block on the model's device.
            index: Its index.
            linears: Its matrices.
            notes: Those of the blocks before.

        Raises:
            CheckFailed: The recoverer has changed a pruned weight.
            IncompatibleData: The training of three blocks in a row failed.
        """
        start_time = time.perf_counter()
        zeros = {linear.name: linear.stored == 0 for linear in linears}
        pruned = PrunedBlock(
            index=index,
            module=module,
            linears=linears,
            samples=self._data.samples,
            seqlen=self._data.seqlen,
            tokens=self._tokens,
            seed=self._recovery.seed * 100_003 + index,
            inputs=lambda windows: self._rows(self._data.hidden, windows),
            targets=lambda windows: self._rows(self._targets, windows),
            call=lambda windows: self._call(index, windows),
            batch=self._batch,
            sparsity=self._recovery.sparsity,
            grid=self._recovery.grid,
        )
        record = self._recovery.recoverer.recover_block(pruned)
        added: dict[str, int] = {}
        for linear in linears:
            now = linear.stored == 0
            more = int(now.sum()) - int(zeros[linear.name].sum())
            # a mask that moves has as many zeros; where they may be is checked after the walk
            moved = not bool((now | ~zeros[linear.name]).all())
            if more < 0 or (moved and not self._recovery.recoverer.moves_mask):
                raise CheckFailed(
                    f"the recovery changed pruned weights of {linear.name}",
                    where="weights that were 0 are not 0 afterwards",
                    fix="this is an error of the recoverer: see prunebench check recover:NAME",
                )
            if more:
                added[linear.name] = more
        seconds = self._seconds + time.perf_counter() - start_time
        record = dataclasses.replace(record, block=index, zeros=added, seconds=round(seconds, 3))
        self._recovery.report(record)
        note = {"recovery": asdict(record)}
        _require_progress([*recovered_blocks(notes), record])
        return note

    def _rows(self, store: Activations, windows: Sequence[int]) -> Tensor:
        """Return the hidden states of some windows, (windows, seqlen, hidden), on the device."""
        places = [self._places[window] for window in windows]
        return torch.stack([store[batch][row] for batch, row in places]).to(self._data.device)

    def _call(self, index: int, windows: Sequence[int]) -> BlockCall:
        return self._data.call_of(tuple(windows))[index]


def recovered_blocks(notes: Sequence[Sequence[Any]]) -> list[RecoveredBlock]:
    """Return what the recovery did, by block, from the notes of a walk."""
    rows = (row["recovery"] for block in notes for row in block if "recovery" in row)
    return [RecoveredBlock(**{**row, "untrained": tuple(row["untrained"])}) for row in rows]


def _require_progress(records: list[RecoveredBlock]) -> None:
    last = records[-_MOST_FAILURES:]
    if len(last) == _MOST_FAILURES and all(record.event for record in last):
        raise IncompatibleData(
            f"the recovery of {_MOST_FAILURES} blocks in a row failed",
            where=f"block {last[-1].block}: {last[-1].event}",
            fix="use a smaller rate, float32, or leave --recover out",
        )


def restore_streams(
    weights: WeightStore,
    start: int,
    data: Calibration | None,
    streams: Streams | None,
    replicate: Callable[[nn.Module, int], BlockReplicas],
) -> None:
    """Restore the activations before block `start`: read them, or run the finished blocks.

    Args:
        weights: Where the blocks and the saved activations are.
        start: The first block that is not finished.
        data: The calibration set, if the walk has one.
        streams: Its dense stream, if the walk has one.
        replicate: Returns an open block with its replicas.
    """
    if data is None or not 0 < start < len(data.plans):
        return
    # tensors that blocks left in their arguments are not saved: run the blocks again
    saved = None if data.leaves_tensors else weights.saved_hidden(start)
    count = len(data.hidden)
    for batch, hidden in enumerate((saved or [])[:count]):
        data.hidden[batch] = hidden
    for index in range(0 if saved is None else start, start):
        with weights.open_block(index) as block:
            data.propagate(replicate(block, index), index)
    if streams is None or not streams.is_dense:
        return
    for batch, hidden in enumerate((saved or [])[count:]):
        streams.stored[batch] = hidden
    if saved is None:
        with weights.unpruned():
            for index in range(start):
                with weights.open_block(index) as block:
                    streams.advance(replicate(block, index), index)


def with_dense(hidden: Activations, streams: Streams | None) -> Iterator[Tensor]:
    """Yield the tensors to save after a block: the pruned stream, then the dense one."""
    yield from hidden
    if streams is not None and streams.is_dense:
        yield from streams.stored
