"""The short table as lines of text that fit a terminal: no word is broken, no cell is wrapped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import typer

from prunebench.cli.console import table_width
from prunebench.cli.fitting import length, padded, printable, wrapped
from prunebench.results.columns import NAMED_RANK, SHOWN_RANK, Column
from prunebench.results.finding import finding
from prunebench.results.overview import Block, Line, Overview

_BAR = 8
_NEEDED_RANK = 4  # columns up to this rank come before long names
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class _Styled:
    """A line; from `bold` to `end` it is bold."""

    text: str
    bold: int = 0
    end: int = 0
    dim: bool = False
    good: bool = False

    def styled(self) -> str:
        """Return the line with the escapes of a terminal."""
        if self.dim:
            return typer.style(self.text, dim=True)
        if not self.end:
            return self.text
        middle = typer.style(
            self.text[self.bold : self.end], bold=True, fg="green" if self.good else None
        )
        return self.text[: self.bold] + middle + self.text[self.end :]


def print_overview(tables: Overview, *, columns: Sequence[str] = (), wide: bool = False) -> None:
    """Print the short table on stdout, as wide as the terminal, or as it needs to be."""
    width = None if wide else table_width()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in overview_lines(tables, width=width, columns=columns):
        # typer takes the escapes out again where stdout is no terminal
        text = line.text if "NO_COLOR" in os.environ else line.styled()
        typer.echo(printable(text, encoding))


def overview_lines(
    tables: Overview, *, width: int | None, columns: Sequence[str] = ()
) -> list[_Styled]:
    """Return the lines of the short table.

    Args:
        tables: What is shown.
        width: None for as wide as it needs to be, with all columns.
        columns: The keys of the columns; none for those that fit.
    """
    lines: list[_Styled] = []
    layouts: list[_Layout] = []
    hidden: dict[str, None] = {}  # an ordered set
    for block in tables.blocks:
        layout = _Layout.of(block, width=width, keys=columns)
        layouts.append(layout)
        hidden |= dict.fromkeys(layout.hidden)
        head = wrapped([block.model, *block.caption], width, indent="  ")
        bold = len(block.model) if head[0].startswith(block.model) else 0
        lines += [_Styled(head[0], end=bold), *map(_Styled, head[1:])]
        for section in block.sections:
            lines.append(_Styled(layout.titles(section.title), end=len(section.title)))
            for line in section.lines:
                lines += layout.row(line)
        lines += map(_Styled, wrapped([finding(block)], width, indent="  "))
        lines.append(_Styled(""))
    left_out = [f"hidden: {', '.join(hidden)} (--columns NAMES, --wide)"] if hidden else []
    settings = sum(block.hidden_settings for block in tables.blocks)
    noun = "setting" if settings == 1 else "settings"
    left_out += [f"{settings} more {noun} (--all)"] if settings else []
    bars = any(fitted.bar for layout in layouts for fitted in layout.columns)
    legend = [*tables.legend, *(["bar: what is left of dense"] if bars else [])]
    for texts in (legend, left_out):
        lines += [_Styled(text, dim=True) for text in wrapped(texts, width, indent="  ")]
    return lines


@dataclass(frozen=True)
class _Layout:
    """Which columns are shown, and how wide they are."""

    width: int | None
    label: int
    columns: tuple[_Fitted, ...]
    hidden: tuple[str, ...]

    @classmethod
    def of(cls, block: Block, *, width: int | None, keys: Sequence[str]) -> _Layout:
        rows = [line for section in block.sections for line in section.lines]
        labels = [length(" ".join(line.words)) for line in rows]
        every = [_Fitted.of(column, rows) for column in block.columns]
        if width is None:
            named = [c for c in every if c.column.key in keys] if keys else every
            return cls(None, max(labels), tuple(named), ())
        by_key = {fitted.column.key: fitted for fitted in every}
        named = [by_key[key] for key in keys if key in by_key]
        offered = named or [c for c in every if c.column.rank < SHOWN_RANK]
        # a method's name of more than half a line stands on a line of its own
        names = [n for line in rows if (n := length(line.words[0])) <= width // 2]
        least = max([16, *names])
        wanted = min(max(labels), max(least, int(0.28 * width)))
        taken: list[_Fitted] = []
        for fitted in offered if named else sorted(offered, key=lambda c: c.column.rank):
            needed = named or fitted.column.rank <= _NEEDED_RANK
            room = width - 1 - (least if needed else wanted) - sum(c.total for c in taken)
            if fitted.total <= room:
                taken.append(fitted)
            elif fitted.plain_total <= room:
                taken.append(fitted.without_bar())
        keys_taken = {fitted.column.key for fitted in taken}
        shown = taken if named else [
            next(t for t in taken if t.column is c.column) for c in every
            if c.column.key in keys_taken
        ]  # fmt: skip
        left = width - 1 - sum(fitted.total for fitted in shown)
        candidates = named or [c for c in every if c.column.rank < NAMED_RANK]
        hidden = [c.column.key for c in candidates if c.column.key not in keys_taken]
        # a few long labels, part of which stands below their row, make no wider column
        room = min(left, int(0.4 * width))
        label = max((size for size in labels if size <= room), default=min(left, least))
        return cls(width, label, tuple(shown), tuple(hidden))

    def titles(self, section: str) -> str:
        """Return the line that begins a section, with the titles of the columns."""
        cells = "".join(f"  {fitted.title}" for fitted in self.columns)
        return (padded(section, self.label + 1) + cells).rstrip()

    def row(self, line: Line) -> list[_Styled]:
        """Return a row, and below it what of its name and settings has no place, and its note."""
        first, rest = _split(line.words, self.label)
        cells = "".join(f"  {fitted.cell(line)}" for fitted in self.columns)
        # a name that is wider than its column has a line of its own, above the values
        start = "   " if first else line.mark
        named, *others = wrapped(rest, self.width, between=" ", first=start, indent="   ") or [""]
        name = line.mark + padded(first, self.label) if first else " " * (self.label + 1)
        texts = [name + cells, *([named] if named else []), *others]
        if not first:
            texts[:2] = texts[1::-1]
        lines = [_Styled(text.rstrip()) for text in texts]
        if line.mark == "*":
            end = len(line.mark + first) if first else len(texts[0])
            lines[0] = _Styled(lines[0].text, end=end, good=True)
        note = [_Styled(f"   {line.note}", dim=True)] if line.note else []
        return [*lines, *note]


@dataclass(frozen=True)
class _Fitted:
    """A column with the widths that its rows need: of a value, and of what follows ` ± `."""

    column: Column
    texts: Mapping[int, str]  # by `id` of the line
    value: int
    error: int
    bar: int

    @classmethod
    def of(cls, column: Column, rows: Iterable[Line]) -> _Fitted:
        texts = {id(line): column.text(line.cell) for line in rows}
        parts = [text.partition(" ± ") for text in texts.values()]
        value = max([length(part[0]) for part in parts])
        error = max(length(part[1] + part[2]) for part in parts)
        value = max(value, length(column.title) - (0 if column.bar else error))
        return cls(column, texts, value, error, _BAR + 1 if column.bar else 0)

    def without_bar(self) -> _Fitted:
        return _Fitted(self.column, self.texts, self.value, self.error, 0)

    @property
    def plain_total(self) -> int:
        return 2 + self.value + self.error

    @property
    def total(self) -> int:
        return self.plain_total + self.bar

    @property
    def title(self) -> str:
        if self.column.words:
            return padded(self.column.title, self.value)
        fits = length(self.column.title) <= self.value
        over = self.value if fits else self.value + self.error
        return padded(self.column.title.rjust(over), self.total - 2)

    def cell(self, line: Line) -> str:
        value, middle, error = self.texts[id(line)].partition(" ± ")
        if self.column.words:
            return padded(value, self.value)
        text = " " * (self.value - length(value)) + padded(value + middle + error,
                                                          length(value) + self.error)  # fmt: skip
        if not self.bar or self.column.bar is None:
            return text
        return f"{text} {_bar(self.column.bar(line.cell))}"


def _bar(share: float | None) -> str:
    """Return a bar of eight characters in steps of an eighth of one."""
    eighths = round((share or 0.0) * 8 * _BAR)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)


def _split(words: Sequence[str], width: int) -> tuple[str, list[str]]:
    """Return as many whole words as fit, and the rest."""
    for count in range(len(words), 0, -1):
        text = " ".join(words[:count])
        if length(text) <= width:
            return text, list(words[count:])
    return "", list(words)
