"""What a report shows, taken from results: no drawing, no HTML."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunebench.errors import UsageError
from prunebench.results.cell_score import CellScore
from prunebench.results.compare import Cell, Table, compare
from prunebench.results.published import PublishedValue
from prunebench.results.render import column_title, setting_text
from prunebench.results.report.heat import HeatMap, heat_map
from prunebench.results.schema import Result
from prunebench.results.selection import Selection
from prunebench.sparsity import Sparsity

MAX_ROWS = 30  # more rows than these cannot be distinguished in one figure


@dataclass(frozen=True)
class Row:
    """A cell of the table, as the figures and the provenance name it.

    Attributes:
        variant: Its settings, as far as they tell rows of its table apart.
        anchor: The place of its provenance in the page.
        results: Its results, newest first.
        counted: The ids of those that its values come from; others were repeated later.
    """

    cell: Cell
    variant: str
    anchor: str
    results: tuple[Result, ...]
    counted: frozenset[str]

    @property
    def label(self) -> str:
        """Method and settings."""
        return f"{self.cell.method} ({self.variant})" if self.variant else self.cell.method

    @property
    def name(self) -> str:
        """Method, sparsity and settings."""
        if self.cell.method == "dense":
            return "dense"
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.cell.method} {self.cell.sparsity}{variant}"

    @property
    def is_pattern(self) -> bool:
        """Whether it keeps N of every M weights."""
        return Sparsity.parse(self.cell.sparsity).is_pattern


@dataclass(frozen=True)
class ScoreFigure:
    """One metric under one protocol.

    Attributes:
        rows: The pruned rows that are drawn.
        by_method: True where these are one a method and sparsity; settings are then not named.
        front: Names of the rows (dense too) that no other beats in both sparsity and value.
    """

    column: str
    metric: str
    protocol: str
    higher_is_better: bool
    dense: CellScore | None
    rows: tuple[tuple[Row, CellScore], ...]
    by_method: bool
    front: frozenset[str]
    published: tuple[PublishedValue, ...]

    @property
    def title(self) -> str:
        """Metric and protocol."""
        return column_title(self.column)

    @property
    def at_one_sparsity(self) -> bool:
        """Whether several rows, and all that is published beside them, have one sparsity."""
        drawn = [row.cell.sparsity for row, _ in self.rows]
        return len(drawn) > 1 and len({*drawn, *(point.sparsity for point in self.published)}) == 1


@dataclass(frozen=True)
class Cost:
    """What the runs of a row took on one machine; means over its runs, None where unknown."""

    row: Row
    prune_seconds: float | None
    prune_seconds_std: float | None
    peak_rss_bytes: float | None
    peak_gpu_bytes: float | None
    runs: int


@dataclass(frozen=True)
class Machine:
    """The costs on one kind of machine: times of two machines are never side by side."""

    name: str
    costs: tuple[Cost, ...]
    by_method: bool


@dataclass(frozen=True)
class ModelPart:
    """Tables and figures of one model.

    Attributes:
        drawn_of: The number of pruned rows, where the figures show only some of them; else None.
        ranked_by: The column by which those were chosen.
    """

    table: Table
    anchor: str
    rows: tuple[Row, ...]
    figures: tuple[ScoreFigure, ...]
    drawn_of: int | None
    ranked_by: str
    heat: HeatMap | None
    machines: tuple[Machine, ...]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        skipped: Files that are no results: name and reason.
        methods: All methods, in the order of their colors.
    """

    models: tuple[ModelPart, ...]
    results: int
    failed: int
    skipped: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]


def build_report(
    results: Sequence[Result],
    selection: Selection | None = None,
    *,
    published: Sequence[PublishedValue] = (),
    skipped: Sequence[tuple[str, str]] = (),
) -> Report:
    """Prepare a report of the selected results.

    Raises:
        MissingResource: No finished result is selected.
    """
    tables = compare(results, selection)
    by_id = {result.id: result for result in results}
    parts = tuple(_model_part(i, table, by_id, published) for i, table in enumerate(tables))
    used = {result.id for part in parts for row in part.rows for result in row.results}
    return Report(
        models=parts,
        results=len(used),
        failed=sum(result.status == "failed" for result in results),
        skipped=tuple(skipped),
        methods=tuple(sorted({row.cell.method for part in parts for row in part.rows} - {"dense"})),
    )


def _model_part(
    number: int, table: Table, by_id: dict[str, Result], published: Sequence[PublishedValue]
) -> ModelPart:
    anchor = f"m{number}"
    rows = tuple(
        _row(f"{anchor}r{i}", table, cell, [by_id[id_] for id_ in cell.result_ids])
        for i, cell in enumerate(table.cells)
    )
    pruned = [row for row in rows if row.cell.method != "dense"]
    by_method = len(pruned) > MAX_ROWS
    columns = sorted(table.columns, key=lambda column: "_ppl " not in column)  # perplexity first
    drawn = _representatives(pruned, columns) if by_method else pruned
    of_model = [point for point in published if point.model == table.model]
    return ModelPart(
        table=table,
        anchor=anchor,
        rows=rows,
        figures=tuple(
            _score_figure(column, rows, drawn, published=of_model, by_method=by_method)
            for column in table.columns
        ),
        drawn_of=len(pruned) if by_method else None,
        ranked_by=columns[0],
        heat=heat_map([(row.name, _newest(row)) for row in pruned]),
        machines=_machines(drawn, by_method=by_method),
    )


def _row(anchor: str, table: Table, cell: Cell, results: list[Result]) -> Row:
    values = [(name, cell.shown[name]) for name in table.settings if cell.shown[name] is not None]
    variant = ", ".join(_setting(name, value) for name, value in values)
    newest_first = sorted(results, key=lambda r: (r.created_at, r.id), reverse=True)
    seen: set[tuple[int, str, str]] = set()
    counted = set()
    # newest first: a result counts where no newer one has the same score of the same seed
    for result in newest_first:
        keys = {(result.spec.seed, s.metric, s.protocol) for s in result.scores} - seen
        if keys:
            counted.add(result.id)
        seen |= keys
    return Row(cell, variant, anchor, tuple(newest_first), frozenset(counted))


def _setting(name: str, value: object) -> str:
    """Words speak for themselves, numbers need their name."""
    text = setting_text(value)
    return f"{name.replace('_', ' ')} {text}" if isinstance(value, int | float) else text


def _newest(row: Row) -> Result:
    return row.results[0]


def _representatives(rows: list[Row], columns: Sequence[str]) -> list[Row]:
    """Of every method and sparsity, take the row that is best in the first column it has."""

    def rank(row: Row) -> tuple[int, float]:
        # rows do not all have the same columns: one without the first ranks behind all with it
        place = min(columns.index(column) for column in row.cell.scores)
        return place, row.cell.scores[columns[place]].loss

    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.cell.method, row.cell.sparsity)
        if key not in best or rank(row) < rank(best[key]):
            best[key] = row
    return list(best.values())


def _score_figure(
    column: str, rows: Sequence[Row], drawn: Sequence[Row], *,
    published: Sequence[PublishedValue], by_method: bool,
) -> ScoreFigure:  # fmt: skip
    metric, _, protocol = column.partition(" ")
    scored = [(row, row.cell.scores[column]) for row in rows if column in row.cell.scores]
    dense = [score for row, score in scored if row.cell.method == "dense"]
    return ScoreFigure(
        column=column,
        metric=metric,
        protocol=protocol,
        higher_is_better=scored[0][1].higher_is_better,
        dense=dense[0] if dense else None,
        rows=tuple((row, row.cell.scores[column]) for row in drawn if column in row.cell.scores),
        by_method=by_method,
        front=pareto_front(
            (row.name, row.cell.realised_ratio, score.loss) for row, score in scored
        ),
        published=tuple(value for value in published if value.fits(column)),
    )


def pareto_front(points: Iterable[tuple[str, float, float]]) -> frozenset[str]:
    """Return the names of points (name, ratio, loss) that no other one beats or equals in both."""
    front = set()
    best = float("inf")
    # from the sparsest down: a point is on the front if all before it have a larger loss; ratios
    # are rounded to 0.1%, as the realised ratios of one target differ a little
    for name, _, loss in sorted(points, key=lambda p: (-round(p[1], 3), p[2], p[0])):
        if loss < best:
            front.add(name)
            best = loss
    return frozenset(front)


def _machines(rows: Sequence[Row], *, by_method: bool) -> tuple[Machine, ...]:
    costs_by_machine: dict[str, list[Cost]] = {}
    for row in rows:
        by_machine: dict[str, list[Result]] = {}
        for result in row.results:
            # repeated runs would count twice
            if result.cost and result.id in row.counted:
                by_machine.setdefault(machine_name(result), []).append(result)
        for name, results in by_machine.items():
            costs_by_machine.setdefault(name, []).append(_cost(row, results))
    return tuple(
        Machine(name, tuple(costs), by_method) for name, costs in sorted(costs_by_machine.items())
    )


def machine_name(result: Result) -> str:
    """Return device, processor and threads."""
    hardware = result.hardware
    cpu = f"{hardware.cpu}, {hardware.cpu_threads} threads"
    if hardware.device == "cpu":
        return f"cpu: {cpu}"
    return f"{hardware.device}: {hardware.device_name} ({cpu})"


def _cost(row: Row, results: list[Result]) -> Cost:
    costs = [result.cost for result in results if result.cost]
    seconds = [cost.prune_seconds for cost in costs]
    gpu = [cost.peak_gpu_bytes for cost in costs if cost.peak_gpu_bytes is not None]
    return Cost(
        row=row,
        prune_seconds=statistics.fmean(seconds),
        prune_seconds_std=statistics.stdev(seconds) if len(seconds) > 1 else None,
        peak_rss_bytes=statistics.fmean(cost.peak_rss_bytes for cost in costs),
        peak_gpu_bytes=statistics.fmean(gpu) if gpu else None,
        runs=len(costs),
    )


def sparsity_ratio(text: str) -> float | None:
    """Return the ratio that a sparsity means; None for a text that is none."""
    try:
        return Sparsity.parse(text).ratio
    except UsageError:
        return None
