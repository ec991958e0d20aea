"""The console that tables are printed to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200  # a file or pipe has no width; rich would wrap everything at 80


def wide_console() -> Console:
    """Return a console for stdout: as wide as the terminal, or wide enough not to wrap."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(highlight=False, markup=False, width=width)


def print_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, unbroken: Container[str]
) -> None:
    """Print rows under bold titles; columns that are not `unbroken` fold on a narrow terminal."""
    from rich.cells import cell_len

    lines = [titles, *rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    needed = sum(widths) + 2 * (len(widths) - 1)
    if not sys.stdout.isatty() or needed <= shutil.get_terminal_size().columns:
        # nothing to fold: rich's console and layout would take a third of the time of `list`
        for i, line in enumerate(lines):
            padded = [
                text + " " * (width - cell_len(text))
                for text, width in zip(line, widths, strict=True)
            ]
            typer.secho("  ".join(padded).rstrip(), bold=i == 0)
        return
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        grid.add_column(title, overflow="fold", no_wrap=title in unbroken)
    for row in rows:
        grid.add_row(*row)
    wide_console().print(grid)
