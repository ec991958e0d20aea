"""Lines of text that fit a terminal: no word is broken, nothing is wrapped inside a cell."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Container, Mapping, Sequence

import typer

_WIDTH_OF_A_PIPE = 100
_LEAST_WIDTH = 80
_INDENT = "   "
_ASCII = str.maketrans({"±": "+-", "·": "|", "█": "#", "×": "x", **dict.fromkeys("▏▎▍▌▋▊▉", "-")})


def terminal_width() -> int:
    """Return the columns of the terminal: 80 at the least, and 100 where there is none."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return _WIDTH_OF_A_PIPE
    return max(_LEAST_WIDTH, shutil.get_terminal_size().columns)


def printable(text: str, encoding: str) -> str:
    """Return a text with what an encoding lacks (`±`, bars) as ASCII."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII)
    return text


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
    width = terminal_width() if sys.stdout.isatty() else None
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    lines = column_lines(titles, rows, unbroken=unbroken, right=right, width=width)
    for i, line in enumerate(lines):
        text = printable(line, encoding)
        # a color stands for a whole word between blanks, so that it is not part of another
        for word, color in (colors or {}).items():
            pattern = rf"(?<=  ){re.escape(word)}(?=  |$)"
            text = re.sub(pattern, typer.style(word, fg=color), text)
        typer.secho(text, bold=i == 0)


def column_lines(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, unbroken: Container[str],
    right: Container[str] = (), width: int | None = None,
) -> list[str]:  # fmt: skip
    """Return what `print_fitted` prints."""
    widths = [max(map(length, column)) for column in zip(titles, *rows, strict=True)]
    places = list(range(len(titles)))
    below: list[int] = []
    movable = sorted((i for i in places if titles[i] not in unbroken), key=lambda i: -widths[i])
    while width and movable and sum(widths[i] + 2 for i in places) - 2 > width:
        below = sorted([*below, movable.pop(0)])
        places = [i for i in places if i not in below]
    lines = []
    for line in [titles, *rows]:
        cells = [
            " " * (widths[i] - length(line[i])) + line[i]
            if titles[i] in right else padded(line[i], widths[i])
            for i in places
        ]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
        if line is not titles:
            # a number needs its title, words speak for themselves
            texts = [f"{titles[i]} {line[i]}" if titles[i] in right else line[i] for i in below]
            texts = [text for text, i in zip(texts, below, strict=True) if line[i] not in ("", "-")]
            lines += wrapped(texts, width, first=_INDENT, indent=_INDENT)
    return lines


def wrapped(
    parts: Sequence[str], width: int | None, *, between: str = " · ", first: str = "",
    indent: str = "",
) -> list[str]:  # fmt: skip
    """Put parts one after the other; a line ends between parts, or else between words.

    `first` is what the first line begins with, `indent` the others.
    """
    lines: list[str] = []
    line = ""

    def add(text: str, middle: str) -> None:
        nonlocal line
        begin = indent if lines else first
        if not line:
            line = begin + text
        elif width is None or length(line + middle + text) <= width:
            line += middle + text
        else:
            lines.append(line)
            line = indent + text

    for part in parts:
        if width is None or length(indent + part) <= width:
            add(part, between)
            continue
        for i, word in enumerate(part.split()):
            for j, piece in enumerate(_pieces(word, width - length(indent or first))):
                add(piece, "" if j else " " if i else between)
    return [*lines, line] if line else lines


def _pieces(word: str, room: int) -> list[str]:
    """Return a word in parts that fit a line: a path ends a line behind a slash, if it has to."""
    pieces = [""]
    for part in re.findall(r"[^/:=,.]*[/:=,.]|[^/:=,.]+", word) if length(word) > room else [word]:
        for text in [part] if length(part) <= room else part:  # else character by character
            if length(pieces[-1] + text) <= room:
                pieces[-1] += text
            else:
                pieces.append(text)
    return pieces


def padded(text: str, width: int) -> str:
    """Return a text with blanks behind it."""
    return text + " " * max(0, width - length(text))


def length(text: str) -> int:
    """Return how many columns of a terminal a text takes: a wide character takes two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
