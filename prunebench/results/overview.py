"""The short table that people read: at this sparsity, which method keeps how much, at what cost.

A block is a model and the score that its rows are ranked by; scores of two protocols never share a
block's ranking. In it, one row a method and sparsity: the setting with the most seeds, and the best
other one where that is better. What most rows share is said once, in the caption.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunebench.errors import UsageError, nearest
from prunebench.options import options_of
from prunebench.results.cell_score import CellScore
from prunebench.results.columns import (
    Column,
    ScoreOf,
    TaskMean,
    column_beside_dense,
    column_of_mean,
    column_of_score,
    columns_of_cost,
    columns_of_settings,
    metric_name,
    plus_minus,
    seeds_of,
    task_means,
)
from prunebench.results.compare import Cell, Table
from prunebench.results.fold import NOISE_STANDARD_ERRORS
from prunebench.results.names import short_method, short_names, short_protocol, short_text
from prunebench.results.render import SETTING_NAMES, setting_text, usual_texts, value_text
from prunebench.spec import RunSpec

BESIDE_DENSE = "x_dense"
"""The key of the column that tells what is left of dense."""
_OPTIONS = options_of(RunSpec)
_WORD_ALONE = ("within_block", "allocation", "dtype")  # their values need no name beside them
_IN_CAPTION = ("calibration", "calibration_samples", "seqlen", *_WORD_ALONE)


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        mark: `*` for the best of its sparsity, `~` for what equals it within noise, or a blank.
        words: The method, and in what its setting differs from what most rows have.
        note: What stands below it: how many settings are not shown.
    """

    mark: str
    words: tuple[str, ...]
    cell: Cell
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The rows of one sparsity, from best to worst."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Block:
    """A model, and the score that its rows are ranked by.

    Attributes:
        caption: What is compared, and what most rows share.
        columns: All that there are, in the order in which they are shown; the first is the score.
        hidden_settings: How many settings are not shown.
    """

    model: str
    caption: tuple[str, ...]
    higher_is_better: bool
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    hidden_settings: int


@dataclass(frozen=True)
class Overview:
    """All blocks, and what their names and marks mean."""

    blocks: tuple[Block, ...]
    legend: tuple[str, ...]


@dataclass(frozen=True)
class _Ranking:
    """A score that rows can be ranked by: one column of a table, or a mean over tasks."""

    key: str
    score_of: ScoreOf
    columns: tuple[str, ...]

    @classmethod
    def of_column(cls, column: str) -> _Ranking:
        return cls(column, lambda cell: cell.scores.get(column), (column,))

    @classmethod
    def of_mean(cls, mean: TaskMean) -> _Ranking:
        return cls(f"{mean.metric} {mean.asked}", mean.of, mean.columns)

    def of_any(self, cells: Iterable[Cell]) -> CellScore:
        """Return the first score that there is; there is one."""
        return next(score for cell in cells if (score := self.score_of(cell)))


def overview(
    tables: Sequence[Table], *, every_setting: bool = False, dense_rows: bool = False,
    sort: str | None = None,
) -> Overview:  # fmt: skip
    """Return the short table of some tables.

    Args:
        tables: From `compare`.
        every_setting: Whether all settings of a method are shown.
        dense_rows: Whether the dense model has a row; else its score is in the caption.
        sort: The column that orders the rows of a sparsity; None for the score.

    Raises:
        UsageError: No block has a column `sort`.
    """
    names = _Names.of(tables)
    blocks = [
        _block(table, ranking, cells, names, every_setting=every_setting, dense_rows=dense_rows,
               sort=sort)
        for table in tables
        for ranking, cells in _rankings(table)
    ]  # fmt: skip
    if sort:
        require_column(sort, blocks)
    return Overview(tuple(blocks), tuple(_legend(tables, blocks, names, full=every_setting)))


def require_column(key: str, blocks: Iterable[Block]) -> None:
    """Raise UsageError unless one of the blocks has a column of that name."""
    keys = list(dict.fromkeys(column.key for block in blocks for column in block.columns))
    if key not in keys:
        raise UsageError(f"there is no column {key!r}", fix=nearest(key, keys))


@dataclass(frozen=True)
class _Names:
    """Short names that are unique in what is shown."""

    protocols: Mapping[str, str]
    methods: Mapping[str, str]
    texts: Mapping[str, str]

    @classmethod
    def of(cls, tables: Sequence[Table]) -> _Names:
        cells = [cell for table in tables for cell in table.cells]
        texts = [cell.settings["calibration"] for cell in cells if cell.settings["calibration"]]
        protocols = [column.partition(" ")[2] for table in tables for column in table.columns]
        return cls(
            short_names(protocols, short_protocol),
            short_names((cell.method for cell in cells), short_method),
            short_names(texts, short_text),
        )

    def of_column(self, column: str) -> str:
        """Return `wiki` for a perplexity, `acc/piqa` for another metric."""
        metric, _, protocol = column.partition(" ")
        short = self.protocols[protocol]
        return short if metric == "token_ppl" else f"{metric_name(metric)}/{short}"


def _rankings(table: Table) -> list[tuple[_Ranking, list[Cell]]]:
    """Return by what the rows are ranked; every pruned row is in one of the rankings, or more."""
    means = [_Ranking.of_mean(mean) for mean in task_means(table.cells)]
    columns = [_Ranking.of_column(column) for column in table.columns]
    perplexities = [r for r in columns if r.key.partition(" ")[0].endswith("_ppl")]
    if table.ranked_by is not None:
        perplexities = [_Ranking.of_column(table.ranked_by)]
    others = [*means, *columns]
    taken: list[tuple[_Ranking, list[Cell]]] = []
    left = [cell for cell in table.cells if cell.method != "dense"] or list(table.cells)
    for ranking in [*perplexities, *others]:
        # a perplexity has a block of its own; what no perplexity ranks is ranked by what it has
        pool = table.cells if ranking in perplexities else left
        cells = [cell for cell in pool if cell.method != "dense" and ranking.score_of(cell)]
        if not cells and left and all(cell.method == "dense" for cell in left):
            cells = [cell for cell in left if ranking.score_of(cell)]
        if cells:
            ranked = set(map(id, cells))
            left = [cell for cell in left if id(cell) not in ranked]
            taken.append((ranking, cells))
    return taken


def _block(
    table: Table, ranking: _Ranking, cells: list[Cell], names: _Names, *,
    every_setting: bool, dense_rows: bool, sort: str | None,
) -> Block:  # fmt: skip
    dense = [c for c in table.cells if c.method == "dense" and ranking.score_of(c)]
    pruned = [cell for cell in cells if cell.method != "dense"]
    usual = _usual(pruned)
    columns = _columns(table, ranking, pruned or dense, names)
    order = next((column for column in columns if column.key == sort), columns[0])
    sections = []
    if dense_rows or not pruned:
        lines = [Line(" ", ("dense", *_words(c, usual, names)), c) for c in dense]
        sections.append(Section("", tuple(lines)))
    hidden = 0
    for sparsity in dict.fromkeys(cell.sparsity for cell in sorted(pruned, key=_by_sparsity)):
        of_one = [cell for cell in pruned if cell.sparsity == sparsity]
        lines = _lines(of_one, ranking, usual, names, every_setting=every_setting)
        hidden += len(of_one) - len(lines)
        lines.sort(key=lambda line: (_value_last(order, line.cell), line.words))
        sections.append(Section(sparsity, tuple(lines)))
    caption = _caption(ranking, dense, pruned, usual, names, dense_rows=dense_rows)
    return Block(
        model=table.model,
        caption=tuple(caption),
        higher_is_better=ranking.of_any([*pruned, *dense]).higher_is_better,
        columns=tuple(columns),
        sections=tuple(sections),
        hidden_settings=hidden,
    )


def _by_sparsity(cell: Cell) -> tuple[float, bool, str]:
    return cell.order


def _value_last(column: Column, cell: Cell) -> tuple[bool, Any]:
    value = column.value(cell)
    # NaN compares as neither smaller nor larger: it would leave the rows in any order
    missing = value is None or value != value
    return (missing, 0 if missing else value)


def _lines(
    cells: list[Cell], ranking: _Ranking, usual: Mapping[str, Any], names: _Names, *,
    every_setting: bool,
) -> list[Line]:  # fmt: skip
    """Return the rows of one sparsity: of every method its main setting and a better one."""
    lines = []
    marks = _marks(cells, ranking)
    for method in dict.fromkeys(cell.method for cell in cells):
        of_method = [cell for cell in cells if cell.method == method]
        words = {id(cell): (names.methods[method], *_words(cell, usual, names))
                 for cell in of_method}  # fmt: skip

        def loss(cell: Cell) -> float:
            score = ranking.score_of(cell)
            return score.loss if score and score.loss == score.loss else float("inf")

        def distance(cell: Cell, words: dict[int, Any] = words) -> tuple[Any, ...]:
            return (-seeds_of(cell), len(words[id(cell)]), loss(cell))

        main = min(of_method, key=distance)
        best = min(of_method, key=loss)
        shown = of_method if every_setting else [main]
        if not every_setting and loss(best) < loss(main):
            shown = [best, main]
        rest = [cell for cell in of_method if not any(cell is other for other in shown)]
        note = _note([ranking.score_of(cell) for cell in rest])
        lines += [
            Line(marks.get(id(cell), " "), words[id(cell)], cell, note if cell is main else "")
            for cell in shown
        ]
    return lines


def _marks(cells: Sequence[Cell], ranking: _Ranking) -> dict[int, str]:
    """Return the marks of the rows of one sparsity, by `id` of the cell."""
    scores = {id(cell): score for cell in cells if (score := ranking.score_of(cell))}
    if len(ranking.columns) == 1:
        return {place: "*" if score.best else "~" if score.within_noise else " "
                for place, score in scores.items()}  # fmt: skip
    # a mean over tasks is no score of a result: its best was not marked when seeds were folded
    best = min(scores, key=lambda place: scores[place].loss)
    return {
        place: "*" if place == best else "~" if _in_noise(score, scores[best]) else " "
        for place, score in scores.items()
        if len(scores) > 1
    }


def _in_noise(score: CellScore, best: CellScore) -> bool:
    if score.error is None and best.error is None:
        return False
    both = math.hypot(score.error or 0.0, best.error or 0.0)
    return abs(score.mean - best.mean) <= NOISE_STANDARD_ERRORS * both


def _note(scores: Sequence[CellScore | None]) -> str:
    """Return `+ 13 settings (73.61 to 125.8): --all`."""
    if not scores:
        return ""
    present = sorted((score for score in scores if score), key=lambda score: score.loss)
    ends = list(dict.fromkeys(value_text(s.metric, s.mean) for s in (present[0], present[-1])))
    noun = "setting" if len(scores) == 1 else "settings"
    return f"+ {len(scores)} {noun} ({' to '.join(ends)}): --all"


def _usual(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the settings that most rows have, without options of methods and allocators."""
    usual = {}
    for name, option in _OPTIONS.items():
        if not option.about.shown or name.endswith("_options"):
            continue
        values = [json.dumps(c.settings[name]) for c in cells if c.settings[name] is not None]
        counts = Counter(values)
        if counts:
            usual[name] = json.loads(max(counts, key=functools.partial(_usualness, counts, name)))
    return usual


def _usualness(counts: Mapping[str, int], name: str, word: str) -> tuple[int, bool, str]:
    """Return how usual a value is; of two that are as frequent, the default of its option."""
    value = json.loads(word)
    plain = short_text(value) if isinstance(value, str) else value
    return counts[word], plain == _OPTIONS[name].value, word


def _words(cell: Cell, usual: Mapping[str, Any], names: _Names) -> tuple[str, ...]:
    """Return in what the setting of a cell differs from the usual one: `owl`, `seqlen=2048`."""
    words = []
    for name, value in cell.shown.items():
        if isinstance(value, dict):
            words += [f"{key}={setting_text(v, missing='None')}" for key, v in value.items()]
        elif value is not None and value != usual.get(name, value):
            words.append(_word(name, value, names))
    return tuple(words)


def _word(name: str, value: Any, names: _Names) -> str:
    text = names.texts.get(value, value) if name == "calibration" else setting_text(value)
    if name in _WORD_ALONE:
        return str(text)
    return f"{SETTING_NAMES.get(name, name).replace(' ', '_')}={text}"


def _columns(table: Table, ranking: _Ranking, cells: Sequence[Cell], names: _Names) -> list[Column]:
    """Return all columns: the ranking score first, then the others, then costs and settings."""
    first = ranking.of_any(cells)
    title = metric_name(first.metric)
    columns = [column_of_score("score", title, ranking.score_of, rank=0)]
    columns.append(
        column_beside_dense(BESIDE_DENSE, ranking.score_of, higher_is_better=first.higher_is_better)
    )
    means = [mean for mean in task_means(table.cells) if mean.columns != ranking.columns]
    for mean in means:
        key = mean.metric if mean.metric not in {c.key for c in columns} else mean.title
        rank = 5 if mean.metric == "acc" else 12
        columns.append(column_of_mean(key, mean, rank=rank))
    folded = {column for mean in task_means(table.cells) for column in mean.columns}
    for column in table.columns:
        if column == ranking.key:
            continue
        key = names.of_column(column)
        score_of = _Ranking.of_column(column).score_of
        name = f"ppl {key}" if column.startswith("token_ppl ") else key
        columns.append(column_of_score(key, name, score_of, rank=53 if column in folded else 10))
    used = [c for c in columns if any(c.value(cell) is not None for cell in cells)]
    titles = {n: SETTING_NAMES.get(n, n) for n, o in _OPTIONS.items() if o.about.shown}
    return [*used, *columns_of_cost(cells), *columns_of_settings(cells, titles)]


def _caption(
    ranking: _Ranking, dense: Sequence[Cell], cells: Sequence[Cell], usual: Mapping[str, Any],
    names: _Names, *, dense_rows: bool,
) -> list[str]:  # fmt: skip
    score = ranking.of_any([*cells, *dense])
    if len(ranking.columns) > 1:
        what = f"mean {metric_name(score.metric)} of {len(ranking.columns)} tasks"
    else:
        what = f"{metric_name(score.metric)} on {names.protocols[ranking.key.partition(' ')[2]]}"
    parts = [what + ("" if dense_rows else _dense_text(ranking, dense))]
    parts += _usual_texts(usual, names)
    devices = sorted({device for cell in cells for device in cell.devices})
    threads = sorted({count for cell in cells for count in cell.cpu_threads})
    if devices == ["cpu"] and threads:
        parts.append(f"pruned on cpu, {_range(threads)} thread{'' if threads == [1] else 's'}")
    elif len(devices) == 1:
        parts.append(f"pruned on {devices[0]}")
    return parts


def _dense_text(ranking: _Ranking, dense: Sequence[Cell]) -> str:
    scores = [(cell, score) for cell in dense if (score := ranking.score_of(cell))]
    if len(scores) == 1:
        return f", dense {plus_minus(scores[0][1])}"
    differing = [
        name for name in ("dtype", "model_revision")
        if len({cell.settings[name] for cell, _ in scores}) > 1
    ]  # fmt: skip
    texts = [
        f"{plus_minus(score)} ({', '.join(setting_text(cell.settings[n]) for n in differing)})"
        for cell, score in scores
    ]
    return f", dense {', '.join(texts)}" if texts else ""


def _usual_texts(usual: Mapping[str, Any], names: _Names) -> list[str]:
    """Return what most rows share; of what few people change, only what is not the default."""
    parts = []
    if usual.get("calibration"):
        size = f"{usual.get('calibration_samples')}x{usual.get('seqlen')}"
        parts.append(f"calibrated on {names.texts[usual['calibration']]} {size}")
    parts += [f"{name} {usual[name]}" for name in ("within_block", "allocation") if name in usual]
    parts += [str(usual[name]) for name in ("dtype",) if name in usual]
    parts += [
        _word(name, value, names)
        for name, value in usual.items()
        if name not in (*_IN_CAPTION, "model_revision") and value != _OPTIONS[name].value
    ]
    return parts


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} or {numbers[-1]}"


def _legend(
    tables: Sequence[Table], blocks: Sequence[Block], names: _Names, *, full: bool
) -> list[str]:
    """Return what the marks and names mean."""
    lines = [line for block in blocks for section in block.sections for line in section.lines]
    texts = [block.columns[0].text(line.cell) for block in blocks for section in block.sections
             for line in section.lines]  # fmt: skip
    marks = {line.mark for line in lines}
    parts = ["* best"] if "*" in marks else []
    parts += ["~ within noise of it (2 standard errors)"] if "~" in marks else []
    if any("±" in text for text in texts):
        of_documents = any("%" in text for text in texts)
        parts.append("± std over seeds" + (", of one: over documents" if of_documents else ""))
    if any(table.has_bench for table in tables):
        parts.append("bytes, decode, prefill: beside dense")
    means = {mean.title: mean for table in tables for mean in task_means(table.cells)}
    parts += [f"{title} = mean of {mean.words}" for title, mean in means.items()]
    folded = {column.partition(" ")[2] for mean in means.values() for column in mean.columns}
    shortened = [*names.protocols.items(), *names.methods.items()]
    parts += [f"{short} = {long}" for long, short in shortened
              if short != long and (full or long not in folded)]  # fmt: skip
    parts += [f"calibration {s} = {long}" for long, s in names.texts.items() if s != long]
    if full:
        parts += [
            f"{who} where it says nothing else: {words}" for who, words in usual_texts(tables)
        ]
    return parts
