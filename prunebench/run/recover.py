"""The recovery of a run: during the walk, or in a walk of its own after a method that learns."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch.distributed as dist
from torch import Tensor, nn

from prunebench.distributed import world_size
from prunebench.errors import CheckFailed
from prunebench.models.linears import find_linears
from prunebench.models.pruned_block import RecoveredBlock, Recovery
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import PruneReport, grid_of
from prunebench.recovery import THEN
from prunebench.recovery.protocol import DistillPoint, ModelRecovery
from prunebench.run.plan import Plan
from prunebench.sparsity import Sparsity

_MASSIVE = 0.85  # of the squares of a hidden state; Gemma 3 270M has 0.92, SmolLM2-135M 0.59


def recovery_of(plan: Plan, sparsity: Mapping[str, Sparsity]) -> Recovery | None:
    """Return the recovery that a walk includes, with a line of progress for every block.

    Args:
        plan: Of the run.
        sparsity: What each matrix is pruned to, by name.
    """
    if plan.recoverer is None:
        return None

    def report(block: RecoveredBlock) -> None:
        plan.progress.note(f"  {format_recovered(block)}")

    return Recovery(plan.recoverer, plan.spec.seed, sparsity, grid_of(plan.pruner), report)


def format_recovered(block: RecoveredBlock) -> str:
    """Format what the recovery of a block did, as one line."""
    if block.held_out_before is None or block.held_out_after is None:
        error = "no error was measured"
    else:
        error = f"held-out error {block.held_out_before:.4g} -> {block.held_out_after:.4g}"
    line = f"block {block.block}: {error}, step {block.best_step} of {block.steps}"
    if block.untrained:
        line += f", {len(block.untrained)} experts with too few tokens left as they were"
    if block.event:
        line += f", {block.event}"
    return f"{line}, {block.seconds:.1f} s"


def note_useless(plan: Plan, blocks: Sequence[RecoveredBlock]) -> None:
    """Warn if the training made every block worse, so that nothing of it stayed."""
    trained = [block for block in blocks if block.steps]
    if trained and not any(block.best_step for block in trained):
        name = plan.spec.recover.partition(THEN)[0]
        plan.progress.note(
            f"warning: {name} kept nothing: no step lowered the held-out error of any "
            f"block. Try a smaller --set recover.{name}.lr, or more calibration windows"
        )


def note_massive(plan: Plan, blocks: Sequence[RecoveredBlock]) -> None:
    """Warn if a few channels are nearly all that the loss of a recovery sees."""
    shares = [block.massive for block in blocks if block.massive is not None]
    if plan.recoverer is None or plan.recoverer.weighs_channels_alike or not shares:
        return
    if (share := statistics.median(shares)) > _MASSIVE:
        plan.progress.note(
            f"warning: a hundredth of the channels holds {share:.0%} of the hidden states, and "
            "the loss sees little else: try --set recover.loss=channels"
        )


def require_recovered(plan: Plan, walker: BlockWalker) -> None:
    """Refuse a method that does not let the walker see its blocks.

    Raises:
        CheckFailed: Some blocks were not recovered.
    """
    missing = len(walker.blocks) - len(walker.recovered)
    if missing:
        raise CheckFailed(
            f"{missing} of {len(walker.blocks)} blocks were not recovered",
            where=f"{plan.spec.method} does not prune them one by one in walker.groups",
            fix="leave --recover out, or change the method: see prunebench.plugin",
        )


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all prunable matrices in host memory, by name."""
    # clone: on a CPU, cpu() returns the tensor itself
    return {linear.name: linear.stored.cpu().clone() for linear in find_linears(model)}


def recover_apart(walker: BlockWalker, dense: dict[str, Tensor]) -> None:
    """Walk a pruned model from its dense weights, and recover block after block.

    A method that learns changes all blocks at once, at its end. Every block first gives the targets
    with its dense weights, and gets its pruned ones back then.

    Args:
        walker: Of the pruned model, with a recovery.
        dense: The dense weights by name; emptied.
    """
    pruned = {}
    for linear in walker.linears:
        pruned[linear.name] = linear.stored.cpu().clone()
        linear.stored.copy_(dense.pop(linear.name))
    with closing(walker.groups(stats=False)) as groups:
        for group in groups:
            for linear in group.linears:
                linear.stored.copy_(pruned.pop(linear.name))


def dense_copies(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the dense weights for an end-to-end recovery; empty without one."""
    if plan.model_recoverer is None or plan.recovery_training is None:
        return {}
    # a model that cannot be trained is refused here, not after an hour of pruning
    plan.model_recoverer.check_model(model, plan.recovery_training)
    return copy_weights(model)


def recover_model(plan: Plan, model: nn.Module, dense: dict[str, Tensor]) -> ModelRecovery | None:
    """Train the pruned model end to end, in all processes together.

    Args:
        plan: Of the run.
        model: Pruned in rank 0; in the other ranks only if the method learns.
        dense: The dense weights; emptied.
    """
    if plan.model_recoverer is None or plan.recovery_training is None:
        return None
    if world_size() > 1:
        for linear in find_linears(model):
            # a view of a transposed or fused parameter is contiguous as stored
            dist.broadcast(linear.stored, 0)
    need = plan.model_recoverer.needs.training
    steps = need.steps if need else 0
    name = plan.spec.recover.rpartition(THEN)[2]
    with plan.progress.stage(
        "recover", total=steps, detail=f"{name}, end to end", unit="steps"
    ) as advance:

        def report(point: DistillPoint) -> None:
            # point 0 is measured before the first step
            advance(bool(point.step))
            if point.held_out is not None:
                plan.progress.note(format_distill_point(point, steps))

        data = dataclasses.replace(plan.recovery_training, on_point=report, note=plan.progress.note)
        recovery = plan.model_recoverer.recover_model(model, dense, data)
    if not recovery.best_step:
        plan.progress.note(
            "warning: the training kept nothing: no step lowered the held-out loss. "
            "Try a smaller --set recover.distill.lr, more steps, or more text (--set recover.data)"
        )
    return recovery


def format_distill_point(point: DistillPoint, steps: int) -> str:
    """Format the measurements of a training step as one line."""
    held_out = point.held_out
    assert held_out is not None
    loss = "" if point.loss is None else f"loss {point.loss:.3f}, "
    line = f"  step {point.step}: {loss}held-out loss "
    if held_out.loss is None or held_out.ppl is None:
        line += "not finite"
    else:
        line += f"{held_out.loss:.3f} (ppl {held_out.ppl:,.4g}"
        line += ")" if held_out.kl is None else f", KL {held_out.kl:.3f})"
    line += f", {point.seconds:.0f} s"
    if 0 < point.step < steps:
        left = point.seconds / point.step * (steps - point.step)
        line += f", {left:.0f} s left" if left < 90 else f", {left / 60:.0f} min left"
    return line


def zeros_beyond(
    report: PruneReport, blocks: Sequence[RecoveredBlock], trained: ModelRecovery | None
) -> Mapping[str, int]:
    """Return the zeros beyond the target by matrix, those that the recovery added included."""
    total = Counter(report.zeros_beyond)
    for block in blocks:
        total.update(block.zeros)
    if trained is not None:
        total.update(trained.zeros)
    return dict(total)
