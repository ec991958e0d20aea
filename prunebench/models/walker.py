"""The block walker: visits the decoder blocks in order, each with the inputs it will really see.

The walk is the same for every architecture and every one-shot method. For block b, with the blocks
before it already pruned:

- `joint` (the papers' protocol): the dense block runs over the calibration set, statistics are
  collected at all its linears, all are pruned, and the pruned block runs once more to make the
  inputs of block b+1. The first of the two passes ends at the last linear's input: what that
  linear would give is not needed.
- `sequential`: every linear is pruned when its input is known, before it runs, so one pass does
  both and the statistics belong to the inputs that the pruned model will see. The batches of the
  calibration set run as greenlets that wait for each other before each linear: the arithmetic of
  every batch stays in cache, and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.calibration.stats import InputStats, StatsAccumulator
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.calibrated import Calibration
from prunebench.models.gradients import GradientNorms
from prunebench.models.linears import Linear, find_blocks, find_linears, find_repeats
from prunebench.models.out_of_memory import is_out_of_memory
from prunebench.models.plan import check_replay, separate_later_uses
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.replay import Stop, plain_inference, require_run
from prunebench.models.replicas import BlockReplicas
from prunebench.models.weights import ResidentWeights, WeightStore, weights_of
from prunebench.spec import WithinBlock

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_CHECK_TOKENS = 128  # the arguments that depend on length are recorded anew for every batch


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one input tensor, and what is known of them.

    Attributes:
        stats: Statistics of the input; None for methods without data.
        gradients: Those of the whole model, for methods that read them.
    """

    linears: tuple[Linear, ...]
    stats: InputStats | None
    gradients: GradientNorms | None = None


class BlockWalker:
    """Hands out the linears of a model, group by group, with statistics of their inputs.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        token_ids: Calibration windows, or None for methods that need none.
        within_block: The order inside a block, see the module's docstring.
        weights: Where the weights live; by default, wherever the model has them (`weights_of`).
        activation_device: Where hidden states wait between blocks; by default beside the weights.
        devices: Where the calibration batches run, in turn; the first is where the model is, and
            the default.
        inputs: What the method needs besides statistics.
        batch_tokens: Tokens run through a block at a time; by default what suits the device.
        advance: Hears 1 for every finished block.

    Attributes:
        notes: What the pruning method has to say of each block so far, as JSON has it; kept with
            the block, so that a run that goes on has it again.
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
        batch_tokens: int | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.linears = find_linears(model)
        self._repeats = find_repeats(model, self.linears)
        self.within_block = within_block
        self.inputs = inputs or PrunerInputs()
        self._token_ids = token_ids
        self.notes: list[list[Any]] = []
        self._weights = weights or weights_of(model)
        self._device = next(model.parameters()).device
        self._activation_device = activation_device or self._device
        self._devices = devices or (self._device,)
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(self._device.type, 4096)
        self._advance = advance

    def linears_of(self, index: int) -> list[Linear]:
        """Return the prunable matrices of one block."""
        return [linear for linear in self.linears if linear.block_index == index]

    def first_windows(self, count: int) -> Int[Tensor, "samples seqlen"]:
        """Return the first calibration windows, on the model's device.

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
        """Visit every linear once, block by block; write the new weights before asking for more.

        The blocks that an interrupted run has finished are not visited again.

        Args:
            stats: Whether the method needs statistics; without, nothing is run.
            hessian: Whether the statistics include the Gram matrix of the inputs.
            within_block: Another order than the walker's. As long as nothing is written the orders
                are equal; `cheapest` is the one with one pass, where the architecture allows it.
            write: False where nothing is written, and so nothing is to be kept.

        Raises:
            UsageError: Statistics are wanted, and there are no calibration tokens.
            IncompatibleData: The architecture cannot be replayed, or activations are not finite.
        """
        if stats and self._token_ids is None:
            raise UsageError("this method needs calibration data", fix="give --calibration")
        order = within_block or self.within_block
        with plain_inference(self.model):
            calibration = self._prepare(hessian=hessian) if stats else None
            if write and not stats and isinstance(self._weights, ResidentWeights):
                require_run(self.model, self.blocks)  # from disk it is seen when it is scored
            if calibration is not None and order != "joint":
                order = self._static_order(calibration, order)
            self.notes = [list(notes) for notes in self._weights.finished] if write else []
            begin = len(self.notes)
            self._go_on(begin, calibration)
            for index in range(begin, len(self.blocks)):
                self.notes.append([])
                with self._weights.open_block(index) as block:
                    if calibration is None:
                        yield LinearGroup(
                            tuple(self.linears_of(index)), None, self.inputs.gradients
                        )
                    elif order == "joint":
                        yield from self._joint(self._spread(block, index), index, calibration)
                    else:
                        yield from self._sequential(self._spread(block, index), index, calibration)
                    if write:
                        goes_on = calibration is not None and index + 1 < len(self.blocks)
                        hidden = calibration.hidden if calibration and goes_on else None
                        self._weights.save_block(index, notes=self.notes[index], hidden=hidden)
                self._advance(1)

    def survey(self, *, hessian: bool = False) -> Generator[LinearGroup]:
        """Visit every linear of the model as it is, with statistics; nothing may be written."""
        return self.groups(stats=True, hessian=hessian, within_block="cheapest", write=False)

    # ------------------------------------------------------------ preparation

    def _prepare(self, *, hessian: bool) -> Calibration:
        token_ids = self._token_ids
        assert token_ids is not None
        depth = range(len(self.blocks))
        by_block = [
            [*self.linears_of(i), *(one for one in self._repeats if one.block_index == i)]
            for i in depth
        ]
        sample = token_ids[:1, :_CHECK_TOKENS].to(self._device)
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

    def _spread(self, block: nn.Module, index: int) -> BlockReplicas:
        repeats = [one for one in self._repeats if one.block_index == index]
        return BlockReplicas(block, [*self.linears_of(index), *repeats], self._devices)

    def _go_on(self, begin: int, data: Calibration | None) -> None:
        """Bring the activations before block `begin` back: as they were kept, or made again."""
        if data is not None and 0 < begin < len(self.blocks):
            kept = None if data.leaves_tensors else self._weights.saved_hidden(begin)
            for batch, hidden in enumerate(kept or ()):
                data.hidden[batch] = hidden
            for index in range(0 if kept is None else begin, begin):
                with self._weights.open_block(index) as block:
                    data.propagate(self._spread(block, index), index)
        self._advance(begin)

    def _static_order(self, data: Calibration, order: str) -> WithinBlock:
        """Return sequential, or joint where the cheapest is wanted and sequential does not fit."""
        for index, plan in enumerate(data.plans):
            reason = "a layer runs twice" if plan.repeated else ""
            reason = "later blocks use its weights again" if data.later[index] else reason
            reason = "which experts run depends on the text" if plan.dynamic else reason
            reason = "a layer is not called as a module" if plan.by_product else reason
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

    # ------------------------------------------------------------ the two orders

    def _joint(
        self, spread: BlockReplicas, index: int, data: Calibration
    ) -> Generator[LinearGroup]:
        groups = data.plans[index].groups
        while True:
            try:
                collected = self._collect(spread, index, data)
                self._collect_later(spread, index, data, collected)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not data.can_halve():
                    raise
            data.halve()  # and all batches again: some sums may be half made
        for members in groups:  # each is dropped when it has been used: a Hessian is large
            yield self._group(members, collected.pop(0), data)
            spread.broadcast_weights(members)
        if index + 1 < len(self.blocks):
            data.propagate(spread, index)

    def _collect(
        self, spread: BlockReplicas, index: int, data: Calibration
    ) -> list[StatsAccumulator]:
        plan = data.plans[index]
        collected = [data.accumulator() for _ in plan.groups]
        slot = {members[0]: i for i, members in enumerate(plan.groups)}
        varies = plan.dynamic or plan.repeated
        last = None if varies or not plan.groups else plan.groups[-1][0]

        seen: dict[int, list[Tensor]] = {}  # a batch in parts is summed whole: the same rounding

        def tap(linear: Linear, inputs: Tensor) -> None:
            if len(parts) == 1 or varies:
                collected[slot[linear]].add(inputs)
            else:
                seen.setdefault(slot[linear], []).append(inputs.flatten(0, -2))
            if linear is last:
                raise Stop

        with torch.no_grad(), spread.capture_inputs(list(slot), tap, by_product=plan.by_product):
            for batch, hidden in enumerate(data.hidden):
                parts = data.calls[batch]
                block, device = spread.at(batch)
                for call, rows in data.parts(batch, hidden):
                    with contextlib.suppress(Stop):
                        call[index].run(block, rows.to(device))
                for number in sorted(seen):
                    collected[number].add(torch.cat(seen.pop(number)))
        return collected

    def _collect_later(
        self,
        spread: BlockReplicas,
        index: int,
        data: Calibration,
        collected: list[StatsAccumulator],
    ) -> None:
        """Add the inputs that a block's matrices get in later blocks that use them again.

        This block and those in between are as they are now, not pruned yet.
        """
        uses = data.later[index]
        if not uses:
            return
        until = max(use.leader.block_index for use in uses)
        spreads = [spread, *(self._spread(self.blocks[i], i) for i in range(index + 1, until + 1))]
        slots = {use.leader: use.slots for use in uses}

        def tap(leader: Linear, inputs: Tensor) -> None:
            for slot in slots[leader]:
                collected[slot].add(inputs)

        with torch.no_grad(), contextlib.ExitStack() as taps:
            for number, there in enumerate(spreads[1:], index + 1):
                leaders = [leader for leader in slots if leader.block_index == number]
                by_product = data.plans[number].by_product
                taps.enter_context(there.capture_inputs(leaders, tap, by_product=by_product))
            for batch, hidden in enumerate(data.hidden):
                for number, there in enumerate(spreads, index):
                    hidden = data.forward(there, number, batch, hidden)

    def _sequential(
        self, spread: BlockReplicas, index: int, data: Calibration
    ) -> Generator[LinearGroup]:
        plan = data.plans[index]
        parent = getcurrent()
        waiting: list[Any] = [
            greenlet(lambda i=i, h=h: data.forward(spread, index, i, h), parent)
            for i, h in enumerate(data.hidden)
        ]

        def tap(linear: Linear, inputs: Tensor) -> None:
            parent.switch((linear, inputs))

        last_block = index + 1 == len(self.blocks)
        try:
            with spread.capture_inputs([members[0] for members in plan.groups], tap):
                for members in plan.groups:
                    accumulator = data.accumulator()
                    with torch.no_grad():
                        for batch in waiting:
                            arrived, inputs = batch.switch()
                            assert arrived is members[0], "the order of a static block changed"
                            accumulator.add(inputs)
                    yield self._group(members, accumulator, data)
                    spread.broadcast_weights(members)
                    del accumulator
                with torch.no_grad():
                    for i, batch in enumerate([] if last_block else waiting):
                        data.hidden[i] = batch.switch()
        finally:
            for batch in filter(None, waiting):  # those that still wait: unwind them
                batch.throw(GreenletExit)

    # ------------------------------------------------------------ shared by both

    def _group(
        self, members: list[Linear], accumulator: StatsAccumulator, data: Calibration
    ) -> LinearGroup:
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
