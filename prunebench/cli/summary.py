"""The summary that `prunebench run` prints at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer

from prunebench.results.bench_schema import QualityBlock
from prunebench.results.names import short_protocol
from prunebench.results.quantization_schema import QuantizationBlock
from prunebench.results.recovery_schema import EndToEndBlock, RecoveryBlock
from prunebench.results.removal_schema import RemovalBlock
from prunebench.results.render import metric_name, number, value_text
from prunebench.results.schema import ExecutionBlock, Result, Score
from prunebench.results.sizes import size_of, target_of

_MASKS = {"masks": "masks applied", "prior": "the training began with masks"}


def print_summary(result: Result, path: Path, setup: Any, *, masks: str | None = None) -> None:
    """Print the scores beside dense (and beside the prior's), what it took, and what was saved.

    Args:
        result: What came out.
        path: Its file.
        setup: The options that are no part of a spec.
        masks: The masks that were read, as the user or the catalog names them.
    """
    cost = result.cost
    assert cost is not None
    name = result.spec.method
    title = name if name == "dense" else f"{name} {target_of(result)}"
    if result.spec.allocation != "uniform":
        title += f", spread by {result.spec.allocation}"
    if result.recovery:
        title += f", then {result.spec.recover}"
    typer.echo(f"{title} on {result.spec.model}")
    for score in result.scores:
        line = f"  {short_title(score)}  {value_text(score.metric, score.value)}"
        if name != "dense" and score.dense_value:
            ratio = score.value / score.dense_value
            line += f"  (dense {value_text(score.metric, score.dense_value)}, {number(ratio)}x"
            before = [
                value_text(prior.metric, prior.value)
                for prior in (result.training.prior_scores if result.training else [])
                if (prior.metric, prior.protocol) == (score.metric, score.protocol)
            ]
            line += "".join(f"; the prior {value}" for value in before) + ")"
        typer.echo(line + full_protocol(score))
    if name != "dense":
        _print_weights(result)
    if result.recovery and result.recovery.blocks:
        _print_recovery(result.recovery)
    if result.recovery and result.recovery.training:
        _print_end_to_end(result.recovery.training)
    if masks:
        _print_masks(result, masks)
    if result.execution:
        _print_execution(result.execution)
    if result.method and result.method.events:
        kinds = sorted({event.kind for event in result.method.events})
        count = len(result.method.events)
        notes = "1 note" if count == 1 else f"{count} notes"
        typer.echo(f"  {notes} of the method: {', '.join(kinds)}")
    typer.echo(
        f"  {cost.total_seconds:.0f} s in all, peak memory {cost.peak_rss_bytes / 1e9:.2f} GB"
    )
    if result.completions:
        count = len(result.completions.completions)
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        typer.echo(f"  completions of {prompts} are in the result: prunebench report shows them")
    for kind, place in (
        ("model", setup.save_model),
        ("masks", setup.save_masks),
        ("allocation", setup.save_allocation),
    ):
        if place:
            typer.echo(f"  {kind} saved to {place}")
    typer.echo(f"  saved to {path}")


def _print_weights(result: Result) -> None:
    """Print what was done to the weights, and what a checkpoint of them takes."""
    cost, sparsity, model = result.cost, result.sparsity, result.model
    assert cost is not None and sparsity is not None and model is not None
    if result.quantization:
        _print_quantization(result.quantization)
    if sparsity.removal:
        _print_removal(result, sparsity.removal)
    else:
        typer.echo(
            f"  {sparsity.realised_ratio:.2%} of {model.prunable_parameters:,} weights "
            f"are zero, pruned in {cost.prune_seconds:.1f} s"
        )
    size = size_of(result)
    if size:
        typer.echo(
            f"  a checkpoint stored as {size.form} takes {size.total_bytes / 1e6:,.1f} MB, "
            f"{size.ratio:.3f} of the dense model in 16 bits (computed)"
        )


def _print_quantization(quantization: QuantizationBlock) -> None:
    """Print the grid of the weights, and what was checked of it."""
    group = "each row" if quantization.group_size == -1 else f"{quantization.group_size} weights"
    checked = "steps and codes give every weight" if quantization.exact else "values counted"
    kind = "symmetric, " if quantization.symmetric else ""
    typer.echo(
        f"  rounded to {quantization.bits} bits, {kind}a step for {group}: {checked}, "
        f"{quantization.groups:,} groups"
    )


def _print_removal(result: Result, removal: RemovalBlock) -> None:
    """Print which blocks are gone, and their share; no weight of the others became zero."""
    assert result.cost is not None and result.model is not None
    count, share = len(removal.blocks), removal.removed_parameters / result.model.parameters
    blocks = ", ".join(map(str, sorted(removal.blocks))) or "none"
    typer.echo(f"  {count} of {removal.blocks_before} blocks removed: {blocks}")
    typer.echo(
        f"  {result.removed_ratio:.2%} of {result.model.prunable_parameters:,} weights are gone, "
        f"{share:.2%} of all parameters, chosen in {result.cost.prune_seconds:.1f} s"
    )


def short_title(score: Score | QualityBlock) -> str:
    """Return `ppl wiki`."""
    return f"{metric_name(score.metric)} {short_protocol(score.protocol)}"


def full_protocol(score: Score | QualityBlock) -> str:
    """Return the id that stands at the end of a line with a short title, if it is another."""
    return f"  {score.protocol}" if score.protocol != short_protocol(score.protocol) else ""


def _print_recovery(recovery: RecoveryBlock) -> None:
    """Print the held-out error of all blocks before and after, and what it took."""
    before, after = recovery.held_out_before, recovery.held_out_after
    line = f"  recovered by {recovery.name.partition('+')[0]}"
    if before and after is not None:
        change = after / before - 1
        line += f": held-out error {before:.4g} -> {after:.4g} ({change:+.0%}, mean of the blocks)"
    line += f", in {recovery.recovered_blocks} of {len(recovery.blocks)} blocks"
    # `recovery.seconds` includes the training of the whole model, which has a line of its own
    seconds = math.fsum(block.seconds for block in recovery.blocks)
    typer.echo(f"{line}, {seconds:.1f} s")
    if not recovery.recovered_blocks:
        typer.echo("  warning: the recovery kept nothing; these are the weights of the method")


def _print_end_to_end(training: EndToEndBlock) -> None:
    """Print the held-out loss of the whole model before and after its training, and the cost."""
    before, after = training.before, training.after
    line = f"  trained end to end: held-out loss {_loss(before.loss)} -> {_loss(after.loss)}"
    if before.kl is not None and after.kl is not None:
        line += f" (KL {before.kl:.4f} -> {after.kl:.4f})"
    line += f", step {training.best_step} of {training.steps}"
    typer.echo(f"{line}, {training.tokens:,} tokens of {training.text}, {training.seconds:.1f} s")
    if not training.best_step:
        typer.echo("  warning: the training kept nothing; these are the weights it began with")


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _print_masks(result: Result, masks: str) -> None:
    """Print where the masks came from: repository and commit, or file and hash."""
    for option, title in _MASKS.items():
        origin = str(result.spec.method_options.get(option))
        if origin.startswith("hub:"):
            typer.echo(f"  {title}: {origin}")
        elif origin.startswith("sha256:"):
            typer.echo(f"  {title}: {masks} ({origin})")


def _print_execution(execution: ExecutionBlock) -> None:
    """Print which backends ran the packed layers, their bytes, and why layers stayed dense."""
    served = ", ".join(f"{count} by {name}" for name, count in sorted(execution.backends.items()))
    typer.echo(
        f"  scored with packed 2:4 weights: {served}; "
        f"{execution.stored_bytes / execution.dense_bytes:.4f} of their dense bytes"
    )
    for name, reason in list(execution.dense_layers.items())[:3]:
        typer.echo(f"  stayed dense: {name}: {reason}")
