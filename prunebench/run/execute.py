"""One run: check, load, score the dense model, prune, measure, score again, save the result.

    plan = prepare(spec, setup)     # no weight is loaded; what can fail early fails here
    result = execute(plan)

`run` does both. `execute` is the whole story of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from prunebench.allocators.allocation import (
    Allocation,
    layer_sparsities,
    require_sound,
    save_allocation,
)
from prunebench.calibration.training import Training
from prunebench.calibration.windows import save_windows
from prunebench.checkpoints.save import save_masks, save_model
from prunebench.distributed import process_group, rank
from prunebench.errors import SaveError
from prunebench.evaluate.divergence import at_dense
from prunebench.evaluate.outcome import Outcome
from prunebench.files import cache_dir, write_text
from prunebench.models.gradients import GradientNorms, gradient_norms
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.models.linears import Linear, find_linears
from prunebench.models.measure import Measured, measure_linear, require_met, require_total
from prunebench.models.pruned_block import RecoveredBlock, Recovery
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.models.weights import weights_of
from prunebench.progress import Advance, quiet_libraries
from prunebench.pruners import METHODS
from prunebench.pruners.protocol import PruneReport
from prunebench.pruners.training import CurvePoint
from prunebench.results.samples import write_samples
from prunebench.results.schema import Result
from prunebench.run.failures import failures_are_filed, memory_errors, record_halvings
from prunebench.run.packed import packed_weights
from prunebench.run.plan import Plan, prepare
from prunebench.run.recover import (
    copy_weights,
    dense_copies,
    note_useless,
    recover_apart,
    recover_model,
    recovery_of,
    require_recovered,
    trains,
    zeros_beyond,
)
from prunebench.run.result import (
    build_allocation_block,
    build_cost_block,
    build_identity,
    build_method_block,
    build_model_block,
    build_recovery_block,
    build_score_blocks,
    build_sparsity_block,
    build_training_block,
    samples_of,
)
from prunebench.run.resume import open_model, open_run_state, restore_finished_blocks
from prunebench.run.scoring import (
    collect_dense_logits,
    score_dense,
    score_divergence,
    score_prior,
    score_pruned,
)
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup


def run(spec: RunSpec, setup: Setup) -> Result | None:
    """Prepare and execute one run; returns what `execute` does.

    Raises:
        PrunebenchError: Whatever a user can fix. Once weights have been loaded, a failed run saves
            a `failed` record in the results folder too.
    """
    with quiet_libraries():
        return execute(prepare(spec, setup))


def execute(plan: Plan) -> Result | None:
    """Load, score, prune, measure, score again, and save the result.

    Returns:
        The result; None on ranks other than 0.

    Raises:
        PrunebenchError: Whatever a user can fix; a `failed` record is saved too.
    """
    with process_group(device=str(plan.device), trains=trains(plan)):
        if rank() == 0:
            return _execute(plan)
        _assist(plan)
        return None


def _assist(plan: Plan) -> None:
    """Train together with rank 0, and save nothing."""
    with memory_errors(plan.device, trains=True, recovers=bool(plan.recovery_training)):
        dense = dense_copies(plan, model := open_model(plan, None))
        # a method that does not learn prunes in rank 0 alone
        if plan.training is not None:
            _prune(plan, model, {linear.name: plan.sparsity for linear in find_linears(model)})
        recover_model(plan, model, dense)


def _execute(plan: Plan) -> Result:
    spec, progress = plan.spec, plan.progress
    halvings: list[str] = []
    with (
        failures_are_filed(plan) as row_is_filed,
        memory_errors(plan.device, trains=trains(plan), recovers=bool(plan.recovery_training)),
        record_halvings(plan, halvings),
        open_run_state(plan) as journal,
    ):
        with progress.stage("load", detail=f"{spec.model} in {spec.dtype} on {plan.device}"):
            model = open_model(plan, journal)
            linears = find_linears(model)
            dense_sha256, zeros = _hash_and_count_zeros(model, linears, journal)
        # a dense run is scored once, as "pruned"; those outcomes are its baseline too. With packed
        # weights the two differ, and both are scored
        is_dense = not METHODS.find(spec.method).prunes and spec.execute == "dense"
        dense = [] if is_dense else score_dense(plan, model, dense_sha256)
        # before pruning: the dense weights are overwritten in place
        references = collect_dense_logits(plan, model)
        # the allocator is part of the method's cost; loading and scoring are not
        dense_weights = dense_copies(plan, model)
        with _stopwatch(journal) as prune_seconds:
            allocation = _allocate(plan, model, linears, journal)
            requested = layer_sparsities(plan.sparsity, allocation, linears)
            report, recovered = _prune(plan, model, requested)
        trained = recover_model(plan, model, dense_weights)
        with progress.stage("measure", detail="sparsity of every layer"):
            evaluated_sha256, measured = _hash_and_measure(model, linears, requested)
            # what was asked for is checked on the weights themselves, not on what the method
            # reports; zeros of the dense model may come on top
            beyond = zeros_beyond(report, recovered, trained)
            require_met(measured, zeros, requested, beyond=beyond)
            require_total(measured, zeros, plan.sparsity, beyond=beyond)
        with packed_weights(plan, model, linears) as execution:
            outcomes = score_pruned(plan, model, dense_sha256 if is_dense else None, journal)
            diverged = score_divergence(plan, model, references)
        dense = outcomes if is_dense else dense
        result = Result(
            **build_identity(plan, status="ok"),
            model=build_model_block(plan, model, dense_sha256, evaluated_sha256),
            method=build_method_block(spec, report),
            calibration=plan.calibration,
            training=build_training_block(plan, report),
            allocation=build_allocation_block(spec, allocation),
            recovery=build_recovery_block(plan, recovered, trained),
            sparsity=build_sparsity_block(plan, measured, report, allocation),
            scores=build_score_blocks([*outcomes, *diverged], [*dense, *map(at_dense, diverged)]),
            execution=execution,
            cost=build_cost_block(
                plan,
                prune_seconds() - sum(block.seconds for block in recovered),
                starts=journal.state.starts if journal else 1,
                halvings=halvings,
            ),
        )
        # killed between writing the journal and publishing: the new start must not file a second
        # row
        result = _reuse_pending_result(result, journal)
        _publish(plan, result)  # the row first: a full disk must not cost an hour's work twice
        # from here on an error (a full disk for --save-model) is an error of saving, and the row
        # stays valid
        row_is_filed()
        for training in filter(None, (plan.training, plan.recovery_training)):
            training.forget()
        if plan.setup.log_samples:
            write_samples(plan.store.path_of(result), samples_of(outcomes, dense))
        _save_outputs(plan, model, linears, result, allocation)
    return result


def _hash_and_count_zeros(
    model: nn.Module, linears: list[Linear], journal: RunJournal | None
) -> tuple[str, dict[str, int]]:
    """Return the hash of the dense weights and the zeros of every linear, in one pass."""
    # resumed: an earlier start has read every block of the checkpoint for these two
    if journal and journal.state.dense:
        return journal.state.dense["sha256"], journal.state.dense["zeros"]
    zeros: dict[str, int] = {}

    # on disk, a block's weights are in memory only during `look`: hash and count in one reading
    def count(index: int) -> None:
        block_linears = [linear for linear in linears if linear.block_index == index]
        zeros.update({linear.name: int((linear.stored == 0).sum()) for linear in block_linears})

    sha256 = hash_weights(model, look=count)
    if journal:
        journal.update(dense={"sha256": sha256, "zeros": zeros})
    return sha256, zeros


def _hash_and_measure(
    model: nn.Module, linears: list[Linear], requested: dict[str, Sparsity]
) -> tuple[str, list[Measured]]:
    """Return the hash of the pruned weights and the sparsity of every linear, in one pass."""
    measured: dict[str, Measured] = {}

    def measure(index: int) -> None:
        for linear in linears:
            if linear.block_index == index:
                measured[linear.name] = measure_linear(linear, requested[linear.name])

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


def _prune(
    plan: Plan, model: nn.Module, requested: dict[str, Sparsity]
) -> tuple[PruneReport, list[RecoveredBlock]]:
    """Prune the model, with the recovery of each block."""
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
    recovery, learns = recovery_of(plan), plan.training is not None
    detail = f"{plan.spec.method} {plan.sparsity}"
    if recovery and not learns:
        detail += f", each block then by {plan.spec.recover.partition('+')[0]}"
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
        plan.training, hear=report, note=plan.progress.note, score_prior=prior
    )


def format_training_point(point: CurvePoint) -> str:
    """Format the measurements of a training step as one line."""
    loss = "" if point.loss is None else f"loss {point.loss:.3f}, "
    return (
        f"  step {point.step}: {loss}held-out ppl {point.held_out_ppl:,.4g}, "
        f"{point.changed:.2%} of the groups changed, certainty {point.certainty:.3f}, "
        f"temperature {point.temperature:.2g}, {point.seconds:.0f} s"
    )


def _reuse_pending_result(result: Result, journal: RunJournal | None) -> Result:
    """Return the result that an earlier start was about to save, if any: it keeps its name."""
    if journal is None:
        return result
    if journal.state.result is None:
        # written before it is published: id and time are chosen only once
        journal.update(result=result.to_json())
    return Result.model_validate_json(journal.state.result or "")


def _publish(plan: Plan, result: Result) -> None:
    """Save the result; if that fails, save it in the cache and name the file in the error."""
    # only with a journal can a result come up for publication twice
    if plan.weights == "disk" and plan.store.path_of(result).exists():
        return  # saved by an earlier start of this run
    try:
        plan.store.publish(result)
    except SaveError as error:
        # hours of work: the results folder is full or read-only, the cache may not be
        rescue = cache_dir() / "unfiled" / f"{result.id}.json"
        write_text(rescue, result.to_json())
        error.fix = f"the result was saved as {rescue}: {error.fix}, and copy it there"
        raise


def _save_outputs(
    plan: Plan, model: nn.Module, linears: list[Linear], result: Result, allocation: Allocation
) -> None:
    setup = plan.setup
    if setup.save_allocation:
        save_allocation(setup.save_allocation, allocation.ratios, linears)
    if setup.save_calibration and plan.windows:
        save_windows(setup.save_calibration, plan.windows)
    if setup.save_masks:
        with plan.progress.stage("save", detail=str(setup.save_masks)):
            save_masks(linears, setup.save_masks, weights=weights_of(model))
    if setup.save_model:
        save_model(
            model,
            plan.model,
            setup.save_model,
            result=result,
            replace=setup.force,
            progress=plan.progress,
        )
