"""The short table that people read: at this sparsity, which method keeps how much, at what cost.

A block is a model and the score that its rows are ranked by; scores of two protocols never share a
block's ranking. In it, one row a method and sparsity: the setting with the most seeds (of several,
that of the most methods), and the best other one where that is better. What most rows share is said
once, in the caption.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunebench.errors import UsageError, nearest
from prunebench.options import options_of
from prunebench.results.captions import (
    Names,
    caption_of,
    legend_of,
    setting_words,
    stale_words,
    usual_settings,
)
from prunebench.results.cell_score import CellScore, within_noise
from prunebench.results.columns import (
    NAMED_RANK,
    Column,
    Ranking,
    TaskMean,
    column_beside_dense,
    column_of_mean,
    column_of_score,
    columns_of_cost,
    columns_of_settings,
    member_columns,
    seeds_of,
    task_means,
)
from prunebench.results.compare import Cell, Table
from prunebench.results.render import SETTING_NAMES, metric_name, value_text
from prunebench.spec import RunSpec

BESIDE_DENSE = "x_dense"
"""The key of the column that tells what is left of dense."""
_OPTIONS = options_of(RunSpec)


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        mark: `*` for the best of its sparsity, `~` for what equals it within noise, or a blank.
        words: The method, and in what its setting differs from what most rows have.
        note: What stands below it: how many settings are not shown.
        main: Whether it is the main setting of its method, not a better one beside it.
    """

    mark: str
    words: tuple[str, ...]
    cell: Cell
    note: str = ""
    main: bool = False


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
        ranking: The score.
        columns: All that there are, in the order in which they are shown; the first is the score.
        hidden_settings: How many settings are not shown.
    """

    model: str
    caption: tuple[str, ...]
    ranking: Ranking
    higher_is_better: bool
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    hidden_settings: int


@dataclass(frozen=True)
class Overview:
    """All blocks, and what their names and marks mean."""

    blocks: tuple[Block, ...]
    legend: tuple[str, ...]


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
    names = Names.of(tables)
    blocks = [
        _block(table, ranking, cells, names, every_setting=every_setting, dense_rows=dense_rows,
               sort=sort)
        for table in tables
        for ranking, cells in _rankings(table)
    ]  # fmt: skip
    if sort:
        require_column(sort, blocks)
    lines = [(block, line) for block in blocks for s in block.sections for line in s.lines]
    marks = {line.mark for _, line in lines}
    scores = [block.columns[0].text(line.cell) for block, line in lines]
    legend = legend_of(tables, marks, scores, names, full=every_setting)
    return Overview(tuple(blocks), tuple(legend))


def require_column(key: str, blocks: Iterable[Block]) -> None:
    """Raise UsageError unless one of the blocks has a column of that name."""
    keys = list(dict.fromkeys(column.key for block in blocks for column in block.columns))
    if key not in keys:
        raise UsageError(f"there is no column {key!r}", fix=nearest(key, keys))


def _rankings(table: Table) -> list[tuple[Ranking, list[Cell]]]:
    """Return by what the rows are ranked, and which: no row is left out.

    Every perplexity ranks the rows that have it (only the leading one, where there is one); the
    others are ranked by a mean over tasks, or by whatever score they have. Of several means, that
    of the most rows is first; of those, that over the most tasks, then documents.
    """
    members = member_columns(table.cells)
    # stable: a group comes before its members
    columns = sorted(table.columns, key=members.__contains__)
    others = [Ranking.of_column(c) for c in columns if c not in _leading(table)]
    left = [cell for cell in table.cells if cell.method != "dense"] or list(table.cells)
    rankings = []
    for column in _leading(table):
        ranking = Ranking.of_column(column)
        if cells := [cell for cell in left if ranking.score_of(cell)]:
            rankings.append((ranking, cells))
    ranked = {id(cell) for _, cells in rankings for cell in cells}
    left = [cell for cell in left if id(cell) not in ranked]

    def weight(mean: TaskMean) -> tuple[int, int, float]:
        return sum(mean.of(cell) is not None for cell in left), len(mean.columns), mean.documents

    # stable: of equals, the first by name
    means = sorted(task_means(table.cells), key=weight, reverse=True)
    for ranking in [*map(Ranking.of_mean, means), *others]:
        if cells := [cell for cell in left if ranking.score_of(cell)]:
            rankings.append((ranking, cells))
            left = [cell for cell in left if not ranking.score_of(cell)]
    return rankings


def _leading(table: Table) -> list[str]:
    """Return the columns that rank all rows that have them."""
    if table.ranked_by is not None:
        return [table.ranked_by]
    return [column for column in table.columns if column.partition(" ")[0].endswith("_ppl")]


def _block(
    table: Table, ranking: Ranking, cells: list[Cell], names: Names, *,
    every_setting: bool, dense_rows: bool, sort: str | None,
) -> Block:  # fmt: skip
    dense = [c for c in table.cells if c.method == "dense" and ranking.score_of(c)]
    pruned = [cell for cell in cells if cell.method != "dense"]
    usual = usual_settings(pruned)
    columns = _columns(table, ranking, pruned or dense, names)
    order = next((column for column in columns if column.key == sort), columns[0])
    sections = []
    if dense_rows or not pruned:
        lines = [Line(" ", ("dense", *setting_words(c, usual, names)), c) for c in dense]
        sections.append(Section("", tuple(lines)))
    hidden = 0
    # rows of other bits, and removed blocks, which are no zeros, have sections of their own
    for target in dict.fromkeys(cell.target for cell in sorted(pruned, key=_by_sparsity)):
        of_one = [cell for cell in pruned if cell.target == target]
        lines = []
        # other weights under one name are no rivals
        for revision in dict.fromkeys(map(revision_of, of_one)):
            alike = [cell for cell in of_one if revision_of(cell) == revision]
            lines += _lines(alike, ranking, usual, names, every_setting=every_setting)
        hidden += len(of_one) - len(lines)
        lines.sort(key=lambda line: (_value_last(order, line.cell), line.words))
        sections.append(Section(target, tuple(lines)))
    caption = caption_of(ranking, dense, pruned, usual, names, dense_rows=dense_rows)
    return Block(
        model=table.model,
        caption=tuple(caption),
        ranking=ranking,
        higher_is_better=ranking.of_any([*pruned, *dense]).higher_is_better,
        columns=tuple(columns),
        sections=tuple(sections),
        hidden_settings=hidden,
    )


def revision_of(cell: Cell) -> Any:
    """Return which weights a cell has, of those that share the name of its model."""
    return cell.settings["model_revision"]


def _by_sparsity(cell: Cell) -> tuple[bool, float, bool, str, int]:
    return cell.order


def _value_last(column: Column, cell: Cell) -> tuple[bool, Any]:
    value = column.value(cell)
    # NaN compares as neither smaller nor larger: it would leave the rows in any order
    missing = value is None or value != value
    return (missing, 0 if missing else value)


def _lines(
    cells: list[Cell], ranking: Ranking, usual: Mapping[str, Any], names: Names, *,
    every_setting: bool,
) -> list[Line]:  # fmt: skip
    """Return the rows of one sparsity and revision: of every method its main one and a better one.

    A method with a recovery counts as a method of its own: `alps + block`.
    """
    lines = []
    marks = _marks(cells, ranking)
    words = {
        id(cell): (
            names.methods[cell.name], *setting_words(cell, usual, names), *stale_words(cell)
        )
        for cell in cells
    }  # fmt: skip
    # how many methods have a setting: compared is what they share, not what one of them has alone
    settings = {id(c): (c.settings["recover"], words[id(c)][1:]) for c in cells}
    shared = Counter(setting for _, setting in {(c.name, settings[id(c)]) for c in cells})
    for method in dict.fromkeys(cell.name for cell in cells):
        of_method = [cell for cell in cells if cell.name == method]

        def loss(cell: Cell) -> float:
            score = ranking.score_of(cell)
            return score.loss if score and score.loss == score.loss else float("inf")

        def distance(cell: Cell) -> tuple[Any, ...]:
            return (-seeds_of(cell), -shared[settings[id(cell)]], len(words[id(cell)]), loss(cell))

        main = min(of_method, key=distance)
        best = min(of_method, key=loss)
        shown = [best, main] if loss(best) < loss(main) else [main]
        rest = [cell for cell in of_method if not any(cell is other for other in shown)]
        # a note on a single setting takes as much place as the setting
        if every_setting or len(rest) == 1:
            shown, rest = of_method, []
        note = _note([ranking.score_of(cell) for cell in rest])
        for cell in shown:
            # a setting that changes nothing gives equal scores, of which only the first is marked
            equal = {marks.get(id(other)) for other in of_method if loss(other) == loss(cell)}
            mark = "*" if "*" in equal and not cell.stale else marks.get(id(cell), " ")
            is_main = cell is main
            lines.append(Line(mark, words[id(cell)], cell, note if is_main else "", is_main))
    return lines


def _marks(cells: Sequence[Cell], ranking: Ranking) -> dict[int, str]:
    """Return the marks of the rows of one sparsity and revision, by `id` of the cell."""
    scores = {id(cell): score for cell in cells if (score := ranking.score_of(cell))}
    if len(ranking.columns) == 1:
        return {place: "*" if score.best else "~" if score.within_noise else " "
                for place, score in scores.items()}  # fmt: skip
    # a mean over tasks is no score of a result: its best was not marked when seeds were folded
    fresh = {id(cell) for cell in cells if not cell.stale}
    sound = [place for place, s in scores.items() if place in fresh and math.isfinite(s.mean)]
    if len(scores) < 2 or not sound:
        return {}
    best = min(sound, key=lambda place: scores[place].loss)
    return {
        place: "*" if place == best else "~" if within_noise(score, scores[best]) else " "
        for place, score in scores.items()
    }


def _note(scores: Sequence[CellScore | None]) -> str:
    """Return `+ 13 settings (73.61 to 125.8): --all`."""
    if not scores:
        return ""
    present = sorted((score for score in scores if score), key=lambda score: score.loss)
    ends = [value_text(score.metric, score.mean) for score in (present[0], present[-1])]
    return f"+ {len(scores)} settings ({' to '.join(ends)}): --all"


def _columns(table: Table, ranking: Ranking, cells: Sequence[Cell], names: Names) -> list[Column]:
    """Return all columns: the ranking score first, then the others, then costs and settings."""
    first = ranking.of_any(cells)
    title = metric_name(first.metric)
    columns = [column_of_score("score", title, ranking.score_of, rank=0)]
    columns.append(
        column_beside_dense(BESIDE_DENSE, ranking.score_of, higher_is_better=first.higher_is_better)
    )
    means = task_means(table.cells)
    for mean in means:
        if mean.columns == ranking.columns:
            continue
        alone = [other.metric for other in means].count(mean.metric) == 1
        key = mean.metric if alone else mean.title
        rank = 5 if mean.metric == "acc" else 12
        columns.append(column_of_mean(key, mean, rank=rank))
    folded = {column for mean in means for column in mean.columns} | member_columns(table.cells)
    for column in table.columns:
        if column == ranking.key or column in _leading(table):
            continue  # it ranks a block of its own
        key = names.of_column(column)
        score_of = Ranking.of_column(column).score_of
        name = f"ppl {key}" if column.startswith("token_ppl ") else key
        rank = NAMED_RANK if column in folded else 10
        columns.append(column_of_score(key, name, score_of, rank=rank))
    used = [c for c in columns if any(c.value(cell) is not None for cell in cells)]
    titles = {n: SETTING_NAMES.get(n, n) for n, o in _OPTIONS.items() if o.about.shown}
    return [*used, *columns_of_cost(cells), *columns_of_settings(cells, titles)]
