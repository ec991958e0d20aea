"""Print completions: in columns on a wide terminal, below each other on a narrow one."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from prunebench.cli.console import terminal_width
from prunebench.cli.fitting import printable
from prunebench.results.completions import leaves_at

if TYPE_CHECKING:
    from rich.text import Text

    Cell = tuple[str, str, Text]

MARK = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}"
_WIDE = 100  # columns of a terminal from which on texts stand side by side
_LEAST_COLUMN = 32
_GAP = 3
# all but the line feed: a model may write the sequences that a terminal obeys
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_UNWRAPPED = 1_000_000


def print_completions(document: dict[str, Any]) -> None:
    """Print what `prunebench sample --json` prints, for people."""
    from rich.console import Console
    from rich.text import Text

    width = terminal_width()
    console = Console(highlight=False, width=width or _UNWRAPPED, soft_wrap=width is None)
    count, marked = len(document["prompts"]), False
    for number, row in enumerate(document["prompts"], 1):
        if not row["completions"]:
            continue
        title = f"prompt {number} of {count}  " if count > 1 else "prompt  "
        console.print(Text(title, "dim").append(clean(row["prompt"]).rstrip(), "bold"))
        console.print()
        texts = _texts(row["completions"], document)
        marked = marked or any(printable_here(MARK) in body.plain for _, _, body in texts)
        _print_row(console, texts, width)
    if marked:
        _print(console, f"{MARK} where a text leaves the dense model's")
    for line in _speed_lines(document):
        _print(console, line)


def _print(console: Any, line: str) -> None:
    console.print(printable_here(line), markup=False)


def _print_row(console: Any, texts: list[Cell], width: int | None) -> None:
    """Print the completions of a prompt."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    columns = len(texts)
    room = ((width or 0) - _GAP * (columns - 1)) // columns
    if width is not None and width >= _WIDE and room >= _LEAST_COLUMN:
        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in texts:
            grid.add_column(width=room, overflow="fold")
        grid.add_row(*(Text(name, "bold") for name, _, _ in texts))
        grid.add_row(*(Text(status, "dim") for _, status, _ in texts))
        grid.add_row(*(body for _, _, body in texts))
        console.print(grid)
        console.print()
        return
    for name, status, body in texts:
        console.print(Text(name, "bold").append(f"  {status}", "not bold dim"))
        # a file has no width: every line of the text as it is
        lines = [body] if width is not None else body.split("\n")
        for line in lines:
            if width is not None:
                console.print(Padding(line, (0, 0, 0, 2)))
            else:
                console.print(Text("  ").append_text(line) if line else "")
        console.print()


def _texts(completions: list[dict[str, Any]], document: dict[str, Any]) -> list[Cell]:
    """Return name, status and text of each completion, marked where it leaves the dense one."""
    from rich.text import Text

    base_of = {model["name"]: model["dense"] for model in document["models"]}
    written = {row["model"]: row["text"] for row in completions}
    texts = []
    for row in completions:
        name, text = row["model"], row["text"]
        dense = written.get(base_of[name]) if base_of[name] != name else None
        place = None if dense is None else leaves_at(text, dense)
        status = [_ending(row)]
        if dense is not None:
            status.append(_difference(row, place))
        body = Text(clean(text if place is None else text[:place]).lstrip())
        if place is not None:
            # behind the blanks: at the end of a line the mark would say nothing
            rest = text[place:].lstrip()
            blanks = clean(text[place : len(text) - len(rest)])
            body.append(blanks if body else "")
            body.append(printable_here(MARK), "bold yellow").append(clean(rest), "yellow")
        texts.append((clean(name), ", ".join(status), body))
    return texts


def _difference(row: dict[str, Any], place: int | None) -> str:
    if place is None:
        return "as dense"
    same = row["same_tokens"]
    return (
        "unlike dense"
        if same is None
        else f"the first {same} as dense"
        if same
        else "none as dense"
    )


def _ending(row: dict[str, Any]) -> str:
    count = len(row["token_ids"])
    tokens = f"{count} token" + ("s" if count != 1 else "")
    return tokens + {
        "stop": " and the end of the text", "length": "", "interrupted": ", interrupted",
        "context": ", the context is full",
    }[row["finish_reason"]]  # fmt: skip


def _speed_lines(document: dict[str, Any]) -> list[str]:
    rates = [
        f"{model['name']} {model['tokens_per_second']:.1f}"
        + (f" (packed, {model['backend']})" if model["backend"] != "dense" else "")
        for model in document["models"]
        if model["tokens_per_second"] is not None
    ]
    if not rates:
        return []
    hardware = document["hardware"]
    count = hardware["cpu_threads"]
    threads = f", {count} thread" + ("s" if count != 1 else "")
    threads = threads if hardware["device"] == "cpu" else ""
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in document["models"]))
    return [
        f"tokens/s: {', '.join(rates)}",
        f"  on {hardware['device_name']}{threads}, {dtypes}, one text at a time, one model after "
        "the other; for speed against dense see prunebench bench",
    ]


def clean(text: str) -> str:
    """Return a text without control characters, but for the line feed."""
    return _CONTROL.sub(lambda match: "    " if match[0] == "\t" else "\ufffd", text)


def printable_here(text: str) -> str:
    """Return a text with what the terminal's encoding lacks as ASCII."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text, encoding)
