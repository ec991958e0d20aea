"""From results to a table: one row a cell, seeds folded into mean and standard deviation.

A cell is everything of a spec but its seed and its evaluation; of a run that was repeated, the
newest counts, a stale one only where all are. A column is a metric under one protocol; two
protocols never share a column. Rows are ranked where the table has a single perplexity (or a single
column), or a single one that all rows have: the other columns then stand beside it. Within a
column, the best of the rows with one sparsity is marked, and so is every other whose difference
from it is inside the noise: that of the seeds, or, with a single seed, that of the documents.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from prunebench.options import options_of
from prunebench.results.bench_schema import Bench
from prunebench.results.cell_score import CellScore
from prunebench.results.fold import fold_dense, fold_runs, fold_scores
from prunebench.results.frame import frame_of
from prunebench.results.schema import Result
from prunebench.results.selection import Selection
from prunebench.results.shown_options import shown_options
from prunebench.results.sizes import DENSE_BITS
from prunebench.sparsity import Sparsity
from prunebench.spec import NO_RECOVERY, RunSpec

if TYPE_CHECKING:
    from pandas import DataFrame

_OPTIONS = options_of(RunSpec)
_SETTINGS = tuple(name for name, option in _OPTIONS.items() if option.about.shown)
ZEROS = "zeros"  # the structure of a method that removes nothing
_SCORE_FIELDS = tuple(row.name for row in dataclasses.fields(CellScore))


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
    def of(cls, run: Mapping[str, Any]) -> CellBench:
        """Take the fields from a row of `fold_runs`."""
        return cls(
            run["storage"], run["bytes_ratio"], run["decode_speedup"], run["prefill_speedup"],
            run["speed"], run["gpu"],
        )  # fmt: skip


@dataclass(frozen=True)
class CellSize:
    """What a checkpoint of a row takes, computed.

    Attributes:
        form: How the prunable weights are stored: `2:4`, `INT4`, ...
        total_bytes: Of the whole checkpoint.
        ratio: Those bytes over the dense model's in 16 bits.
    """

    form: str
    total_bytes: int
    ratio: float

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> CellSize | None:
        """Take the fields from a row of `fold_runs`; None where the results have no counts."""
        if run["form"] is None:
            return None
        return cls(run["form"], round(run["size_bytes"]), run["size_ratio"])


@dataclass(frozen=True)
class Cell:
    """One row: a spec without its seed, and what its results say together.

    `target` is what was asked of the weights, by which rows are compared: the sparsity, for
    quantized weights their bits too, or the share of removed blocks. `bits` are None where nothing
    is quantized. `structure` is what the sparsity counts: `zeros`, or `blocks` that are removed.
    `removed_ratio` is the share of weights that are gone. `stale` says what changed in the method
    since, so that the same run now gives other numbers.
    `shown` are the settings as a table shows them: of options, those that are not the default; of
    options whose default is not known, those in which rows of one method differ (`Table.usual`).
    """

    model: str
    method: str
    sparsity: str
    settings: dict[str, Any]
    scores: dict[str, CellScore]
    realised_ratio: float
    prune_seconds: float | None
    recover_seconds: float | None
    devices: tuple[str, ...]
    cpu_threads: tuple[int, ...]
    result_ids: tuple[str, ...]
    bench: CellBench | None = None
    size: CellSize | None = None
    target: str = ""
    bits: int | None = None
    structure: str = ZEROS
    removed_ratio: float = 0.0
    stale: str = ""
    shown: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, and what trained its kept weights afterwards: `alps + block`."""
        recover = self.settings.get("recover")
        return self.method if recover in (None, NO_RECOVERY) else f"{self.method} + {recover}"

    @property
    def order(self) -> tuple[bool, float, bool, str, int]:
        """Sort key: dense, then by ratio, unstructured before N:M, most bits first, blocks last."""
        sparsity = Sparsity.parse(self.sparsity)
        removes = self.structure != ZEROS
        bits = self.bits or DENSE_BITS
        return (removes, sparsity.ratio, sparsity.is_pattern, self.sparsity, -bits)

    @property
    def target_ratio(self) -> float:
        """The share of zeros that was asked for; 0 where blocks are removed instead."""
        return Sparsity.parse(self.sparsity).ratio if self.structure == ZEROS else 0.0

    @property
    def zeros_were_asked(self) -> bool:
        """Whether zeros are what its method makes, not only what some weights are rounded to."""
        return self.structure == ZEROS and (self.bits is None or self.target_ratio > 0)


@dataclass(frozen=True)
class Table:
    """The cells of one model.

    Attributes:
        columns: Column keys `metric protocol`; the ranking one, then the most used first.
        settings: The settings in which the cells differ; they are shown.
        ranked_by: The column by which the rows of a sparsity are sorted; None where there are
            several protocols and none leads.
        usual: By method (or allocator), of the options in which its rows differ, the values that
            no row shows: the defaults, or where those are not known, what most of its rows have.
    """

    model: str
    columns: tuple[str, ...]
    settings: tuple[str, ...]
    cells: tuple[Cell, ...]
    ranked_by: str | None
    usual: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def has_sizes(self) -> bool:
        """Whether the rows of a sparsity differ in bytes: some are quantized, or lack blocks."""
        return any(is_special_form(cell) for cell in self.cells)

    @property
    def has_bench(self) -> bool:
        """Whether any row has bytes and speed."""
        return any(cell.bench for cell in self.cells)


def is_special_form(cell: Cell) -> bool:
    """Whether the sparsity of a row does not say what its checkpoint takes."""
    return cell.bits is not None or cell.structure != ZEROS


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
    return compare_frame(frame_of(results, selection, benches))


def compare_frame(frame: DataFrame) -> list[Table]:
    """Fold scores, as `load_results` gives them, into one table a model."""
    scores = fold_scores(frame)
    dense = fold_dense(scores)
    runs = {str(run["cell"]): run for run in _records(fold_runs(frame).reset_index())}
    of_cell: dict[str, dict[str, CellScore]] = {cell: {} for cell in runs}
    for row in _records(scores.sort_values(["metric", "protocol"], kind="stable")):
        of_cell[row["cell"]][f"{row['metric']} {row['protocol']}"] = _score(row)
    cells = [_dense_cell(rows, runs) for _, rows in dense.groupby(_DENSE, sort=False)]
    cells += [_cell(run, of_cell[cell]) for cell, run in runs.items() if run["method"] != "dense"]
    models = sorted({cell.model for cell in cells})
    return [_table(model, [cell for cell in cells if cell.model == model]) for model in models]


_DENSE = ["model", "dtype", "model_revision"]  # what has dense scores of its own


def _records(frame: DataFrame) -> list[dict[str, Any]]:
    """Return the rows as plain values; what is missing is None."""
    plain = frame.astype(object)
    return cast("list[dict[str, Any]]", plain.where(frame.notna(), None).to_dict("records"))


def _score(row: Mapping[str, Any]) -> CellScore:
    fields = {name: row[name] for name in _SCORE_FIELDS}
    # NaN is missing for pandas; here it is what a broken model got
    fields["mean"] = math.nan if fields["mean"] is None else fields["mean"]
    return CellScore(**fields)


def _dense_cell(rows: DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> Cell:
    records = _records(rows.sort_values(["metric", "protocol"], kind="stable"))
    first = records[0]
    settings = dict.fromkeys(_SETTINGS) | {name: first[name] for name in _DENSE[1:]}
    own = [
        run for run in runs.values()
        if run["method"] == "dense" and all(run[name] == first[name] for name in _DENSE)
    ]  # fmt: skip
    return Cell(
        model=first["model"],
        method="dense",
        sparsity="0",
        settings=settings,
        scores={f"{row['metric']} {row['protocol']}": _score(row) for row in records},
        realised_ratio=0.0,
        prune_seconds=None,
        recover_seconds=None,
        devices=(),
        cpu_threads=(),
        result_ids=tuple(sorted(id_ for run in own for id_ in run["result_ids"])),
        target="0",
        size=_dense_size(runs.values(), first["model"]),
    )


def _dense_size(runs: Iterable[Mapping[str, Any]], model: str) -> CellSize | None:
    """Return the size of a dense model, which the size of any of its rows stands beside."""
    for run in runs:
        if run["model"] == model and run["form"] is not None:
            return CellSize("dense", round(run["size_bytes"] / run["size_ratio"]), 1.0)
    return None


def _cell(run: Mapping[str, Any], scores: dict[str, CellScore]) -> Cell:
    settings = {name: _setting(name, run[name]) for name in _SETTINGS}
    return Cell(
        model=run["model"],
        method=run["method"],
        sparsity=run["sparsity"],
        settings=settings,
        scores=scores,
        realised_ratio=run["realised_ratio"],
        prune_seconds=run["prune_seconds"],
        recover_seconds=run["recover_seconds"],
        devices=run["devices"],
        cpu_threads=run["threads"],
        result_ids=run["result_ids"],
        bench=CellBench.of(run) if run["storage"] is not None else None,
        size=CellSize.of(run),
        target=run["target"],
        bits=run["bits"],
        structure=run["structure"],
        removed_ratio=run["removed_ratio"],
        stale=run["stale"] or "",
    )


def _setting(name: str, value: Any) -> Any:
    """Return a setting as its option has it; the table holds those of several values as JSON."""
    return json.loads(value) if _OPTIONS[name].kind in (dict, tuple) and value else value


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
    # options were reduced to what is not the default (`_with_shown`), so a single value is told
    return len(values - {"null"}) > (0 if name.endswith("_options") else 1)


_OWNERS = {
    "method_options": "method",
    "allocation_options": "allocation",
    "recover_options": "recover",
}


def _with_shown(cells: list[Cell]) -> tuple[list[Cell], dict[str, dict[str, Any]]]:
    """Reduce the options that are shown to those that someone who repeats a row has to give."""
    usual: dict[str, dict[str, Any]] = {}
    shown = [dict(cell.settings) for cell in cells]
    # options are compared among rows of one method only: another method has other options
    for name, owner in _OWNERS.items():
        groups: dict[str | None, list[int]] = {}
        for place, cell in enumerate(cells):
            groups.setdefault(_owner(cell, owner), []).append(place)
        for who, places in groups.items():
            options = [_without_target(cells[place].settings[name] or {}) for place in places]
            texts = [cells[place].settings["calibration"] for place in places]
            told, rest = shown_options(owner, str(who), options, texts)
            if rest:
                usual[str(who)] = rest
            for place, values in zip(places, told, strict=True):
                shown[place][name] = values or None
    return [replace(c, shown=settings) for c, settings in zip(cells, shown, strict=True)], usual


def _without_target(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without the one that the target of a row says: `2:4 + INT4`."""
    return {name: value for name, value in options.items() if name != "quantize_bits"}


def _owner(cell: Cell, owner: str) -> str | None:
    return cell.method if owner == "method" else cell.settings[owner]
