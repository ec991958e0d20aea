"""`prunebench run --dry-run`: everything that can be said of a run without a weight."""

from __future__ import annotations

import json
from typing import Any

import typer

from prunebench.errors import UsageError
from prunebench.models.source import find_model, local_path
from prunebench.processes import world_size
from prunebench.spec import RunSpec


def dry_run(spec: RunSpec, setup: Any, *, as_json: bool) -> None:
    """Check a run, and say what it would read, do and need.

    Raises:
        UsageError: The model is not on this machine.
    """
    from prunebench.prepare import prepare

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
    weights = sum(linear.size for linear in plan.linears)
    typer.echo(f"{plan.spec.method} {plan.sparsity} on {plan.spec.model}, {plan.device}")
    if plan.spec.allocation != "uniform":
        typer.echo(f"  spread over the layers by {plan.spec.allocation}")
    typer.echo(f"  {len(plan.linears)} linears with {weights:,} weights would be pruned")
    if plan.calibration:
        one = plan.calibration
        typer.echo(f"  calibration {one.samples} x {one.seqlen} tokens of {one.text}")
        typer.echo(f"              from {one.origin}")
    for text in plan.texts:
        typer.echo(f"  perplexity  {text.protocol}, {text.targets:,} targets")
        typer.echo(f"              from {text.origin}")
    _forecast(plan)
    for task in plan.tasks:
        typer.echo(f"  accuracy    {task.name}, {task.units:,} documents")
    typer.echo(f"  spec {plan.spec.spec_id}; nothing was loaded, nothing was written")


def _forecast(plan: Any) -> None:
    """Say what a training will need."""
    from prunebench.models.load import load_config, skeleton
    from prunebench.pruners.layer import Forecasts

    if plan.training is None or not isinstance(plan.pruner, Forecasts):
        return
    import torch

    found = plan.pruner.forecast(
        skeleton(load_config(plan.model.path)),
        plan.sparsity,
        dtype=getattr(torch, plan.spec.dtype),
        device=plan.device,
        processes=world_size(),
    )
    if found is None:
        return
    data, (text, origin) = plan.training, plan.training_text
    typer.echo(f"  training    {found.tokens:,} tokens of {text}")
    typer.echo(
        f"              {len(data.train):,} windows of {data.train.shape[1]}, "
        f"{len(data.held_out)} more are held out"
    )
    typer.echo(f"              from {origin}")
    for name, size in found.memory.items():
        typer.echo(f"  memory      {size / 1e9:8.2f} GB  {name}")
    total = sum(found.memory.values())
    typer.echo(f"              {total / 1e9:8.2f} GB  in all, in each process")
    if found.seconds is not None:
        typer.echo(
            f"  time        about {_duration(found.seconds)} for the steps, by a probe of this "
            "machine's products and mask passes;"
        )
        typer.echo("              loading, the prior and the scores come on top")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
