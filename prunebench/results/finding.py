"""What a block of the short table says, in a sentence that is computed from its rows."""

from __future__ import annotations

import math

from prunebench.results.overview import BESIDE_DENSE, Block, Line, Section
from prunebench.results.render import MISSING

_SPARSITIES = 2  # of more, those with the most methods
_OTHERS = 2
_WORDS = {"ppl": "perplexity", "acc": "accuracy"}


def finding(block: Block) -> str:
    """Return which method is best at which sparsity; empty where nothing can be compared.

    Of every method its best setting counts; what is inside the noise of the best is called so.
    """
    rows = [(section.title, _methods(block, section)) for section in block.sections]
    rows = [(title, methods) for title, methods in rows if len(methods) > 1]
    # sorted is stable: of as many methods, the lower sparsity
    most = sorted(rows, key=lambda row: -len(row[1]))[:_SPARSITIES]
    parts = [_part(title, methods) for title, methods in rows if (title, methods) in most]
    if not parts:
        return ""
    metric = block.columns[0].title
    unit = "of" if block.higher_is_better else "times"
    (title, best, rest), *others = parts
    what = f"{unit} the {_WORDS.get(metric, metric)} of dense"
    first = f"At {title} {best[0]} is best with {best[1]} {what}{rest}"
    return "; ".join([first, *(f"at {t} {b[0]} with {b[1]}{r}" for t, b, r in others)]) + "."


def _methods(block: Block, section: Section) -> list[tuple[Line, str]]:
    """Return the best row of every method and what it is beside dense, the best of all first."""
    score = block.columns[0]
    beside = next((column for column in block.columns if column.key == BESIDE_DENSE), None)
    if beside is None or not section.title:  # without a title, it is the dense model's
        return []

    def loss(line: Line) -> float:
        value = score.value(line.cell)
        return value if isinstance(value, float) and value == value else math.inf

    best: dict[str, tuple[Line, str]] = {}
    for line in sorted(section.lines, key=loss):
        text = beside.text(line.cell)
        if text != MISSING:
            best.setdefault(line.words[0], (line, text))
    return list(best.values())


def _part(title: str, methods: list[tuple[Line, str]]) -> tuple[str, tuple[str, str], str]:
    """Return the sparsity, the best method with its value, and the others in brackets."""
    (best, value), *others = methods
    equal = [line.words[0] for line, _ in others if line.mark == "~"]
    apart = [f"{line.words[0]} {text}" for line, text in others if line.mark != "~"]
    words = [f"within noise of it: {', '.join(equal)}"] if equal else []
    if len(apart) > _OTHERS:
        words.append(f"{apart[0]} to {apart[-1]}")
    elif apart:
        words.append(", ".join(apart))
    return title, (" ".join(best.words), value), f" ({'; '.join(words)})" if words else ""
