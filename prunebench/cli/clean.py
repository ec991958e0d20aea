"""`prunebench clean`: what interrupted runs have kept, and how to be rid of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prunebench.models.journal import JournalInfo


def clean_command(
    show: Annotated[
        bool, typer.Option("--list", "-l", help="Only say what is kept, remove nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is kept as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Remove what interrupted runs have kept to go on from; runs that are at work stay."""
    from prunebench.models.journal import RunJournal
    from prunebench.run.resume import unfinished_runs

    infos = unfinished_runs()
    if not show:
        for info in infos:
            kept = RunJournal(info.folder)
            if kept.lock():  # not while a process is at it
                kept.remove()
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"folder": str(one.folder)} for one in infos]))
        return
    if not infos:
        typer.echo("nothing is kept")
    for info in infos:
        print_kept(info, removed=not show and not info.running)


def print_kept(info: JournalInfo, *, removed: bool = False) -> None:
    """Print what is kept of one run."""
    typer.echo(f"{info.title}{': removed' if removed else ''}")
    now = ", a process is at it" if info.running else ""
    typer.echo(
        f"  {info.done} of {info.blocks} blocks, {info.size / 1e6:,.1f} MB, "
        f"{_age(info.age_seconds)} ago{now}"
    )
    typer.echo(f"  {info.folder}")
    if info.command and not removed:
        typer.echo(f"  goes on with: {info.command}")


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
