"""`prunebench run --dry-run` and `--resume-info`: print a forecast, or what is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from prunebench.cli.clean import json_facts, print_kept, print_kept_training
from prunebench.cli.console import print_hanging
from prunebench.distributed import world_size
from prunebench.errors import UsageError
from prunebench.models.source import find_model, local_path
from prunebench.results.shown_options import shown_options
from prunebench.spec import NO_RECOVERY, RunSpec


def print_dry_run(spec: RunSpec, setup: Any, *, as_json: bool) -> None:
    """Check everything, print what would be run and what it would take; refuse what cannot fit."""
    from prunebench.run.forecast import require_fits
    from prunebench.run.plan import prepare

    source = find_model(spec.model)
    if source.kind != "gguf" and local_path(source) is None:
        raise UsageError(
            f"--dry-run needs the files of {spec.model}, and they are not on this machine",
            where="it checks sizes and tokens, and never downloads a model",
            fix=f"run prunebench models fetch {spec.model} first",
        )
    plan = prepare(spec, setup)
    if as_json:
        typer.echo(json.dumps(plan.spec.model_dump(mode="json"), indent=1))
        return
    typer.echo(
        f"{plan.spec.method} {plan.sparsity} on {plan.spec.model}, {plan.spec.dtype}, {plan.device}"
    )
    if plan.spec.allocation != "uniform":
        typer.echo(f"  spread over the layers by {plan.spec.allocation}")
    typer.echo(f"  {_what_is_pruned(plan)}")
    if plan.calibration:
        windows = plan.calibration
        bos = ", BOS in each window" if windows.bos == "window" else ""
        print_hanging(
            "  calibration ",
            f"{windows.samples} x {windows.seqlen} tokens of {windows.text}{bos}",
        )
        print_hanging("              from ", windows.origin)
    if plan.spec.recover != NO_RECOVERY:
        print_hanging("  recovery    ", f"{plan.spec.recover}: {_options_of_recovery(plan)}")
    for text in plan.texts:
        print_hanging("  perplexity  ", f"{text.protocol}, {text.targets:,} targets")
        print_hanging("              from ", text.origin)
    for task in plan.tasks:
        typer.echo(f"  accuracy    {task.name}, {task.units:,} documents")
    estimate = None
    if plan.training is not None:
        _print_training(plan, *_forecast_training(plan))
    if plan.training is None or plan.recoverer is not None:
        estimate = _print_forecast(plan)
    trained = _forecast_recovery(plan) if plan.model_recoverer is not None else None
    if trained:
        _print_training(plan, *trained)
    typer.echo(f"  spec {plan.spec.spec_id}; nothing was loaded, nothing was written")
    if estimate:
        require_fits(plan, estimate)
    if trained:
        from prunebench.run.forecast import require_training_fits

        require_training_fits(plan, trained[0].memory)


def _options_of_recovery(plan: Any) -> str:
    """Return what is not the default, as a row shows it."""
    spec = plan.spec
    (shown,), _ = shown_options("recover", spec.recover, [spec.recover_options], [spec.calibration])
    words = ", ".join(f"{name}={value}" for name, value in shown.items())
    return words or "with its defaults"


def _what_is_pruned(plan: Any) -> str:
    """Return how many matrices would get zeros, or how many blocks would be removed."""
    from prunebench.pruners.removal import BlockRemover, count_of_blocks

    if isinstance(plan.pruner, BlockRemover):
        depth = max(linear.block_index for linear in plan.linears) + 1
        return f"{count_of_blocks(plan.sparsity, depth)} of {depth} blocks would be removed"
    weights = sum(linear.size for linear in plan.linears)
    return f"{len(plan.linears)} linears with {weights:,} weights would be pruned"


def _print_forecast(plan: Any) -> Any:
    """Print what the run will take, and return it; None where that cannot be counted.

    Of a method that learns, which has been printed, what its recovery by blocks will take.
    """
    from prunebench.run.forecast import duration, forecast
    from prunebench.run.memory import gigabytes

    if plan.training is not None:
        typer.echo("  then        block by block, in a walk of its own")
    else:
        place = "in memory" if plan.weights == "resident" else "on disk, a block at a time"
        typer.echo(f"  weights     {place}")
    try:
        result = forecast(plan)
    # experts choose by the data, and the meta device has none
    except NotImplementedError:
        typer.echo("  memory      not counted: what experts take depends on the text")
        return None
    need = result.need
    for name, parts, total, free in (
        # on a CPU there is one memory, and `host` is empty
        ("memory" if not need.host else "GPU", need.device, need.device_total, result.device_free),
        ("memory", need.host, need.host_total, result.host_free),
    ):
        if parts:
            typer.echo(f"  {name:<11} {gigabytes(total)} at the peak, {gigabytes(free)} free")
            _print_sizes(parts)
    if need.disk:
        typer.echo(
            f"  disk        {gigabytes(need.disk)} in the cache, {gigabytes(result.disk_free)} free"
        )
    if result.seconds:
        stages = ", ".join(f"{name} {duration(s)}" for name, s in result.seconds.items())
        print_hanging("  time        ", f"{stages} (estimated from a probe)")
    else:
        typer.echo("  time        not estimated: this method cannot be probed")
    return result


def _print_sizes(parts: Mapping[str, int]) -> None:
    from prunebench.run.memory import gigabytes

    for what, size in sorted(parts.items(), key=lambda item: -item[1]):
        if size:
            typer.echo(f"              {gigabytes(size):>10}  {what}")


def _forecast_training(plan: Any) -> tuple[Any, Any, Any]:
    """Return what the training of a method will need, its windows and its text."""
    from prunebench.models.load import load_config, skeleton
    from prunebench.pruners.training import Forecasts

    if not isinstance(plan.pruner, Forecasts):
        return None, None, None
    import torch

    result = plan.pruner.forecast(
        skeleton(load_config(plan.model.path)),
        plan.sparsity,
        dtype=getattr(torch, plan.spec.dtype),
        device=plan.device,
        processes=world_size(),
    )
    return result, plan.training, plan.training_text


def _forecast_recovery(plan: Any) -> tuple[Any, Any, Any]:
    """Return what the end-to-end recovery will need, its windows and its text."""
    import torch

    from prunebench.models.load import load_config, skeleton

    result = plan.model_recoverer.forecast(
        skeleton(load_config(plan.model.path)),
        dtype=getattr(torch, plan.spec.dtype),
        device=plan.device,
        processes=world_size(),
    )
    return result, plan.recovery_training, plan.recovery_text


def _print_training(plan: Any, result: Any, data: Any, text: Any) -> None:
    """Print what a training will need: its forecast, windows and text."""
    from prunebench.run.forecast import duration, kept_bytes
    from prunebench.run.memory import DENSE_COPY, gigabytes

    if result is None:
        return
    of_method = data is plan.training
    title = "training" if of_method else "end to end"
    print_hanging(f"  {title:<11} ", f"{result.tokens:,} tokens of {text.name}")
    typer.echo(
        f"              {len(data.train):,} windows of {data.train.shape[1]}, "
        f"{len(data.held_out)} more are held out"
    )
    print_hanging("              from ", text.origin)
    memory = dict(result.memory)
    if of_method and plan.device.type == "cpu":  # beside a GPU it is host memory
        memory[DENSE_COPY] = kept_bytes(plan)
    each = " in each process" if world_size() > 1 else ""
    typer.echo(f"  memory      {gigabytes(sum(memory.values()))} at the peak{each}")
    _print_sizes(memory)
    if result.seconds is not None:
        besides = "; loading, the prior and the scores come on top" if of_method else ""
        print_hanging(
            "  time        ",
            f"steps {duration(result.seconds)}{besides} (estimated from a probe)",
        )


def print_resume_info(spec: RunSpec, setup: Any, *, as_json: bool) -> None:
    """Print what an interrupted run of this command has saved."""
    from prunebench.models.journal import journal_info
    from prunebench.run.resolve import resolve
    from prunebench.run.resume import journal_folder
    from prunebench.run.trainings import saved_trainings

    resolved = resolve(spec, setup)
    info, trainings = journal_info(journal_folder(resolved)), saved_trainings(resolved.spec)
    if as_json:
        facts = json_facts(info) if info else None
        steps = [json_facts(training) for training in trainings]
        typer.echo(json.dumps({"blocks": facts, "trainings": steps}, indent=1))
        return
    if info is None and not trainings:
        title = f"{resolved.spec.method} {resolved.sparsity} on {resolved.spec.model}"
        typer.echo(f"nothing is saved of {title}")
    if info is not None:
        print_kept(info)
    for training in trainings:
        print_kept_training(training)
