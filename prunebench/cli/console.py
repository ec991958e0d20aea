"""What is printed to stdout: as wide as the terminal at most, and no word broken.

A file or a pipe has no width: there, a row is one line.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Container, Iterator, Sequence

import typer

_LEAST = 16  # a narrower last column is printed under its row instead


def terminal_width(*, err: bool = False) -> int | None:
    """Return the columns of the terminal; None where stdout (or stderr) is none."""
    stream = sys.stderr if err else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrap(words: Sequence[str], width: int | None, *, end: str = "") -> list[str]:
    """Join words to lines of at most `width` columns; a longer word has a line of its own.

    Args:
        words: None of them is broken.
        width: None puts all on one line.
        end: What every line but the last ends with.
    """
    from rich.cells import cell_len

    lines = [""]
    for word in words:
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if width is None or not lines[-1] or cell_len(joined) + cell_len(end) <= width:
            lines[-1] = joined
        else:
            lines[-1] += end
            lines.append(word)
    return lines


def hanging(prefix: str, text: str, width: int | None) -> list[str]:
    """Return the lines of a text that stands behind `prefix` on each; blank but on the first.

    A text with a word too long for that (a path) stands below the prefix.
    """
    from rich.cells import cell_len

    indent = cell_len(prefix)
    if width is None:
        return [prefix + text]
    words = text.split()
    if indent > 4 and any(cell_len(word) > width - indent for word in words):
        return [prefix.rstrip(), *("    " + line for line in wrap(words, width - 4))]
    first, *rest = wrap(words, width - indent)
    return [prefix + first, *(" " * indent + line for line in rest)]


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
    for number, line in enumerate(_column_lines(titles, rows, right, width)):
        typer.secho(line.rstrip(), bold=number == 0)


def _column_lines(
    titles: Sequence[str], rows: Sequence[Sequence[str]], right: Container[str], width: int | None
) -> Iterator[str]:
    from rich.cells import cell_len

    lines = [titles, *rows]
    sizes = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    taken = sum(sizes[:-1]) + 2 * (len(sizes) - 1)
    fits = width is None or taken + sizes[-1] <= width
    # too narrow for a last column: it stands below its row
    below = not fits and width is not None and width - taken < _LEAST
    for line in lines:
        cells = [
            " " * (size - cell_len(text)) + text
            if title in right and (fits or number + 1 < len(sizes))
            else text + " " * (size - cell_len(text))
            for number, (title, text, size) in enumerate(zip(titles, line, sizes, strict=True))
        ]
        prefix = "".join(f"{cell}  " for cell in cells[:-1])
        if fits:
            yield prefix + cells[-1]
        elif not below or cell_len(line[-1]) <= (width or 0) - taken:
            yield from hanging(prefix, line[-1], width)
        else:
            first, *others = wrap([cell.strip() for cell in cells[:-1]], width)
            aligned = taken - 2 <= (width or 0)
            yield prefix if aligned else first
            yield from [] if aligned else [f"    {other}" for other in others]
            yield from hanging("    ", line[-1], width)
