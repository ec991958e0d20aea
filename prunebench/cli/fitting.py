"""Lines of text that fit a width: no word is broken, nothing is wrapped inside a cell."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence

_LEAST = 16  # a narrower last column is printed under its row instead
_INDENT = "   "
_ASCII = str.maketrans(
    {"±": "+-", "·": "|", "█": "#", "×": "x", "▸": ">", **dict.fromkeys("▏▎▍▌▋▊▉", "-")}
)


def printable(text: str, encoding: str) -> str:
    """Return a text with what an encoding lacks (`±`, bars) as ASCII."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII)
    return text


def wrap(words: Sequence[str], width: int | None, *, end: str = "") -> list[str]:
    """Join words to lines of at most `width` columns; a longer word has a line of its own.

    Args:
        words: None of them is broken.
        width: None puts all on one line.
        end: What every line but the last ends with.
    """
    lines = [""]
    for word in words:
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if width is None or not lines[-1] or length(joined) + length(end) <= width:
            lines[-1] = joined
        else:
            lines[-1] += end
            lines.append(word)
    return lines


def hanging(prefix: str, text: str, width: int | None) -> list[str]:
    """Return the lines of a text that stands behind `prefix` on each; blank but on the first.

    A text with a word too long for that (a path) stands below the prefix.
    """
    indent = length(prefix)
    if width is None:
        return [prefix + text]
    words = text.split()
    if indent > 4 and any(length(word) > width - indent for word in words):
        return [prefix.rstrip(), *("    " + line for line in wrap(words, width - 4))]
    first, *rest = wrap(words, width - indent)
    return [prefix + first, *(" " * indent + line for line in rest)]


def hanging_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], right: Container[str], width: int | None
) -> Iterator[str]:
    """Return what `print_columns` prints."""
    lines = [titles, *rows]
    sizes = [max(map(length, column)) for column in zip(*lines, strict=True)]
    taken = sum(sizes[:-1]) + 2 * (len(sizes) - 1)
    fits = width is None or taken + sizes[-1] <= width
    # too narrow for a last column: it stands below its row
    below = not fits and width is not None and width - taken < _LEAST
    for line in lines:
        cells = [
            " " * (size - length(text)) + text
            if title in right and (fits or number + 1 < len(sizes))
            else text + " " * (size - length(text))
            for number, (title, text, size) in enumerate(zip(titles, line, sizes, strict=True))
        ]
        prefix = "".join(f"{cell}  " for cell in cells[:-1])
        if fits:
            yield prefix + cells[-1]
        elif not below or length(line[-1]) <= (width or 0) - taken:
            yield from hanging(prefix, line[-1], width)
        else:
            first, *others = wrap([cell.strip() for cell in cells[:-1]], width)
            aligned = taken - 2 <= (width or 0)
            yield prefix if aligned else first
            yield from [] if aligned else [f"    {other}" for other in others]
            yield from hanging("    ", line[-1], width)


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
