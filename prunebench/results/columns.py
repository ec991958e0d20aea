"""The columns of the short table: what each shows of a cell, and by what it is sorted."""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prunebench.results.cell_score import CellScore
from prunebench.results.compare import Cell, CellBench, is_special_form
from prunebench.results.names import short_names
from prunebench.results.render import (
    FROM_ZERO,
    MISSING,
    setting_text,
    value_text,
)

SHOWN_RANK = 50  # columns of this rank and more are shown only where they are asked for
NAMED_RANK = 60  # and those of this rank and more are not even named among what is left out

ScoreOf = Callable[[Cell], CellScore | None]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: What `--columns` and `--sort` call it.
        title: What stands above it.
        text: What it shows of a cell; `-` where there is nothing.
        value: By what rows are sorted, the smallest first; None is last.
        rank: Which columns stay on a narrow terminal: the lowest first.
        bar: The length of a bar behind the text, 0 to 1; None for a column without bars.
        words: Whether it holds words, which are aligned on the left.
    """

    key: str
    title: str
    text: Callable[[Cell], str]
    value: Callable[[Cell], float | str | None]
    rank: int = 50
    bar: Callable[[Cell], float | None] | None = None
    words: bool = False


def column_of_score(key: str, title: str, score_of: ScoreOf, *, rank: int) -> Column:
    """Return the column of a score: `69.90 ± 1.29`."""

    def value(cell: Cell) -> float | None:
        score = score_of(cell)
        return None if score is None else score.loss

    return Column(key, title, lambda cell: plus_minus(score_of(cell)), value, rank)


def column_beside_dense(key: str, score_of: ScoreOf, *, higher_is_better: bool) -> Column:
    """Return what is left of dense: `3.54` times its perplexity, or `97.3%` of its accuracy."""

    def value(cell: Cell) -> float | None:
        score = score_of(cell)
        if score is None or not score.dense or score.metric in FROM_ZERO:
            return None
        ratio = score.mean / score.dense
        return -ratio if higher_is_better else ratio

    def text(cell: Cell) -> str:
        ratio = value(cell)
        if ratio is None:
            return MISSING
        return f"{-ratio:.1%}" if higher_is_better else times(ratio)

    def bar(cell: Cell) -> float | None:
        # dense / perplexity is exp(-(loss - dense loss)): 1 is as good as dense
        ratio = value(cell)
        if ratio is None or math.isnan(ratio):
            return None
        return min(1.0, -ratio if higher_is_better else 1.0 / ratio if ratio else 1.0)

    return Column(key, "of dense" if higher_is_better else "x dense", text, value, 2, bar)


@dataclass(frozen=True)
class TaskMean:
    """The mean of a metric over tasks that were asked in the same way.

    Attributes:
        metric: `acc` or another.
        asked: Shots and limit, as in the protocols: `0-shot/first-100`.
        columns: The columns of a table that it is the mean of.
        title: Metric and number of tasks; where two means would share that, how they were asked.
    """

    metric: str
    asked: str
    columns: tuple[str, ...]
    title: str

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [column.split("/")[1] for column in self.columns]

    @property
    def documents(self) -> float:
        """How many of every task were asked at most; infinite where all were."""
        limits = [part for part in self.asked.split("/") if part.startswith("first-")]
        return float(limits[0].removeprefix("first-")) if limits else math.inf

    @property
    def words(self) -> str:
        """The tasks, and how they were asked."""
        return f"{', '.join(self.tasks)} ({self.asked.replace('/', ', ')})"

    def of(self, cell: Cell) -> CellScore | None:
        """Return the mean; None where one of the tasks was not run."""
        scores = [cell.scores[column] for column in self.columns if column in cell.scores]
        if len(scores) < len(self.columns):
            return None
        errors = [score.stderr for score in scores if score.stderr is not None]
        dense = [score.dense for score in scores if score.dense is not None]
        every = len(scores)
        mean = statistics.fmean(score.mean for score in scores)
        return CellScore(
            metric=self.metric,
            values=(mean,),
            mean=mean,
            std=None,
            seeds=min(score.seeds for score in scores),
            dense=statistics.fmean(dense) if len(dense) == every else None,
            # the tasks have other questions: their errors are independent
            stderr=math.hypot(*errors) / every if len(errors) == every else None,
            higher_is_better=True,
        )


@dataclass(frozen=True)
class Ranking:
    """A score that rows can be ranked by: one column of a table, or a mean over tasks."""

    key: str
    score_of: ScoreOf
    columns: tuple[str, ...]

    @classmethod
    def of_column(cls, column: str) -> Ranking:
        """Rank by a column of a table, `metric protocol`."""
        return cls(column, lambda cell: cell.scores.get(column), (column,))

    @classmethod
    def of_mean(cls, mean: TaskMean) -> Ranking:
        """Rank by a mean over tasks."""
        return cls(f"{mean.metric} {mean.asked}", mean.of, mean.columns)

    def of_any(self, cells: Iterable[Cell]) -> CellScore:
        """Return the first score that there is; there is one."""
        return next(score for cell in cells if (score := self.score_of(cell)))


def column_of_mean(key: str, mean: TaskMean, *, rank: int) -> Column:
    """Return the column of a mean over tasks, without its error: it stands beside the ranking."""

    def text(cell: Cell) -> str:
        score = mean.of(cell)
        return MISSING if score is None else value_text(score.metric, score.mean)

    def value(cell: Cell) -> float | None:
        score = mean.of(cell)
        return None if score is None else score.loss

    return Column(key, mean.title, text, value, rank)


def task_means(cells: Sequence[Cell]) -> list[TaskMean]:
    """Return a mean for each metric and way to ask that has several tasks.

    Where rows were asked different tasks, it is over those that most rows share: a mean over other
    tasks is another quantity. Of a group its own score counts, and not those of its members too.
    """
    groups: dict[tuple[str, str], list[frozenset[str]]] = {}
    for cell in cells:
        of_cell: dict[tuple[str, str], set[str]] = {}
        members = member_columns([cell])
        for column, score in cell.scores.items():
            if column in members:
                continue
            metric, _, protocol = column.partition(" ")
            parts = protocol.split("/")
            if parts[0] == "lm-eval" and score.higher_is_better and len(parts) > 3:
                asked = "/".join([parts[2], *parts[4:]])  # 3 is the task's version
                of_cell.setdefault((metric, asked), set()).add(column)
        for key, columns in of_cell.items():
            groups.setdefault(key, []).append(frozenset(columns))
    tasks = {}
    for group, sets in sorted(groups.items()):
        counts = Counter(sets)
        most = max(counts, key=lambda columns: (counts[columns], len(columns), sorted(columns)))
        if len(most) > 1:
            tasks[group] = tuple(sorted(most))
    long = {
        f"{metric}({len(c)})/{asked}": (metric, asked, c) for (metric, asked), c in tasks.items()
    }
    titles = short_names(long, lambda name: name.partition("/")[0])
    return [TaskMean(*parts, titles[name]) for name, parts in long.items()]


def member_columns(cells: Iterable[Cell]) -> set[str]:
    """Return the columns of tasks that stand beside the score of their group."""
    members = set()
    for cell in cells:
        # a group may lack a metric of its members, which then speak for themselves
        tasks = {c: score for c, score in cell.scores.items() if "lm-eval/" in c}
        there = {(score.metric, column.split("/")[1]) for column, score in tasks.items()}
        members |= {c for c, score in tasks.items() if (score.metric, score.member_of) in there}
    return members


def columns_of_cost(cells: Iterable[Cell]) -> list[Column]:
    """Return zeros, removed weights, costs, seeds and device: what is known of any row."""
    cells = list(cells)
    speeds = {"decode": "decode", "prefill": "prefill"}
    off_target = any(abs(c.realised_ratio - c.target_ratio) > 0.005 for c in cells)
    special = any(map(is_special_form, cells))
    several = len({cell.devices for cell in cells}) > 1
    columns = [
        Column("zeros", "zeros", lambda c: f"{c.realised_ratio:.1%}",
               lambda c: -c.realised_ratio, 8 if off_target else 51),
        Column("removed", "removed", lambda c: f"{c.removed_ratio:.1%}" if c.removed_ratio
               else MISSING, lambda c: -c.removed_ratio, 5),
        Column("size", "size", lambda c: f"{c.size.ratio:.3f}" if c.size else MISSING,
               lambda c: c.size.ratio if c.size else None, 3 if special else 51),
        _column_of_words("form", lambda c: c.size.form if c.size else None, 52),
        Column("prune", "prune", lambda c: duration(c.prune_seconds),
               lambda c: c.prune_seconds, 3),
        Column("recover_seconds", "recover", lambda c: duration(c.recover_seconds),
               lambda c: c.recover_seconds, 3),
        Column("bytes", "bytes", lambda c: f"{c.bench.bytes_ratio:.2f}" if c.bench else MISSING,
               lambda c: c.bench.bytes_ratio if c.bench else None, 6),
        *(_column_of_speed(name, title) for name, title in speeds.items()),
        _column_of_words("stored", lambda c: c.bench.form if c.bench else None, 30),
        _column_of_words("gpu", lambda c: c.bench.gpu if c.bench else None, 31),
        _column_of_words("speed", lambda c: c.bench.speed if c.bench else None, 32),
        Column("seeds", "seeds", lambda c: str(seeds_of(c)), lambda c: -seeds_of(c), 4),
        _column_of_words("device", lambda c: ", ".join(c.devices), 9 if several else 61),
        _column_of_words("results", lambda c: " ".join(c.result_ids), 60),
    ]  # fmt: skip
    return [column for column in columns if any(column.text(cell) != MISSING for cell in cells)]


def columns_of_settings(cells: Sequence[Cell], names: Mapping[str, str]) -> list[Column]:
    """Return a column for each setting that any cell has; `names` are their titles."""
    return [
        _column_of_words(name, functools.partial(_setting, name), 70, title=title)
        for name, title in names.items()
        if any(cell.settings[name] not in (None, {}) for cell in cells)
    ]


def _setting(name: str, cell: Cell) -> str:
    return setting_text(cell.settings[name])


def _column_of_words(
    key: str, word: Callable[[Cell], str | None], rank: int, *, title: str = ""
) -> Column:
    def text(cell: Cell) -> str:
        return word(cell) or MISSING

    return Column(key, title or key, text, text, rank, words=True)


def _column_of_speed(name: str, title: str) -> Column:
    def speed(cell: Cell) -> float | None:
        bench: CellBench | None = cell.bench
        return getattr(bench, name) if bench else None

    def text(cell: Cell) -> str:
        ratio = speed(cell)
        return MISSING if ratio is None else f"{ratio:.2f}x"

    def value(cell: Cell) -> float | None:
        ratio = speed(cell)
        return None if ratio is None else -ratio

    return Column(name, title, text, value, 7)


def seeds_of(cell: Cell) -> int:
    """Return the largest number of seeds of a score of a cell."""
    return max((score.seeds for score in cell.scores.values()), default=0)


def plus_minus(score: CellScore | None) -> str:
    """Return `69.90 ± 1.29`: the deviation with the decimals of the mean."""
    if score is None:
        return MISSING
    text = value_text(score.metric, score.mean)
    if score.error is None:
        return text
    error = value_text(score.metric, score.error).removesuffix("%")
    digits = text.removesuffix("%")
    if "e" not in digits + error:
        decimals = len(digits.partition(".")[2])
        scale = 100 if text.endswith("%") else 1
        error = f"{scale * score.error:,.{decimals}f}"
    return f"{text} ± {error}"


def times(ratio: float) -> str:
    """Return a ratio to dense with three digits; millions as `2.52e6`."""
    if ratio >= 100:
        return f"{ratio:,.0f}" if ratio < 999_500 else value_text("", ratio)
    return f"{ratio:.1f}" if ratio >= 9.995 else f"{ratio:.2f}"


def duration(seconds: float | None) -> str:
    """Return `45 s`, `3.5 m`, `24 m`, `1.2 h`."""
    if seconds is None:
        return MISSING
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 0.9995 * size:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 9.95 else f"{amount:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 0.95 else f"{seconds:.0f} s"
