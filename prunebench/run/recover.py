"""The recovery of a run: during the walk, or in a walk of its own after a method that learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing

from torch import Tensor, nn

from prunebench.errors import CheckFailed
from prunebench.models.linears import find_linears
from prunebench.models.pruned_block import RecoveredBlock, Recovery
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import PruneReport
from prunebench.recovery.protocol import BlockRecoverer
from prunebench.run.plan import Plan


def recovery_of(plan: Plan) -> Recovery | None:
    """Return the recovery that a walk includes, with a line of progress for every block."""
    if not isinstance(plan.recoverer, BlockRecoverer):
        return None

    def report(block: RecoveredBlock) -> None:
        plan.progress.note(f"  {format_recovered(block)}")

    return Recovery(plan.recoverer, seed=plan.spec.seed, report=report)


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
        plan.progress.note(
            f"warning: {plan.spec.recover} kept nothing: no step lowered the held-out error of any "
            "block. Try a smaller --set recover.lr, or more calibration windows"
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


def zeros_beyond(report: PruneReport, blocks: Sequence[RecoveredBlock]) -> Mapping[str, int]:
    """Return the zeros beyond the target by matrix, those that the recovery added included."""
    total = Counter(report.zeros_beyond)
    for block in blocks:
        total.update(block.zeros)
    return dict(total)
