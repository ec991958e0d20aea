"""One run: check, load, score the dense model, prune, measure, score again, save the result.

    plan = prepare(spec, setup)     # no weight is loaded; what can fail early fails here
    result = execute(plan)

`run` does both. `execute` is the whole story of a run.
"""

from __future__ import annotations

from torch import nn

from prunebench.allocators.allocation import Allocation, save_allocation
from prunebench.calibration.windows import save_windows
from prunebench.checkpoints.save import save_masks, save_model
from prunebench.distributed import process_group, rank
from prunebench.errors import SaveError
from prunebench.evaluate.divergence import at_dense
from prunebench.files import cache_dir, write_text
from prunebench.models.journal import RunJournal
from prunebench.models.linears import Linear, find_linears
from prunebench.models.weights import weights_of
from prunebench.progress import quiet_libraries
from prunebench.pruners import METHODS
from prunebench.results.samples import write_samples
from prunebench.results.schema import Result
from prunebench.run.completions import build_completions_block, write_completions
from prunebench.run.failures import failures_are_filed, memory_errors, record_halvings
from prunebench.run.packed import packed_weights
from prunebench.run.plan import Plan, prepare
from prunebench.run.pruning import hash_and_count_zeros, prune_linears, prune_model
from prunebench.run.recover import dense_copies, recover_model
from prunebench.run.result import (
    build_allocation_block,
    build_cost_block,
    build_identity,
    build_method_block,
    build_model_block,
    build_quantization_block,
    build_recovery_block,
    build_sparsity_block,
    build_training_block,
)
from prunebench.run.resume import open_model, open_run_state
from prunebench.run.scoring import (
    build_score_blocks,
    collect_dense_logits,
    samples_of,
    score_dense,
    score_divergence,
    score_pruned,
)
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
    with process_group(device=str(plan.device), trains=bool(plan.trainings)):
        if rank() == 0:
            return _execute(plan)
        _assist(plan)
        return None


def _assist(plan: Plan) -> None:
    """Train together with rank 0, and save nothing."""
    with memory_errors(plan.device, plan):
        dense = dense_copies(plan, model := open_model(plan, None))
        # a method that does not learn prunes in rank 0 alone
        if plan.training is not None:
            sparsities = {linear.name: plan.sparsity for linear in find_linears(model)}
            prune_linears(plan, model, sparsities)
        recover_model(plan, model, dense)


def _execute(plan: Plan) -> Result:
    spec, progress = plan.spec, plan.progress
    halvings: list[str] = []
    with (
        failures_are_filed(plan) as row_is_filed,
        memory_errors(plan.device, plan),
        record_halvings(plan, halvings),
        open_run_state(plan) as journal,
    ):
        with progress.stage("load", detail=f"{spec.model} in {spec.dtype} on {plan.device}"):
            model = open_model(plan, journal)
            linears = find_linears(model)
            dense_sha256, zeros = hash_and_count_zeros(model, linears, journal)
        # a dense run is scored once, as "pruned"; those outcomes are its baseline too. With packed
        # weights the two differ, and both are scored
        is_dense = METHODS.find(spec.method).is_baseline and spec.execute == "dense"
        dense = [] if is_dense else score_dense(plan, model, dense_sha256)
        # before pruning: the dense weights are overwritten in place
        references = collect_dense_logits(plan, model)
        dense_text = [] if is_dense else write_completions(plan, model)
        pruned = prune_model(plan, model, linears, zeros, journal)
        allocation, report = pruned.allocation, pruned.report
        with packed_weights(plan, model, linears) as execution:
            outcomes = score_pruned(plan, model, dense_sha256 if is_dense else None, journal)
            diverged = score_divergence(plan, model, references)
            text = write_completions(plan, model)
        dense = outcomes if is_dense else dense
        result = Result(
            **build_identity(plan, status="ok"),
            model=build_model_block(plan, model, report, dense_sha256, pruned.sha256),
            method=build_method_block(spec, report),
            calibration=plan.calibration,
            training=build_training_block(plan, report),
            allocation=build_allocation_block(spec, allocation),
            recovery=build_recovery_block(plan, pruned.recovered, pruned.trained),
            sparsity=build_sparsity_block(plan, pruned.measured, report, allocation),
            quantization=build_quantization_block(plan, pruned.measured),
            scores=build_score_blocks([*outcomes, *diverged], [*dense, *map(at_dense, diverged)]),
            completions=build_completions_block(text, text if is_dense else dense_text),
            execution=execution,
            cost=build_cost_block(
                plan,
                pruned.seconds,
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
        if plan.setup.log_samples:
            write_samples(plan.store.path_of(result), samples_of(outcomes, dense))
        _save_outputs(plan, model, linears, result, allocation)
        for training in plan.trainings:
            training.forget()  # not before its weights are saved: a full disk must not cost them
    return result


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
