"""From results to a table: one row a cell, seeds folded into mean and standard deviation.

A cell is everything of a spec but its seed and its evaluation; of a run that was repeated, the
newest counts. A column is a metric under one protocol; two protocols never share a column. Rows are
ranked where the table has a single perplexity (or a single column), or a single one that all rows
have: the other columns then stand beside it. Within a column, the best of the rows with one
sparsity is marked, and so is every other whose difference from it is inside the noise: that of the
seeds, or, with a single seed, that of the documents.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prunebench.options import options_of
from prunebench.results.bench_schema import Bench
from prunebench.results.cell_score import CellScore
from prunebench.results.schema import Result, Score
from prunebench.results.selection import Selection, nothing_selected
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec

_OPTIONS = options_of(RunSpec)
_SETTINGS = tuple(name for name, option in _OPTIONS.items() if option.about.shown)
_NOT_OF_A_CELL = {name for name, option in _OPTIONS.items() if not option.about.cell}


@dataclass(frozen=True)
class CellBench:
    """Bytes and speed of one row, from the bench of one of its runs.

    Attributes:
        form: How its pruned matrices are stored: `2:4`, `bitmap` or `dense`.
        bytes_ratio: Its bytes over those of the dense model, computed.
        decode: Times the speed of dense, of one sequence; None where it was not measured.
        prefill: The same, of a prompt of 2,048 tokens.
        speed: `measured`, or why not.
        gpu: The chip.
    """

    form: str
    bytes_ratio: float
    decode: float | None
    prefill: float | None
    speed: str
    gpu: str | None

    @classmethod
    def of(cls, bench: Bench) -> CellBench:
        """Take what a table shows."""
        form, size = bench.storage.best
        return cls(
            form=form,
            bytes_ratio=size / bench.storage.dense_bytes,
            decode=bench.decode.median if bench.decode else None,
            prefill=bench.prefill.median if bench.prefill else None,
            speed=bench.speed,
            gpu=bench.environment.get("gpu"),
        )


@dataclass(frozen=True)
class Cell:
    """One row: a spec without its seed, and what its results say together.

    `shown` are the settings as a table shows them: of options, those in which rows of the same
    method (or allocator) differ, without what most of three and more rows have (`Table.usual`).
    `prune_seconds` is the median of its runs: a run beside other work may take ten times as long,
    and a mean would tell of that work.
    """

    model: str
    method: str
    sparsity: str
    settings: dict[str, Any]
    scores: dict[str, CellScore]
    realised_ratio: float
    prune_seconds: float | None
    devices: tuple[str, ...]
    result_ids: tuple[str, ...]
    bench: CellBench | None = None
    shown: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[float, bool, str]:
        """Sort key: dense first, then by ratio, unstructured before N:M."""
        sparsity = Sparsity.parse(self.sparsity)
        return (sparsity.ratio, sparsity.is_pattern, self.sparsity)


@dataclass(frozen=True)
class Table:
    """The cells of one model.

    Attributes:
        columns: Column keys `metric protocol`; the ranking one, then the most used first.
        settings: The settings in which the cells differ; they are shown.
        ranked_by: The column by which the rows of a sparsity are sorted; None where there are
            several protocols and none leads.
        usual: By method (or allocator), the options that most of its rows have; not shown again.
    """

    model: str
    columns: tuple[str, ...]
    settings: tuple[str, ...]
    cells: tuple[Cell, ...]
    ranked_by: str | None
    usual: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def has_bench(self) -> bool:
        """Whether any row has bytes and speed."""
        return any(cell.bench for cell in self.cells)


def compare(
    results: Sequence[Result],
    selection: Selection | None = None,
    benches: Mapping[str, Bench] | None = None,
) -> list[Table]:
    """Fold results into one table a model.

    Args:
        results: What is there.
        selection: What is shown.
        benches: Bytes and speed by the id of a result.

    Raises:
        MissingResource: No finished result is selected.
    """
    selection = selection or Selection()
    chosen = [r for r in results if r.status == "ok" and selection.takes(r)]
    chosen = [r for r in chosen if any(map(selection.takes_score, r.scores))]
    if not chosen:
        raise nothing_selected([r for r in results if r.status == "ok"], selection)
    tables = []
    for model in sorted({r.spec.model for r in chosen}):
        of_model = [r for r in chosen if r.spec.model == model]
        cells = _with_dense([_fold(group, selection, benches or {}) for group in _cells(of_model)])
        tables.append(_table(model, cells))
    return tables


def _cells(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that differ in seed and evaluation only, oldest first."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.created_at, r.id)):
        spec = result.spec.model_dump(mode="json", exclude=_NOT_OF_A_CELL)
        # a method may have a seed of its own: it varies a cell as the run's seed does
        spec["method_options"].pop("seed", None)
        groups.setdefault(json.dumps(spec, sort_keys=True), []).append(result)
    return list(groups.values())


def _fold(results: list[Result], selection: Selection, benches: Mapping[str, Bench]) -> Cell:
    values: dict[str, dict[int, Score]] = {}  # column, seed; later results replace earlier ones
    for result in results:
        for score in filter(selection.takes_score, result.scores):
            values.setdefault(f"{score.metric} {score.protocol}", {})[result.spec.seed] = score
    first = results[0].spec
    seconds = [r.cost.prune_seconds for r in results if r.cost]
    options = {k: v for k, v in first.method_options.items() if k != "seed"}
    settings = {name: getattr(first, name) for name in _SETTINGS} | {"method_options": options}
    if first.calibration is None and results[0].training is None:
        settings["calibration_bos"] = None  # it reads no windows
    # results come oldest first: take the newest that has a bench
    bench = next((benches[r.id] for r in reversed(results) if r.id in benches), None)
    ratios = [r.sparsity.realised_ratio for r in results if r.sparsity]
    return Cell(
        model=first.model,
        method=first.method,
        sparsity=first.sparsity,
        settings=settings,
        scores={column: CellScore.of(list(s.values())) for column, s in sorted(values.items())},
        realised_ratio=statistics.fmean(ratios),
        prune_seconds=statistics.median(seconds) if seconds else None,
        devices=tuple(sorted({r.hardware.device for r in results})),
        result_ids=tuple(sorted(r.id for r in results)),
        bench=CellBench.of(bench) if bench else None,
    )


def _with_dense(cells: list[Cell]) -> list[Cell]:
    """Add a dense row for every dtype and revision that has none, from what its rows measured."""
    # every run scores its dense model too, so a dense row needs no run of its own
    rows: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        # the same model in another dtype or revision has other dense scores
        key = (cell.settings["dtype"], cell.settings["model_revision"])
        row = rows.get(key)
        scores = dict(row.scores) if row else {}
        for column, score in cell.scores.items():
            dense = score.of_dense()
            # a run of the dense model itself counts more than what was measured beside a pruned one
            if dense and (column not in scores or cell.method == "dense"):
                scores[column] = dense
        settings = dict.fromkeys(_SETTINGS) | {"dtype": key[0], "model_revision": key[1]}
        ids = cell.result_ids if cell.method == "dense" else (row.result_ids if row else ())
        rows[key] = Cell(cell.model, "dense", "0", settings, scores, 0.0, None, (), ids)
    return [*rows.values(), *(cell for cell in cells if cell.method != "dense")]


def _table(model: str, cells: list[Cell]) -> Table:
    used: dict[str, int] = {}
    for cell in cells:
        for column in cell.scores:
            used[column] = used.get(column, 0) + 1
    perplexities = [column for column in used if column.partition(" ")[0].endswith("_ppl")]
    leading = perplexities or list(used)  # rows can be ranked by one column only
    if len(leading) > 1:
        leading = [column for column in leading if used[column] == len(cells)]
    ranked_by = leading[0] if len(leading) == 1 else None
    # False sorts before True: the ranking column is first
    columns = tuple(sorted(used, key=lambda column: (column != ranked_by, -used[column], column)))
    for column in columns:
        cells = _mark_best(cells, column)

    def row_order(cell: Cell) -> tuple[Any, ...]:
        score = cell.scores.get(ranked_by) if ranked_by else None
        value = score.loss if score else 0.0
        return (
            cell.method != "dense",  # False, so first
            *cell.order,
            score is None,  # rows without the ranking score are last of their sparsity
            value,
            cell.method,
            json.dumps(cell.settings),
        )

    cells, usual = _with_shown(cells)
    pruned = [cell for cell in cells if cell.method != "dense"]
    return Table(
        model=model,
        columns=columns,
        settings=tuple(name for name in _SETTINGS if _tells_apart(name, pruned)),
        cells=tuple(sorted(cells, key=row_order)),
        ranked_by=ranked_by,
        usual=usual,
    )


def _tells_apart(name: str, cells: list[Cell]) -> bool:
    """Whether cells differ in a setting; that a method has none of it is no difference."""
    values = {json.dumps(cell.shown[name], sort_keys=True) for cell in cells}
    # options were reduced to what differs (`_with_shown`), so a single value tells apart
    return len(values - {"null"}) > (0 if name.endswith("_options") else 1)


_OWNERS = {
    "method_options": "method",
    "allocation_options": "allocation",
    "recover_options": "recover",
}


def _with_shown(cells: list[Cell]) -> tuple[list[Cell], dict[str, dict[str, Any]]]:
    """Reduce the options that are shown to what tells rows of one method apart."""
    usual: dict[str, dict[str, Any]] = {}
    shown = [dict(cell.settings) for cell in cells]
    # options are compared among rows of one method only: another method has other options
    for name, owner in _OWNERS.items():
        groups: dict[str | None, list[int]] = {}
        for place, cell in enumerate(cells):
            groups.setdefault(_owner(cell, owner), []).append(place)
        for who, places in groups.items():
            options: list[dict[str, Any]] = [cells[place].settings[name] or {} for place in places]
            varying, most = _varying(options)
            if most:
                usual[str(who)] = most
            for place, values in zip(places, options, strict=True):
                varied = {
                    k: v for k, v in values.items() if k in varying and (k, v) not in most.items()
                }
                shown[place][name] = varied or None
    return [replace(c, shown=settings) for c, settings in zip(cells, shown, strict=True)], usual


def _owner(cell: Cell, owner: str) -> str | None:
    return cell.method if owner == "method" else cell.settings[owner]


def _varying(rows: Sequence[Mapping[str, Any]]) -> tuple[set[str], dict[str, Any]]:
    """Return the options in which some rows differ, and those values that most of them have."""
    varying, usual = set(), {}
    for key in sorted(set().union(*rows)):
        values = [row[key] for row in rows if key in row]
        # as text: True, 1 and 1.0 are one and the same key of a Counter
        counts = Counter(map(json.dumps, values))
        if len(counts) > 1:
            varying.add(key)
            word, count = counts.most_common(1)[0]
            if len(rows) > 2 and 2 * count > len(rows):
                usual[key] = json.loads(word)
    return varying, usual


def _mark_best(cells: list[Cell], column: str) -> list[Cell]:
    """Mark the best value among the pruned rows of each sparsity, and what equals it in effect."""
    # first pass: the best score of every sparsity
    best: dict[str, CellScore] = {}
    row_counts: dict[str, int] = {}
    for cell in cells:
        score = cell.scores.get(column)
        if score is None or cell.method == "dense":
            continue
        row_counts[cell.sparsity] = row_counts.get(cell.sparsity, 0) + 1
        if cell.sparsity not in best or score.loss < best[cell.sparsity].loss:
            best[cell.sparsity] = score
    # second pass: mark it, and the scores inside its noise; `is`, so that of two equal values
    # only the first is the best
    marked = []
    for cell in cells:
        score = cell.scores.get(column)
        if score is not None and cell.method != "dense" and row_counts[cell.sparsity] > 1:
            top = best[cell.sparsity]
            score = replace(
                score, best=score is top, within_noise=score is not top and score.in_noise_of(top)
            )
            cell = replace(cell, scores={**cell.scores, column: score})
        marked.append(cell)
    return marked
