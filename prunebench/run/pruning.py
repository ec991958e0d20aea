"""Prune a loaded model: allocate, collect what the method needs, walk, and check the result.

    pruned = prune_model(plan, model, linears, zeros)

Commands come here from `execute`, `prunebench.prune` with a model that its caller holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from prunebench.allocators.allocation import Allocation, layer_sparsities, require_sound
from prunebench.calibration.training import Training
from prunebench.distributed import rank
from prunebench.evaluate.outcome import Outcome
from prunebench.models.gradients import GradientNorms, gradient_norms
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.models.linears import Linear, find_linears
from prunebench.models.measure import (
    Measured,
    measure_linear,
    require_met,
    require_on_grid,
    require_removed,
    require_total,
)
from prunebench.models.pruned_block import RecoveredBlock, Recovery
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.models.weight_grid import WeightGrid
from prunebench.progress import Advance
from prunebench.pruners.protocol import PruneReport, grid_of
from prunebench.pruners.removal import BlockRemover, count_of_blocks
from prunebench.pruners.training import CurvePoint
from prunebench.recovery import THEN
from prunebench.recovery.protocol import ModelRecovery
from prunebench.run.plan import Plan
from prunebench.run.recover import (
    copy_weights,
    dense_copies,
    note_massive,
    note_useless,
    recover_apart,
    recover_model,
    recovery_of,
    require_recovered,
    zeros_beyond,
)
from prunebench.run.resume import restore_finished_blocks
from prunebench.run.scoring import score_prior
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Pruned:
    """A model after pruning.

    Attributes:
        allocation: The ratio of every layer.
        report: Of the method.
        recovered: Of the blocks that were trained after pruning, if any were.
        measured: Counts of every matrix, in the model's order.
        sha256: Hash of the pruned weights.
        trained: Of the whole model that was trained end to end, if it was.
        seconds: Of allocator and method, earlier starts of this run included; without recovery.
    """

    allocation: Allocation
    report: PruneReport
    recovered: list[RecoveredBlock]
    trained: ModelRecovery | None
    measured: list[Measured]
    sha256: str
    seconds: float


def prune_model(
    plan: Plan,
    model: nn.Module,
    linears: list[Linear],
    zeros: Mapping[str, int],
    journal: RunJournal | None = None,
) -> Pruned:
    """Spread the sparsity, prune a loaded model in place, and check what was done to it.

    Args:
        plan: The run.
        model: Dense, in evaluation mode.
        linears: Its prunable matrices.
        zeros: Zeros of each dense matrix, by name.
        journal: Of a run whose weights are on disk.

    Raises:
        PrunebenchError: A layer cannot be pruned, or has another sparsity than was asked for.
    """
    dense = dense_copies(plan, model)
    # the allocator is part of the method's cost; loading and scoring are not
    with _stopwatch(journal) as prune_seconds:
        allocation = _allocate(plan, model, linears, journal)
        requested = layer_sparsities(plan.sparsity, allocation, linears)
        report, recovered = prune_linears(plan, model, requested)
    trained = recover_model(plan, model, dense)
    grid = grid_of(plan.pruner)
    with plan.progress.stage("measure", detail="sparsity of every layer"):
        if report.removal is not None:
            # the others have new numbers, and are asked for no zeros
            linears = find_linears(model)
            requested = {linear.name: Sparsity(0.0) for linear in linears}
        sha256, measured = _hash_and_measure(model, linears, requested, grid)
        if report.removal is not None:
            require_removed(measured, zeros, report.removal, model)
            seconds = prune_seconds()
            return Pruned(allocation, report, [], None, measured, sha256, seconds)
        # what was asked for is checked on the weights themselves, not on what the method
        # reports; zeros of the dense model may come on top
        beyond = zeros_beyond(report, recovered, trained)
        require_met(measured, zeros, requested, beyond=beyond)
        require_total(measured, zeros, plan.sparsity, beyond=beyond)
        if grid:
            require_on_grid(measured, grid)
    seconds = prune_seconds() - sum(block.seconds for block in recovered)
    return Pruned(allocation, report, recovered, trained, measured, sha256, seconds)


def hash_and_count_zeros(
    model: nn.Module, linears: list[Linear], journal: RunJournal | None = None
) -> tuple[str, dict[str, int]]:
    """Return the hash of the dense weights and the zeros of every linear, in one pass."""
    # resumed: an earlier start has read every block of the checkpoint for these two
    if journal and journal.state.dense:
        return journal.state.dense["sha256"], journal.state.dense["zeros"]
    zeros: dict[str, int] = {}

    # on disk, a block's weights are in memory only during `look`: hash and count in one reading
    def count(index: int) -> None:
        block_linears = [linear for linear in linears if linear.block_index == index]
        zeros.update(
            {linear.name: int((linear.stored == 0).count_nonzero()) for linear in block_linears}
        )

    sha256 = hash_weights(model, look=count)
    if journal:
        journal.update(dense={"sha256": sha256, "zeros": zeros})
    return sha256, zeros


def _hash_and_measure(
    model: nn.Module,
    linears: list[Linear],
    requested: dict[str, Sparsity],
    grid: WeightGrid | None,
) -> tuple[str, list[Measured]]:
    """Return the hash of the pruned weights and the sparsity of every linear, in one pass."""
    measured: dict[str, Measured] = {}

    def measure(index: int) -> None:
        for linear in linears:
            if linear.block_index == index:
                measured[linear.name] = measure_linear(linear, requested[linear.name], grid)

    sha256 = hash_weights(model, look=measure)
    # hashing goes by sorted names (block 10 before 2); the result lists layers in the model's order
    return sha256, [measured[linear.name] for linear in linears]


def _allocate(
    plan: Plan, model: nn.Module, linears: list[Linear], journal: RunJournal | None
) -> Allocation:
    """Choose a ratio for every layer."""
    target, allocator = plan.sparsity.ratio, plan.allocator
    # resumed: the finished blocks were pruned to the ratios that an earlier start chose
    if journal and journal.state.allocation:
        return Allocation(**journal.state.allocation)
    if allocator is None:
        assert plan.allocation is not None
        return plan.allocation
    if plan.spec.allocation == "uniform":
        return allocator.allocate(BlockWalker(model), target)
    with _walk(plan, model, "allocate", f"{plan.spec.allocation} {plan.sparsity}") as walker:
        allocation = allocator.allocate(walker, target)
    require_sound(allocation, linears, target)
    if journal:
        journal.update(allocation={name: dict(value) for name, value in vars(allocation).items()})
    return allocation


def prune_linears(
    plan: Plan, model: nn.Module, requested: dict[str, Sparsity]
) -> tuple[PruneReport, list[RecoveredBlock]]:
    """Prune every linear to its sparsity, with the recovery of each block."""
    # resumed blocks must be in place before the walk: later blocks see their outputs
    restore_finished_blocks(plan, model)
    gradients, norm = None, plan.pruner.needs.gradients
    # gradients belong to the dense model, so they are collected before any linear is pruned
    if norm is not None and plan.windows:
        samples = len(plan.windows.token_ids)
        detail = f"of the dense model, {norm}"
        with plan.progress.stage(
            "gradients", total=samples, detail=detail, unit="windows"
        ) as advance:
            gradients = gradient_norms(model, plan.windows.token_ids, norm=norm, advance=advance)
    recovery, learns = recovery_of(plan, requested), plan.training is not None
    detail = f"{plan.spec.method} {plan.sparsity}"
    if recovery and not learns:
        detail += f", each block then by {plan.spec.recover.partition(THEN)[0]}"
    # a method that learns changes all blocks at its end: a second walk begins at the dense weights
    dense = copy_weights(model) if recovery and learns and rank() == 0 else None
    with _walk(plan, model, "prune", detail, gradients, None if learns else recovery) as walker:
        report = plan.pruner.prune(walker, requested)
    if dense is not None:
        with _walk(plan, model, "recover", plan.spec.recover, None, recovery) as walker:
            recover_apart(walker, dense)
    if recovery and (dense is not None or not learns):
        require_recovered(plan, walker)
        note_useless(plan, walker.recovered)
        note_massive(plan, walker.recovered)
    return report, walker.recovered


@contextmanager
def _stopwatch(journal: RunJournal | None) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds inside, earlier starts of this run included."""
    earlier_seconds = journal.state.seconds if journal else 0.0
    start_time = time.perf_counter()
    end_times: list[float] = []

    def seconds() -> float:
        return earlier_seconds + (end_times[0] if end_times else time.perf_counter()) - start_time

    # every save of a block stores the seconds so far: a kill loses only those since the last one
    with journal.on_save(lambda: {"seconds": seconds()}) if journal else nullcontext():
        yield seconds
    end_times.append(time.perf_counter())
    if journal:
        journal.update(seconds=seconds())


@contextmanager
def _walk(
    plan: Plan,
    model: nn.Module,
    stage: str,
    detail: str,
    gradients: GradientNorms | None = None,
    recovery: Recovery | None = None,
) -> Iterator[BlockWalker]:
    """Open a block walker over the calibration tokens, as one stage of the run."""
    total, unit = max(linear.block_index for linear in plan.linears) + 1, "blocks"
    need = plan.pruner.needs.training
    if isinstance(plan.pruner, BlockRemover):
        total *= plan.pruner.passes(count_of_blocks(plan.sparsity, total))
    if stage == "prune" and need is not None:
        total, unit = need.steps, "steps"
    with plan.progress.stage(stage, total=total, detail=detail, unit=unit) as advance:
        yield BlockWalker(
            model,
            token_ids=plan.windows.token_ids if plan.windows else None,
            # null: the method reads no statistics, and the order does not matter
            within_block=plan.spec.within_block or "joint",
            devices=plan.devices,
            inputs=PrunerInputs(gradients, _training(plan, model, advance), plan.masks),
            recovery=recovery,
            advance=advance,
        )


def _training(plan: Plan, model: nn.Module, advance: Advance) -> Training | None:
    """Return the training windows with callbacks for progress, notes and the prior's score."""
    if plan.training is None:
        return None

    def report(point: CurvePoint) -> None:
        # point 0 is measured before the first step
        advance(bool(point.step))
        if point.held_out_ppl is not None:
            plan.progress.note(format_training_point(point))

    def prior() -> tuple[Outcome, ...]:
        # other ranks wait; scoring is no collective operation
        return tuple(score_prior(plan, model)) if rank() == 0 else ()

    return dataclasses.replace(
        plan.training, on_point=report, note=plan.progress.note, score_prior=prior
    )


def format_training_point(point: CurvePoint) -> str:
    """Format the measurements of a training step as one line."""
    loss = "" if point.loss is None else f"loss {point.loss:.3f}, "
    return (
        f"  step {point.step}: {loss}held-out ppl {point.held_out_ppl:,.4g}, "
        f"{point.changed:.2%} of the groups changed, certainty {point.certainty:.3f}, "
        f"temperature {point.temperature:.2g}, {point.seconds:.0f} s"
    )
