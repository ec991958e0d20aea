"""`prunebench models`: which there are, what is known of one, fetching it, and where it lies."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from prunebench.cli.console import print_hanging
from prunebench.cli.exit_codes import guarded
from prunebench.cli.listing import list_command, model_facts
from prunebench.cli.progress import choose_progress
from prunebench.errors import MissingResource, UsageError, nearest
from prunebench.models.source import catalog, fetch_model, find_model, local_path

app = typer.Typer(
    help="List, show, fetch and find models.", no_args_is_help=True, add_completion=False
)


def models_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the aliases."""
    list_command("models", as_json)


def models_show(
    name: Annotated[str, typer.Argument(help="Alias.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what is known of an alias: license and terms, source, BOS, and where it lies."""
    entry = catalog().get(name)
    if entry is None:
        raise UsageError(f"there is no alias {name!r}", fix=nearest(name, catalog()))
    path = local_path(find_model(name))
    facts = model_facts(name, entry) | {"path": str(path) if path else None}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    facts["bos"] = "in every window" if entry.bos == "window" else "once a text"
    facts["terms"] = entry.terms and f"fetching it accepts the terms at {entry.terms}"
    facts["path"] = facts["path"] or f"not fetched: prunebench models fetch {name}"
    for key, value in facts.items():
        if value:
            print_hanging(f"{key:<9}", str(value))


def models_fetch(
    name: Annotated[str, typer.Argument(help="Alias, org/name of the hub, or .gguf file.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Download (and convert) a model now; prints its folder."""
    local = fetch_model(find_model(name), choose_progress(quiet=quiet))
    typer.echo(str(local.path))


def models_path(name: Annotated[str, typer.Argument(help="Alias or org/name.")]) -> None:
    """Print the folder of a model that is on this machine."""
    path = local_path(find_model(name))
    if path is None:
        raise MissingResource(
            f"{name} is not on this machine", fix=f"run prunebench models fetch {name}"
        )
    typer.echo(str(path))


app.command("list")(guarded(models_list))
app.command("show")(guarded(models_show))
app.command("fetch")(guarded(models_fetch))
app.command("path")(guarded(models_path))
