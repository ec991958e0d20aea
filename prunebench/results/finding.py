"""What a block of the short table says, in a sentence that is computed from its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from prunebench.results.cell_score import CellScore, within_noise
from prunebench.results.columns import Ranking
from prunebench.results.compare import Cell
from prunebench.results.names import kind_of_text
from prunebench.results.overview import BESIDE_DENSE, Block, Line, Section, revision_of
from prunebench.results.render import MISSING

_SPARSITIES = 2  # of more, those with the most methods
_OTHERS = 2
_WORDS = {"ppl": "perplexity", "acc": "accuracy"}


def finding(block: Block) -> str:
    """Return which method is best at which sparsity; empty where nothing can be compared.

    Methods are compared in their main settings. A setting that saw the kind of text that is scored
    is none, unless all did. Better settings are named behind them. Stale rows are not named, nor
    are models that broke, nor rows of other weights than most have.
    """
    rows = [(section.title, *_methods(block, section)) for section in block.sections]
    rows = [row for row in rows if len(row[1]) > 1]
    # sorted is stable: of as many methods, the lower sparsity
    most = sorted(rows, key=lambda row: -len(row[1]))[:_SPARSITIES]
    metric = block.columns[0].title
    unit = "of" if block.higher_is_better else "times"
    verb, what = " is best", f" {unit} the {_WORDS.get(metric, metric)} of dense"
    parts = []
    for title, main, better in (row for row in rows if row in most):
        best, *rest = main
        text = f"at {title} {best.words[0]}{verb} with {_beside_dense(block, best)}{what}"
        parts.append(text + _others(block, best, rest) + _better(block, better))
        verb = what = ""  # said once
    return f"A{'; '.join(parts)[1:]}." if parts else ""


def _methods(block: Block, section: Section) -> tuple[list[Line], list[Line]]:
    """Return the main row of every method, the best first, and the rows that beat all of those."""
    if not section.title:  # the dense model's
        return [], []
    lines = [line for line in section.lines if _beside_dense(block, line) != MISSING]
    revisions = Counter(revision_of(x.cell) for s in block.sections for x in s.lines if s.title)
    usual, _ = revisions.most_common(1)[0]
    lines = [line for line in lines if revision_of(line.cell) == usual]
    lines = [x for x in lines if not x.cell.stale and math.isfinite(_score(block, x).mean)]
    lines.sort(key=lambda line: _score(block, line).loss)
    neutral = [line for line in lines if not _saw_scored_text(line.cell, block.ranking)] or lines
    main = [line for line in neutral if line.main]
    if not main:
        return [], []
    better: dict[str, Line] = {}
    for line in lines:
        is_better = _score(block, line).loss < _score(block, main[0]).loss
        if is_better and not _equal(block, line, main[0]):
            better.setdefault(line.words[0], line)
    return main, list(better.values())


def _others(block: Block, best: Line, rest: Iterable[Line]) -> str:
    """Return the other methods in brackets."""
    equal = [line for line in rest if _equal(block, line, best)]
    apart = [line for line in rest if not _equal(block, line, best)]
    words = []
    if equal:
        words.append(f"within noise of it: {', '.join(line.words[0] for line in equal)}")
    texts = [f"{line.words[0]} {_beside_dense(block, line)}" for line in apart]
    if texts:
        words.append(", ".join(texts) if len(texts) <= _OTHERS else f"{texts[0]} to {texts[-1]}")
    return f" ({'; '.join(words)})" if words else ""


def _better(block: Block, lines: list[Line]) -> str:
    names = [f"{line.words[0]} reaches {_beside_dense(block, line)}" for line in lines[:_OTHERS]]
    return f", with other settings {' and '.join(names)}" if names else ""


def _beside_dense(block: Block, line: Line) -> str:
    texts = [column.text(line.cell) for column in block.columns if column.key == BESIDE_DENSE]
    return texts[0] if texts else MISSING


def _score(block: Block, line: Line) -> CellScore:
    return block.ranking.of_any([line.cell])


def _equal(block: Block, line: Line, best: Line) -> bool:
    return within_noise(_score(block, line), _score(block, best))


def _saw_scored_text(cell: Cell, ranking: Ranking) -> bool:
    """Return whether a text that a cell was calibrated on or learned from is of a scored kind."""
    scored = {kind_of_text(column.partition(" ")[2]) for column in ranking.columns}
    texts = [cell.settings["calibration"]]
    for name in ("method_options", "recover_options"):
        texts += (cell.settings[name] or {}).values()
    # a training text may be several, split by commas
    names = [name for text in texts if isinstance(text, str) for name in text.split(",")]
    return any(kind_of_text(name) in scored for name in names)
