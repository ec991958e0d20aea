"""The command line: the only code that prints or exits.

Commands are one file each. Nothing heavy is imported here: `--help`, `list` and `compare` answer
without torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from prunebench import __version__
from prunebench.cli import (
    bench,
    check,
    clean,
    compare,
    doctor,
    export,
    inspect,
    listing,
    models,
    report,
    results,
    run,
    sweep,
)
from prunebench.cli.exit_codes import guarded

app = typer.Typer(
    name="prunebench",
    help="Prune language models with any published method, and find out what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(guarded(run.run_command))
app.command("sweep")(guarded(sweep.sweep_command))
app.command("validate")(guarded(sweep.validate_command))
app.command("compare")(guarded(compare.compare_command))
app.command("report")(guarded(report.report_command))
app.command("list")(guarded(listing.list_command))
app.command("bench")(guarded(bench.bench_command))
app.command("inspect")(guarded(inspect.inspect_command))
app.command("export")(guarded(export.export_command))
app.command("clean")(guarded(clean.clean_command))
app.command("check")(guarded(check.check_command))
app.command("doctor")(guarded(doctor.doctor_command))
app.add_typer(models.app, name="models")
app.add_typer(results.app, name="results")


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"prunebench {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of the `prunebench` program."""
    if "PRUNEBENCH_PARENT" in os.environ:
        from prunebench.sweep.engines.process import end_with_parent

        end_with_parent()
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(130)
