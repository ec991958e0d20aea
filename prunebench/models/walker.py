"""The block walker: visit the decoder blocks in order, each with the inputs of the pruned model.

The walk is the same for every architecture and every one-shot method. For block b, with the blocks
before it already pruned:

- `joint` (the papers' protocol): the dense block runs over the calibration set, statistics are
  collected at all its linears, all are pruned, and the pruned block runs once more to compute the
  inputs of block b+1. The first pass stops at the input of the last linear, whose output is unused.
- `sequential`: every linear is pruned as soon as its input is computed and before it runs, so one
  pass does both and the statistics are those of the pruned model's inputs. The calibration batches
  run as greenlets that pause before each linear (see `_sequential`): the working set of a batch
  stays in cache, and nothing is computed twice.

With a recovery (`models.streams`) the dense block also runs over the dense stream before it is
pruned, and is trained after; then one pass computes the inputs of block b+1, in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.calibration.stats import InputStats, StatsAccumulator
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.calibrated import Calibration
from prunebench.models.collect import collect, collect_later
from prunebench.models.gradients import GradientNorms
from prunebench.models.linears import Linear, find_blocks, find_linears, find_repeats
from prunebench.models.out_of_memory import is_out_of_memory
from prunebench.models.plan import check_replay, separate_later_uses, why_not_sequential
from prunebench.models.pruned_block import RecoveredBlock, Recovery
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.replay import plain_inference, require_run
from prunebench.models.replicas import BlockReplicas
from prunebench.models.streams import Streams, recovered_blocks, restore_streams, with_dense
from prunebench.models.weights import ResidentWeights, WeightStore, weights_of
from prunebench.spec import WithinBlock

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_CHECK_TOKENS = 128  # enough: arguments that depend on the length are recorded for every batch


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input tensor, with its statistics.

    Attributes:
        linears: The linears; all have the same `in_features`.
        stats: Statistics of the input; None for methods without data.
        gradients: Gradient norms of the whole model, for methods that read them.
    """

    linears: tuple[Linear, ...]
    stats: InputStats | None
    gradients: GradientNorms | None = None


class BlockWalker:
    """Yield the linears of a model, group by group, with statistics of their inputs.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        token_ids: Calibration windows, (samples, seqlen), or None for methods that need none.
        within_block: The order inside a block, see the module's docstring.
        weights: The weight store; by default that of the model (`weights_of`).
        activation_device: Where hidden states are stored between blocks; by default the model's
            device.
        devices: Where the calibration batches run, round-robin; the first is the model's device,
            which is also the default.
        inputs: What the method needs besides statistics.
        recovery: Trains the kept weights of each block after it is pruned.
        batch_tokens: Tokens run through a block at a time; by default `BATCH_TOKENS` of the device.
        advance: Called with 1 after each block, and once with the number of restored blocks.

    Attributes:
        notes: Per-block events and losses of the pruning method (JSON-serializable). Saved with
            the block so that a resumed run can report them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        token_ids: Int[Tensor, "samples seqlen"] | None = None,
        within_block: WithinBlock = "joint",
        weights: WeightStore | None = None,
        activation_device: torch.device | None = None,
        devices: Sequence[torch.device] = (),
        inputs: PrunerInputs | None = None,
        recovery: Recovery | None = None,
        batch_tokens: int | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.linears = find_linears(model)
        self._repeats = find_repeats(model, self.linears)
        self.within_block = within_block
        self.inputs = inputs or PrunerInputs()
        self._recovery = recovery
        self._token_ids = token_ids
        self.notes: list[list[Any]] = []
        self._weights = weights or weights_of(model)
        self._device = next(model.parameters()).device
        self._activation_device = activation_device or self._device
        self._devices = devices or (self._device,)
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(self._device.type, 4096)
        self._advance = advance

    def linears_of(self, index: int) -> list[Linear]:
        """Return the prunable linears of one block."""
        return [linear for linear in self.linears if linear.block_index == index]

    @property
    def recovered(self) -> list[RecoveredBlock]:
        """What the recovery did, by block, restored blocks included."""
        return recovered_blocks(self.notes)

    def first_windows(self, count: int) -> Int[Tensor, "samples seqlen"]:
        """Return the first calibration windows, (count, seqlen), on the model's device.

        Raises:
            UsageError: There are no calibration tokens.
        """
        if self._token_ids is None:
            raise UsageError("this method needs calibration data", fix="give --calibration")
        return self._token_ids[:count].to(self._device)

    def groups(
        self,
        *,
        stats: bool,
        hessian: bool = False,
        within_block: WithinBlock | Literal["cheapest"] | None = None,
        write: bool = True,
    ) -> Generator[LinearGroup]:
        """Yield every linear once, block by block; write new weights before the next iteration.

        Blocks that an interrupted run has finished are skipped.

        Args:
            stats: Whether the method needs statistics; without them no forward pass is run.
            hessian: Whether the statistics include the Gram matrix of the inputs.
            within_block: Overrides the walker's order. If no weights are written, all orders give
                the same statistics; `cheapest` is the one-pass order where the architecture
                allows it.
            write: Whether the caller writes weights, so that each block is saved.

        Raises:
            UsageError: Statistics are requested, but there are no calibration tokens.
            IncompatibleData: The architecture cannot be replayed, or activations are not finite.
        """
        recovery = self._recovery if write else None
        if (stats or recovery) and self._token_ids is None:
            raise UsageError("this method needs calibration data", fix="give --calibration")
        order = within_block or self.within_block
        with plain_inference(self.model):
            calibration = self._prepare(hessian=hessian) if stats or recovery else None
            # without statistics nothing has run the model yet; from disk it would take too long
            if write and calibration is None and isinstance(self._weights, ResidentWeights):
                require_run(self.model, self.blocks)
            if stats and calibration is not None and order != "joint":
                order = self._static_order(calibration, order)
            streams = self._open_streams(recovery, calibration)
            self.notes = [list(notes) for notes in self._weights.finished] if write else []
            start = len(self.notes)
            restore_streams(self._weights, start, calibration, streams, self._replicate)
            self._advance(start)
            for index in range(start, len(self.blocks)):
                self.notes.append([])
                with self._weights.open_block(index) as block:
                    if calibration is None:
                        yield self._whole_block(index)
                    else:
                        how = order if stats else None
                        yield from self._visit(block, index, calibration, how, streams)
                    if write:
                        is_last = index + 1 == len(self.blocks)
                        hidden = calibration.hidden if calibration and not is_last else None
                        saved = None if hidden is None else with_dense(hidden, streams)
                        self._weights.save_block(index, notes=self.notes[index], hidden=saved)
                self._advance(1)

    def survey(self, *, hessian: bool = False) -> Generator[LinearGroup]:
        """Yield every linear with statistics of the unchanged model; nothing may be written."""
        return self.groups(stats=True, hessian=hessian, within_block="cheapest", write=False)

    def residuals(
        self, *, without: Collection[int] = ()
    ) -> Generator[tuple[int, Iterable[tuple[Tensor, Tensor]]]]:
        """Yield each block's index, and by batch the hidden states before and after the block.

        Args:
            without: Blocks that are skipped, as if they were not in the model.

        Raises:
            UsageError: There are no calibration tokens.
            IncompatibleData: The architecture cannot be replayed.
        """
        self.first_windows(1)  # refuses a walk without tokens
        with plain_inference(self.model):
            data = self._prepare(hessian=False)
            before, after = data.hidden, self._weights.activations(self._activation_device)
            for hidden in before:
                after.append(hidden)
            for index in range(len(self.blocks)):
                if index not in without:
                    with self._weights.open_block(index) as block:
                        replicas = BlockReplicas(block, [], self._devices)
                        data.propagate(replicas, index, source=before, into=after)
                    yield index, zip(before, after, strict=True)
                    before, after = after, before
                self._advance(1)

    # ------------------------------------------------------------ preparation

    def _prepare(self, *, hessian: bool) -> Calibration:
        """Check that the model can be replayed, and record the calls of all calibration batches."""
        token_ids = self._token_ids
        assert token_ids is not None
        by_block = [
            [*self.linears_of(index), *self._repeats_in(index)] for index in range(len(self.blocks))
        ]
        sample = token_ids[:1, :_CHECK_TOKENS].to(self._device)  # [1, tokens]
        checked = check_replay(self.model, self.blocks, by_block, sample)
        plans, later = separate_later_uses(checked, self._repeats)
        return Calibration(
            self.model,
            self.blocks,
            token_ids,
            plans,
            hidden=self._weights.activations(self._activation_device),
            devices=self._devices,
            part=min(len(token_ids), max(1, self._batch_tokens // token_ids.shape[1])),
            hessian=hessian,
            later=later,
        )

    def _repeats_in(self, index: int) -> list[Linear]:
        """Return the linears of a block that use the matrix of an earlier block."""
        return [repeat for repeat in self._repeats if repeat.block_index == index]

    def _replicate(self, block: nn.Module, index: int) -> BlockReplicas:
        linears = [*self.linears_of(index), *self._repeats_in(index)]
        return BlockReplicas(block, linears, self._devices)

    def _open_streams(self, recovery: Recovery | None, data: Calibration | None) -> Streams | None:
        """Return the dense stream of a recovery; None without one."""
        if recovery is None or data is None:
            return None
        store = self._weights.activations(self._activation_device)
        return Streams(recovery, data, store, repeats=self._repeats)

    def _static_order(self, data: Calibration, order: str) -> WithinBlock:
        """Return sequential; joint if `order` is cheapest and sequential is not possible.

        Raises:
            IncompatibleData: `order` is sequential, and the architecture does not allow it.
        """
        for index, plan in enumerate(data.plans):
            reason = why_not_sequential(plan, used_later=bool(data.later[index]))
            if reason and order == "cheapest":
                return "joint"
            if reason:
                kind = type(self.blocks[index]).__name__
                raise IncompatibleData(
                    f"within-block order sequential does not fit {kind}",
                    where=f"block {index}: {reason}",
                    fix="use --within-block joint",
                )
        return "sequential"

    # ------------------------------------------------------------ one block

    def _whole_block(self, index: int) -> LinearGroup:
        """Return all linears of a block, without statistics."""
        return LinearGroup(tuple(self.linears_of(index)), None, self.inputs.gradients)

    def _visit(
        self,
        block: nn.Module,
        index: int,
        data: Calibration,
        order: WithinBlock | Literal["cheapest"] | None,
        streams: Streams | None,
    ) -> Generator[LinearGroup]:
        """Yield a block's groups, have it recovered, and compute the inputs of the next block."""
        replicas = self._replicate(block, index)
        if streams is not None:
            streams.advance(replicas, index, self.linears_of(index))
        if order is None:
            yield self._whole_block(index)
        elif order == "joint":
            yield from self._joint(replicas, index, data)
        else:
            yield from self._sequential(replicas, index, data, propagates=streams is None)
        if streams is not None:
            del replicas  # copies on other devices, of weights that now change
            note = streams.recover(block, index, self.linears_of(index), self.notes[:index])
            self.notes[index].append(note)
            replicas = self._replicate(block, index)
        if index + 1 < len(self.blocks) and (streams is not None or order == "joint"):
            data.propagate(replicas, index)

    def _joint(
        self, replicas: BlockReplicas, index: int, data: Calibration
    ) -> Generator[LinearGroup]:
        """Yield a block's groups after all statistics are collected."""
        groups = data.plans[index].groups
        while True:
            try:
                accumulators = collect(replicas, index, data)
                collect_later(self._chain(replicas, index, data), index, data, accumulators)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not data.can_halve():
                    raise
            # outside the except clause, whose traceback keeps the failed batch's tensors alive;
            # all batches start over, because some sums already contain a part of one
            data.halve()
        for members in groups:
            yield self._group(members, accumulators.pop(0), data)  # pop frees a large Hessian
            replicas.broadcast_weights(members)

    def _chain(self, replicas: BlockReplicas, index: int, data: Calibration) -> list[BlockReplicas]:
        """Return the blocks from this one to the last that shares a matrix with it, as they are."""
        stop = max((use.leader.block_index for use in data.later[index]), default=index) + 1
        later = (self._replicate(self.blocks[number], number) for number in range(index + 1, stop))
        return [replicas, *later]

    def _sequential(
        self, replicas: BlockReplicas, index: int, data: Calibration, *, propagates: bool
    ) -> Generator[LinearGroup]:
        """Yield each group of a block when all batches have reached its input.

        With `propagates` the outputs become the inputs of the next block.
        """
        # Each batch is one forward pass of the block, paused at the input of one linear:
        #
        #     walker                       batch 0                      batch 1
        #     switch() ------------------> runs to q_proj's input
        #     add(inputs) <--------------- hook: switch((q_proj, x))
        #     switch() -----------------------------------------------> runs to q_proj's input
        #     add(inputs) <-------------------------------------------- hook: switch((q_proj, x))
        #     yield q, k, v: pruned by the method
        #     switch() ------------------> pruned q, k, v; to o_proj's input
        #     ... and at last switch() returns the block's output
        plan = data.plans[index]
        walker = getcurrent()
        passes: list[Any] = [
            greenlet(lambda i=i, h=h: data.forward(replicas, index, i, h), walker)
            for i, h in enumerate(data.hidden)
        ]

        def hook(linear: Linear, inputs: Tensor) -> None:
            walker.switch((linear, inputs))

        is_needed = index + 1 < len(self.blocks) and propagates
        try:
            with replicas.capture_inputs([members[0] for members in plan.groups], hook):
                for members in plan.groups:
                    accumulator = data.accumulator()
                    with torch.no_grad():  # not around the yield: the method sets its own mode
                        for batch in passes:
                            linear, inputs = batch.switch()
                            assert linear is members[0], "the order of a static block changed"
                            accumulator.add(inputs)
                    yield self._group(members, accumulator, data)
                    replicas.broadcast_weights(members)
                    del accumulator
                with torch.no_grad():
                    for i, batch in enumerate(passes if is_needed else []):
                        data.hidden[i] = batch.switch()  # [samples, seqlen, hidden]
        finally:
            for batch in filter(None, passes):  # a greenlet is true while paused: unwind its frames
                batch.throw(GreenletExit)

    # ------------------------------------------------------------ shared by both

    def _group(
        self, members: list[Linear], accumulator: StatsAccumulator, data: Calibration
    ) -> LinearGroup:
        """Return a group with the statistics of its input, which must be finite."""
        stats = accumulator.result(
            samples=data.samples, width=members[0].in_features, device=self._device
        )
        if not torch.isfinite(stats.sum_squares).all():
            raise IncompatibleData(
                f"the input of {members[0].name} is NaN or infinite",
                where="the activations overflow on the calibration text",
                fix="use --dtype float32 or bfloat16, or check the weights",
            )
        return LinearGroup(tuple(members), stats, self.inputs.gradients)
