"""`prunebench clean`: list and remove the checkpoints of interrupted runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prunebench.models.journal import JournalInfo


def clean_command(
    show: Annotated[
        bool, typer.Option("--list", "-l", help="Only list what is saved, remove nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is saved as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Remove what interrupted runs have saved to resume from, except of running processes."""
    from prunebench.models.journal import RunJournal
    from prunebench.run.resume import unfinished_runs

    infos = unfinished_runs()
    if not show:
        for info in infos:
            journal = RunJournal(info.folder)
            if journal.lock():  # not while a process holds it
                journal.remove()
    if as_json:
        typer.echo(json.dumps([asdict(info) | {"folder": str(info.folder)} for info in infos]))
        return
    if not infos:
        typer.echo("nothing is saved")
    for info in infos:
        print_kept(info, removed=not show and not info.running)


def print_kept(info: JournalInfo, *, removed: bool = False) -> None:
    """Print what one run has saved."""
    typer.echo(f"{info.title}{': removed' if removed else ''}")
    now = ", a process is running" if info.running else ""
    typer.echo(
        f"  {info.done} of {info.blocks} blocks, {info.size / 1e6:,.1f} MB, "
        f"{_age(info.age_seconds)} ago{now}"
    )
    typer.echo(f"  {info.folder}")
    if info.command and not removed:
        typer.echo(f"  resume with: {info.command}")


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
