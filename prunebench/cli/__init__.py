"""The command line: the only code that prints or exits.

Commands are one file each, imported when the command is called: `--help`, `list` and `compare`
answer without torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from prunebench import __version__
from prunebench.cli.lazy import LazyGroup


class _Commands(LazyGroup):
    commands_by_name = {
        "run": ("run:run_command", "Prune a model, measure what it cost, and save the result."),
        "sweep": (
            "sweep:sweep_command",
            "Run the cells of a recipe that are not finished yet, each in a process of its own.",
        ),
        "recommend": (
            "recommend:recommend_command",
            "Find the cheapest configuration that holds a floor of quality on your text.",
        ),
        "validate": (
            "sweep:validate_command",
            "Check recipes: keys, names, options and expectations, without a model or a network.",
        ),
        "compare": (
            "compare:compare_command",
            "Show which method keeps how much at each sparsity, how sure that is, and what it "
            "cost.",
        ),
        "report": (
            "report:report_command",
            "Write one page with tables, figures and provenance; it needs no network.",
        ),
        "list": ("listing:list_command", "List methods, allocators, recoverers, models or texts."),
        "bench": (
            "bench:bench_command",
            "Measure a pruned checkpoint against the dense model: quality, bytes and speed.",
        ),
        "sample": (
            "sample:sample_command",
            "Continue prompts with the dense model and with pruned ones, side by side.",
        ),
        "inspect": (
            "inspect:inspect_command",
            "Show the sparsity of a checkpoint, matrix by matrix, and whether its N:M pattern "
            "holds.",
        ),
        "export": (
            "export:export_command",
            "Write a Hugging Face folder: weights, model card with scores, keep masks, recipe.",
        ),
        "clean": (
            "clean:clean_command",
            "Remove what interrupted runs have saved to resume from, except of running processes.",
        ),
        "check": (
            "check:check_command",
            "Run the public contract of a pruner or recoverer on tiny random models.",
        ),
        "doctor": (
            "doctor:doctor_command",
            "Look at packages, devices, folders and the network, and say what is missing.",
        ),
        "models": ("models:app", "List, show, fetch and find models."),
        "results": ("results:app", "Check and tabulate result files."),
    }


app = typer.Typer(
    cls=_Commands,
    name="prunebench",
    help="Prune language models with any published method, and find out what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    # set by a sweep for its jobs: watch the parent before anything slow is imported
    if "PRUNEBENCH_PARENT" in os.environ:
        from prunebench.sweep.engines.process import end_with_parent

        end_with_parent()
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(130)
