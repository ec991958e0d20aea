"""`prunebench models`: which there are, fetching one, and where it lies."""

from __future__ import annotations

from typing import Annotated

import typer

from prunebench.cli.exit_codes import guarded
from prunebench.cli.listing import list_command
from prunebench.cli.progress import choose_progress
from prunebench.errors import MissingResource
from prunebench.models.source import fetch_model, find_model, local_path

app = typer.Typer(help="List, fetch and find models.", no_args_is_help=True, add_completion=False)


def models_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the aliases."""
    list_command("models", as_json)


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
app.command("fetch")(guarded(models_fetch))
app.command("path")(guarded(models_path))
