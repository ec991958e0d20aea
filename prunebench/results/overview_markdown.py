"""The short table as Markdown, for `TABLE.md`."""

from __future__ import annotations

from collections.abc import Iterable

from prunebench.results.finding import finding
from prunebench.results.overview import Block, Line, Overview
from prunebench.results.render import escape

_SHOWN_RANK = 10  # the columns that a wide terminal has


def overview_markdown(tables: Overview) -> str:
    """Return the short table as Markdown, byte-stable for the same results."""
    lines: list[str] = []
    for block in tables.blocks:
        lines += [f"## {escape(block.model)}", "", f"{escape(' · '.join(block.caption))}.", ""]
        lines += [*_table(block), ""]
        sentence = finding(block)
        lines += [escape(sentence), ""] if sentence else []
    return "\n".join([*lines, f"{escape('; '.join(tables.legend))}.", ""])


def _table(block: Block) -> list[str]:
    columns = [column for column in block.columns if column.rank < _SHOWN_RANK]
    titles = ["sparsity", "method", "setting", *(column.title for column in columns)]
    sides = ["---", "---", "---", *("---" if column.words else "---:" for column in columns)]
    rows = [_row(titles), f"|{'|'.join(sides)}|"]
    for section in block.sections:
        for line in section.lines:
            texts = [column.text(line.cell) for column in columns]
            rows.append(_row([section.title, *_label(line), _marked(line, texts[0]), *texts[1:]]))
    return rows


def _label(line: Line) -> tuple[str, str]:
    method, *words = line.words
    note = line.note.removesuffix(": --all")
    return method, " ".join([*words, *([f"({note})"] if note else [])])


def _marked(line: Line, score: str) -> str:
    return {"*": f"**{score}**", "~": f"~{score}"}.get(line.mark, score)


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, texts))} |"
