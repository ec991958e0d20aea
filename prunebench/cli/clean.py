"""`prunebench clean`: list and remove what interrupted runs and trainings have saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prunebench.models.journal import JournalInfo
    from prunebench.training.state_folder import TrainingInfo


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
    from prunebench.run.trainings import unfinished_trainings

    infos, trainings = unfinished_runs(), unfinished_trainings()
    if not show:
        for info in infos:
            journal = RunJournal(info.folder)
            if journal.lock():  # not while a process holds it
                journal.remove()
        for training in trainings:
            training.remove()
    if as_json:
        saved: list[JournalInfo | TrainingInfo] = [*infos, *trainings]
        typer.echo(json.dumps([json_facts(row) for row in saved]))
        return
    if not infos and not trainings:
        typer.echo("nothing is saved")
    for info in infos:
        print_kept(info, removed=not show and not info.running)
    for training in trainings:
        print_kept_training(training, removed=not show and not training.running)


def json_facts(info: JournalInfo | TrainingInfo) -> dict[str, Any]:
    """Return what is saved as JSON has it."""
    return asdict(info) | {"folder": str(info.folder)}


def print_kept(info: JournalInfo, *, removed: bool = False) -> None:
    """Print what one run has saved."""
    _print_saved(info, info.title, f"{info.done} of {info.blocks} blocks", removed=removed)
    if info.command and not removed:
        typer.echo(f"  resume with: {info.command}")


def print_kept_training(info: TrainingInfo, *, removed: bool = False) -> None:
    """Print what one training has saved; the command of its run resumes it."""
    title = info.title or "a training before its first saved step"
    _print_saved(info, title, f"{info.done} of {info.steps} steps", removed=removed)


def _print_saved(info: JournalInfo | TrainingInfo, title: str, done: str, *, removed: bool) -> None:
    typer.echo(f"{title}{': removed' if removed else ''}")
    now = ", a process is running" if info.running else ""
    typer.echo(f"  {done}, {info.size / 1e6:,.1f} MB, {_age(info.age_seconds)} ago{now}")
    typer.echo(f"  {info.folder}")


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
