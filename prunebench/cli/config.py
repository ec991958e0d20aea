"""The values of a run: from flags, environment, recipe and defaults, each with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from prunebench.distributed import device_of
from prunebench.models.source import find_model, local_path
from prunebench.run_options import RUN_KEYS, with_defaults
from prunebench.spec import AUTO
from prunebench.sweep.recipe import read_recipe


def collect(ctx: typer.Context, recipe: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge flags, environment, recipe and defaults; return the values and their sources."""
    explicit: dict[str, Any] = {}
    sources: dict[str, str] = {}
    read = read_recipe(recipe).single() if recipe else {}
    for key in RUN_KEYS:
        parameter = "set_" if key == "set" else key
        # click knows where a value came from: an option at its default must not override the recipe
        source = ctx.get_parameter_source(parameter)
        origin = source.name if source else "DEFAULT"
        if origin in ("COMMANDLINE", "ENVIRONMENT"):
            explicit[key] = ctx.params[parameter]
            sources[key] = "flag" if origin == "COMMANDLINE" else "environment"
        elif key in read:
            explicit[key] = read[key]
            sources[key] = f"recipe {recipe}"
    values = with_defaults(explicit)
    # `set` is split into the options of the method, of the allocator and of the recoverer
    order = [key for key in RUN_KEYS if key != "set"]
    sources = {key: sources.get(key, "default") for key in order} | dict.fromkeys(
        ("method_options", "allocation_options", "recover_options"), sources.get("set", "default")
    )
    return values, sources


def settle_dtype(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Replace the dtype `auto` by what a run on this machine would have, and say why.

    It stays where the model is not on this machine.
    """
    if values["dtype"] != AUTO:
        return
    source = find_model(values["model"])
    folder = local_path(source)
    if folder is None:
        sources["dtype"] += ": the checkpoint's own where the device has it (it is not here yet)"
        return
    from prunebench.models.device import choose_devices
    from prunebench.run.dtype import choose_dtype

    device = choose_devices(device_of(values["device"]))[0]
    choice = choose_dtype(AUTO, source, folder, device)
    values["dtype"] = choice.dtype
    sources["dtype"] += f": auto -> {choice.dtype}, {choice.reason}"


def print_config(values: dict[str, Any], sources: dict[str, str], *, as_json: bool) -> None:
    """Print every value with its source, on stdout."""
    if as_json:
        rows = {key: {"value": values[key], "source": sources[key]} for key in sources}
        typer.echo(json.dumps(rows, indent=1))
        return
    width = max(map(len, sources))
    for key, source in sources.items():
        value = values[key]
        shown = ",".join(value) if isinstance(value, tuple) else str(value)
        typer.echo(f"{key:<{width}}  {shown:<24}  {source}")
