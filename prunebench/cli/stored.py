"""The message of a command that has no result to show."""

from __future__ import annotations

from pathlib import Path

import typer

from prunebench.cli.exit_codes import say
from prunebench.results.store import holds_results


def require_results(results_dir: Path) -> None:
    """End with exit code 3, and one line, where there is no result yet to be shown."""
    if not holds_results(results_dir):
        say(f"no results yet in {results_dir}/; run prunebench run")
        raise typer.Exit(3)
