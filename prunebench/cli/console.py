"""What is printed to stdout: as wide as the terminal at most, and no word broken.

A file or a pipe has no width: there, a row is one line.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Container, Mapping, Sequence

import typer

from prunebench.cli.fitting import column_lines, hanging, hanging_columns, printable, wrap

_WIDTH_OF_A_PIPE = 100
_LEAST_WIDTH = 80


def terminal_width(*, err: bool = False) -> int | None:
    """Return the columns of the terminal; None where stdout (or stderr) is none."""
    stream = sys.stderr if err else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None


def table_width() -> int:
    """Return the columns of the terminal: 80 at the least, and 100 where there is none."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return _WIDTH_OF_A_PIPE
    return max(_LEAST_WIDTH, shutil.get_terminal_size().columns)


def print_hanging(prefix: str, text: str, *, err: bool = False) -> None:
    """Print a text behind `prefix`, wrapped between words on a terminal."""
    for line in hanging(prefix, text, terminal_width(err=err)):
        typer.echo(line, err=err)


def print_command(prefix: str, words: Sequence[str]) -> None:
    """Print a command behind `prefix`; on a terminal over several lines, to be copied as it is."""
    import shlex

    width = terminal_width()
    room = None if width is None else width - len(prefix)
    units: list[str] = []
    for word in map(shlex.quote, words):
        pair = f"{units[-1]} {word}" if units else ""
        # a value stays beside its flag, where a line has room for both
        is_value = pair.startswith("--") and " " not in units[-1] and word[0] != "-"
        if is_value and (room is None or len(pair) <= room - len(" \\")):
            units[-1] = pair
        else:
            units.append(word)
    lines = wrap(units, room, end=" \\")
    for number, line in enumerate(lines):
        typer.echo((" " * len(prefix) if number else prefix) + line)


def print_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Container[str] = ()
) -> None:
    """Print rows under bold titles; on a terminal the last column wraps between words.

    Args:
        titles: One for every column.
        rows: The cells.
        right: Titles of columns that are aligned to the right.
    """
    width = terminal_width()
    for number, line in enumerate(hanging_columns(titles, rows, right, width)):
        typer.secho(line.rstrip(), bold=number == 0)


def print_fitted(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, unbroken: Container[str],
    right: Container[str] = (), colors: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Print rows under bold titles.

    On a terminal that is too narrow, the widest columns that are not `unbroken` stand below their
    row; a file or pipe has no width.

    Args:
        titles: Of the columns.
        rows: The texts of the cells.
        unbroken: The titles of the columns that stay.
        right: The titles of those that are aligned on the right.
        colors: The color of a cell by its text.
    """
    width = terminal_width()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    lines = column_lines(titles, rows, unbroken=unbroken, right=right, width=width)
    for i, line in enumerate(lines):
        text = printable(line, encoding)
        # a color stands for a whole word between blanks, so that it is not part of another
        for word, color in (colors or {}).items():
            pattern = rf"(?<=  ){re.escape(word)}(?=  |$)"
            text = re.sub(pattern, typer.style(word, fg=color), text)
        typer.secho(text, bold=i == 0)
