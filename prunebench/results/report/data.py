"""What a report shows, taken from results: no drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunebench.results.bench_schema import Bench
from prunebench.results.captions import Names
from prunebench.results.compare import Cell, Table, compare_frame
from prunebench.results.finding import finding
from prunebench.results.frame import frame_of
from prunebench.results.overview import Line, Overview, overview
from prunebench.results.published import PublishedValue, Twin, find_twins
from prunebench.results.report.heat import HeatMap, heat_map
from prunebench.results.schema import Result, TrainingPoint
from prunebench.results.selection import Selection

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_HEAT_RUNS = 40  # of a page: each is some hundred numbers


@dataclass(frozen=True)
class Row:
    """A cell of the table, as the charts and the provenance name it.

    Attributes:
        setting: In what it differs from what most rows of the table share.
        anchor: The place of its provenance in the page.
        order: Its place in the table.
        short: Whether it is in the short table: the main setting, or a better one.
        results: Its results, newest first, stale ones last.
        counted: The ids of those that its values come from; others were repeated later.
    """

    cell: Cell
    setting: str
    anchor: str
    order: int
    short: bool
    results: tuple[Result, ...]
    counted: frozenset[str]

    @property
    def label(self) -> str:
        """Method and settings."""
        return f"{self.cell.method} ({self.setting})" if self.setting else self.cell.method

    @property
    def name(self) -> str:
        """Method, target and settings."""
        if self.cell.method == "dense":
            return self.label
        setting = f" ({self.setting})" if self.setting else ""
        return f"{self.cell.method} {self.cell.target}{setting}"


@dataclass(frozen=True)
class Cost:
    """What the runs of a row took on one machine: times are medians, memory the largest.

    Attributes:
        machine: Device, processor and threads; times of two machines are never side by side.
        least_seconds: The shortest prune time; the longest is `most_seconds`.
    """

    row: Row
    machine: str
    prune_seconds: float
    least_seconds: float
    most_seconds: float
    peak_rss_bytes: float | None
    peak_gpu_bytes: float | None
    runs: int


@dataclass(frozen=True)
class Curve:
    """The measured points of one training: those with a held-out score."""

    row: Row
    name: str
    points: tuple[TrainingPoint, ...]


@dataclass(frozen=True)
class ModelPart:
    """What the report has of one model.

    Attributes:
        column: The column that is shown first: one that ranks the rows, and about which there is a
            finding, if any is so.
        finding: A sentence about the rows of the short table; empty where none can be compared.
        caption: What the rows of the short table share, in words.
        protocols: Short names by protocol.
        heat: Layers of the newest run of each row whose layers differ.
        published: Published values under the protocols of the table.
        twins: Those of them that a row of ours stands beside.
    """

    table: Table
    rows: tuple[Row, ...]
    column: str
    finding: str
    caption: str
    protocols: Mapping[str, str]
    costs: tuple[Cost, ...]
    curves: tuple[Curve, ...]
    heat: HeatMap | None
    published: tuple[PublishedValue, ...]
    twins: tuple[Twin, ...]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        results: How many results its rows come from.
        skipped: Files that are no results: name and reason.
        methods: All methods, published ones too, in the order of their colors.
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
    benches: Mapping[str, Bench] | None = None,
    published: Sequence[PublishedValue] = (),
    skipped: Sequence[tuple[str, str]] = (),
) -> Report:
    """Prepare a report of the selected results.

    Args:
        results: What is there.
        selection: What is shown; None for all.
        benches: Bytes and speed by the id of a result.
        published: Values of papers to stand beside ours.
        skipped: Files that are no results: name and reason.

    Raises:
        MissingResource: No finished result is selected.
    """
    frame = frame_of(results, selection, benches)
    by_id = {result.id: result for result in results}
    # the model with the most rows is shown first
    tables = sorted(compare_frame(frame), key=lambda table: -len(table.cells))
    parts = tuple(
        _model_part(f"m{i}", table, frame, by_id, published) for i, table in enumerate(tables)
    )
    methods = {row.cell.method for part in parts for row in part.rows}
    methods |= {value.method for part in parts for value in part.published}
    return Report(
        models=parts,
        results=len(set(frame["result_id"])),
        failed=sum(result.status == "failed" for result in results),
        skipped=tuple(skipped),
        methods=tuple(sorted(methods - {"dense"})),
    )


def _model_part(
    anchor: str, table: Table, frame: DataFrame, by_id: Mapping[str, Result],
    published: Sequence[PublishedValue],
) -> ModelPart:  # fmt: skip
    counted = frozenset(frame.loc[frame["newest"], "result_id"])
    short = overview([table])
    settings = _settings(table)
    in_short = {id(line.cell) for line in _lines(short)}
    rows = tuple(
        Row(
            cell=cell,
            setting=settings.get(id(cell), ""),
            anchor=f"{anchor}r{i}",
            order=i,
            short=cell.method == "dense" or id(cell) in in_short,
            results=tuple(_newest_first(by_id[id_] for id_ in cell.result_ids)),
            counted=counted & set(cell.result_ids),
        )
        for i, cell in enumerate(table.cells)
    )
    pruned = [row for row in rows if row.cell.method != "dense"]
    # stable: the rows of the short table first
    in_order = sorted(pruned, key=lambda row: not row.short)
    newest = [(row.name, row.anchor, row.results[0]) for row in in_order]
    values = tuple(
        value
        for value in published
        if value.model == table.model and any(map(value.fits, table.columns))
    )
    told = ((text, block) for block in short.blocks if (text := finding(block)))
    text, block = next(told, ("", short.blocks[0]))
    return ModelPart(
        table=table,
        rows=rows,
        column=block.ranking.columns[0],
        finding=text,
        caption=", ".join(block.caption),
        protocols=Names.of([table]).protocols,
        costs=_costs(frame, pruned),
        curves=tuple(curves_of(rows)),
        heat=heat_map(newest, at_most=MAX_HEAT_RUNS),
        published=values,
        twins=tuple(find_twins([table], values)),
    )


def _lines(table: Overview) -> Iterator[Line]:
    for block in table.blocks:
        for section in block.sections:
            yield from section.lines


def _settings(table: Table) -> dict[int, str]:
    """Return in what each cell differs from what most rows have, by `id` of the cell."""
    settings: dict[int, str] = {}
    for line in _lines(overview([table], every_setting=True, dense_rows=True)):
        # a recovery is part of the setting here: the colors and the filter are of the method
        recovery = line.cell.name.removeprefix(line.cell.method).split()
        # a cell that two scores rank keeps the words of the first
        settings.setdefault(id(line.cell), " ".join([*recovery, *line.words[1:]]))
    return settings


def _newest_first(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda r: (not r.stale, r.created_at, r.id), reverse=True)


# ---------------------------------------------------------------- cost and learning


def _costs(frame: DataFrame, rows: Sequence[Row]) -> tuple[Cost, ...]:
    """Fold the cost of the runs that count by row and machine."""
    row_of = {id_: row for row in rows for id_ in row.counted}
    runs = frame[frame["newest"]].drop_duplicates("result_id")
    runs = runs[runs["result_id"].isin(row_of) & runs["prune_seconds"].notna()]
    # what a row took is all that made it: a recovery may take longer than the pruning
    recovery = runs["recover_seconds"].fillna(0)
    runs = runs.assign(prune_seconds=runs["prune_seconds"] + recovery)
    keys = [
        runs["result_id"].map(lambda id_: row_of[id_].order).rename("order"),
        runs["result_id"].map(lambda id_: _machine_of(row_of[id_], id_)).rename("machine"),
    ]
    folded = runs.groupby(keys).agg(
        prune_seconds=("prune_seconds", "median"),
        least=("prune_seconds", "min"),
        most=("prune_seconds", "max"),
        rss=("peak_rss_bytes", "max"),
        gpu=("peak_gpu_bytes", "max"),
        runs=("result_id", "size"),
    )
    by_order = {row.order: row for row in rows}
    return tuple(
        Cost(
            row=by_order[order], machine=machine,
            prune_seconds=float(run.prune_seconds), least_seconds=float(run.least),
            most_seconds=float(run.most), peak_rss_bytes=_float(run.rss),
            peak_gpu_bytes=_float(run.gpu), runs=int(run.runs),
        )
        for (order, machine), run in zip(folded.index, folded.itertuples(), strict=True)
    )  # fmt: skip


def _float(value: Any) -> float | None:
    import pandas as pd

    return None if pd.isna(value) else float(value)


def _machine_of(row: Row, result_id: str) -> str:
    return machine_name(next(result for result in row.results if result.id == result_id))


def machine_name(result: Result) -> str:
    """Return device, processor and threads."""
    hardware = result.hardware
    threads = "thread" if hardware.cpu_threads == 1 else "threads"
    cpu = f"{hardware.cpu}, {hardware.cpu_threads} {threads}"
    if hardware.device == "cpu":
        return f"cpu: {cpu}"
    return f"{hardware.device}: {hardware.device_name} ({cpu})"


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """Return the trainings of all rows, one a seed, the newest where one was repeated."""
    curves = []
    for row in rows:
        for result in sorted(row.results, key=lambda r: r.spec.seed):
            # `counted` leaves out the older runs of a seed
            if result.training is None or result.id not in row.counted:
                continue
            points = tuple(p for p in result.training.curve if held_out_score(p) is not None)
            if len(points) > 1:
                curves.append(Curve(row, f"{row.name}, seed {result.spec.seed}", points))
    return curves


def held_out_score(point: TrainingPoint) -> float | None:
    """Return the held-out perplexity of a step, if it has a place on a log scale."""
    value = point.held_out_ppl
    return value if value is not None and math.isfinite(value) and value > 0 else None
