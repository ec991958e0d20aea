"""Collect the input statistics of a block's linears over the calibration set (joint order)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from prunebench.calibration.stats import StatsAccumulator
from prunebench.models.calibrated import Calibration
from prunebench.models.linears import Linear
from prunebench.models.replay import Stop
from prunebench.models.replicas import BlockReplicas


def collect(replicas: BlockReplicas, index: int, data: Calibration) -> list[StatsAccumulator]:
    """Run the block on all batches; return an accumulator for each group of its plan."""
    plan = data.plans[index]
    accumulators = [data.accumulator() for _ in plan.groups]
    slot = {members[0]: i for i, members in enumerate(plan.groups)}
    varies = plan.dynamic or plan.repeated
    # In a static block nothing after the input of the last group is needed: stop there.
    last = None if varies or not plan.groups else plan.groups[-1][0]
    # After `halve` the inputs of a batch's parts are added as one tensor: the same rounding.
    pending: dict[int, list[Tensor]] = {}

    def hook(linear: Linear, inputs: Tensor) -> None:
        if len(parts) == 1 or varies:
            accumulators[slot[linear]].add(inputs)
        else:
            pending.setdefault(slot[linear], []).append(inputs.flatten(0, -2))  # [tokens, in]
        if linear is last:
            raise Stop

    with torch.no_grad(), replicas.capture_inputs(list(slot), hook, by_product=plan.by_product):
        for batch, hidden in enumerate(data.hidden):
            parts = data.calls[batch]
            block, device = replicas.at(batch)
            for call, rows in data.parts(batch, hidden):
                with contextlib.suppress(Stop):
                    call[index].run(block, rows.to(device))
            for number in sorted(pending):
                accumulators[number].add(torch.cat(pending.pop(number)))
    return accumulators


def collect_later(
    chain: Sequence[BlockReplicas],
    index: int,
    data: Calibration,
    accumulators: list[StatsAccumulator],
) -> None:
    """Add the inputs of a block's matrices in the later blocks that share them.

    Args:
        chain: The block and those after it, to the last that shares a matrix; run as they are.
        index: Index of the block.
        data: The calibration set.
        accumulators: Of the block's groups.
    """
    uses = data.later[index]
    if not uses:
        return
    slots = {use.leader: use.slots for use in uses}

    def hook(leader: Linear, inputs: Tensor) -> None:
        for slot in slots[leader]:
            accumulators[slot].add(inputs)

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for number, later in enumerate(chain[1:], index + 1):
            leaders = [leader for leader in slots if leader.block_index == number]
            by_product = data.plans[number].by_product
            hooks.enter_context(later.capture_inputs(leaders, hook, by_product=by_product))
        for batch, hidden in enumerate(data.hidden):
            for number, current in enumerate(chain, index):
                hidden = data.forward(current, number, batch, hidden)
