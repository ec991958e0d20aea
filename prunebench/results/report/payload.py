"""The rows of a report's charts and tables as plain values: what the page's script works on.

A row of a chart is a row of the table with its score under one protocol. The page holds both once
and joins them; `score_rows` does the same for figures in files.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from prunebench.results.cell_score import CellScore
from prunebench.results.columns import duration, plus_minus, times
from prunebench.results.published import PublishedValue
from prunebench.results.render import against_dense, value_text
from prunebench.results.report.data import Cost, Curve, ModelPart, Row, held_out_score
from prunebench.results.report.heat import HeatMap, HeatRun, loss_range, ratio_range
from prunebench.sparsity import Sparsity

Fields = dict[str, Any]
OFF_SCALE = 100.0  # a perplexity of more than so many times dense is drawn at the edge
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Scale:
    """What a column's values are drawn on: a log scale or not, and its upper end."""

    log: bool
    end: float

    def shown(self, value: float) -> float:
        """Return a value as it is drawn: at the edge where it has no place."""
        return min(value, self.end) if value == value else self.end  # NaN is not equal to itself


def scale_of(part: ModelPart, column: str) -> Scale:
    """Return the scale of a column: perplexities on a log scale, without what is far off."""
    scores = [row.cell.scores[column] for row in part.rows if column in row.cell.scores]
    values = [score.mean for score in scores if math.isfinite(score.mean)]
    values += [value.value for value in part.published if value.fits(column)]
    log = column.partition(" ")[0].endswith("_ppl") and all(value > 0 for value in values)
    end = max(values, default=1.0)
    if log:
        dense = [score.dense for score in scores if score.dense]
        # one model with a perplexity of 1e6 would push all others together
        end = min(end, OFF_SCALE * (max(dense) if dense else min(values, default=1.0)))
    return Scale(log, end)


def score_rows(part: ModelPart, column: str) -> list[Fields]:
    """Return the rows that have a score in a column, with that score, best first in a sparsity."""
    scale = scale_of(part, column)
    scored = [row for row in part.rows if column in row.cell.scores]
    scored.sort(key=lambda row: (row.cell.method != "dense", *row.cell.order, _loss(row, column)))
    return [
        row_fields(row) | score_fields(row, row.cell.scores[column], scale) | {"order": place}
        for place, row in enumerate(scored)
    ]


def _loss(row: Row, column: str) -> float:
    loss = row.cell.scores[column].loss
    return math.inf if math.isnan(loss) else loss


def row_fields(row: Row) -> Fields:
    """Return what a row is, whatever it is scored by; what is false or none is left out."""
    cell, bench = row.cell, row.cell.bench
    dense = cell.method == "dense"
    return _present(
        id=row.anchor,
        method=clean(cell.method),
        sparsity=cell.target if not dense else "",
        ratio=cell.order[0],
        pattern=Sparsity.parse(cell.sparsity).is_pattern,
        zeros=round(cell.realised_ratio, 5) if cell.zeros_were_asked else None,
        size=round(cell.size.ratio, 4) if cell.size and not dense else None,
        stored=cell.size.form if cell.size and not dense else None,
        setting=clean(row.setting),
        name=clean(row.name),
        series=clean(row.label),
        line=clean(row.label if dense else f"{cell.target} {row.label}"),
        short=row.short,
        order=row.order,
        form=bench.form if bench else None,
        bytes=round(bench.bytes_ratio, 4) if bench else None,
        decode=round(bench.decode, 3) if bench and bench.decode else None,
        prefill=round(bench.prefill, 3) if bench and bench.prefill else None,
        speed=bench.speed if bench else None,
        seconds=cell.prune_seconds,
        recovery=cell.recover_seconds,
        seeds=None if dense else max((s.seeds for s in cell.scores.values()), default=None),
    )  # fmt: skip


def score_fields(row: Row, score: CellScore, scale: Scale) -> Fields:
    """Return a score as text and as it is drawn; what is false or none is left out."""
    shown = scale.shown(score.mean)
    beyond = not score.mean <= scale.end  # so is NaN
    text = plus_minus(score)
    dense = row.cell.method == "dense"
    error = None if beyond else score.error
    low = score.mean - error if error is not None else None
    if low is not None and scale.log and low <= 0:
        low = shown  # an error as large as its value: a log scale has no zero
    return _present(
        text=f"dense {text}" if dense else text,
        relative=relative_text(score),
        value=_plain(score.mean),
        shown=_short(shown),
        low=_short(low),
        high=_short(scale.shown(score.mean + error)) if error is not None else None,
        beyond=beyond,
        best=score.best,
        tie=score.within_noise,
    )


def relative_text(score: CellScore) -> str:
    """Return a perplexity as times dense, an accuracy as the share that is left."""
    if score.metric.endswith("_ppl") and score.dense:
        return f"{times(score.mean / score.dense)} x" if score.mean != score.dense else ""
    return against_dense(score)


def _plain(value: float) -> float | str | None:
    """Return a number that JSON can hold; an infinite one as text, NaN as none."""
    if math.isnan(value):
        return None
    return _short(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _short(value: float | None) -> float | None:
    """Return a number without digits that nobody can see."""
    return None if value is None else float(f"{value:.6g}")


def _present(**fields: Any) -> Fields:
    # by identity: 0 equals False
    empty = (None, False)
    return {
        name: value
        for name, value in fields.items()
        if not any(value is nothing for nothing in empty) and value != ""
    }


def clean(text: str) -> str:
    """Return a text without control characters: XML, and so SVG, has none."""
    return _CONTROL.sub("\ufffd", text)


def published_rows(part: ModelPart, column: str, *, first: int = 0) -> list[Fields]:
    """Return the published values of a column as rows of a chart; `first` is their first place."""
    scale = scale_of(part, column)
    values = [value for value in part.published if value.fits(column)]
    return [_published(value, scale, first + i) for i, value in enumerate(values)]


def _published(value: PublishedValue, scale: Scale, order: int) -> Fields:
    sparsity = Sparsity.parse(value.sparsity)
    text = value_text(value.metric, value.value)
    shown = scale.shown(value.value)
    return _present(
        id=f"p{order}",
        method=value.method,
        sparsity=value.sparsity if value.method != "dense" else "",
        pattern=sparsity.is_pattern,
        zeros=sparsity.ratio,
        name=f"{value.method} {value.sparsity}, published",
        line=f"{value.sparsity} {value.method}, published",
        text=text,
        source=value.source,
        shown=_short(shown),
        low=_short(value.value - value.std) if value.std else None,
        high=_short(value.value + value.std) if value.std else None,
        beyond=value.value > scale.end,
        hollow=True,
        order=order,
    )


# ---------------------------------------------------------------- cost, learning, layers

COSTS = {
    "seconds": ("Prune time", "seconds, log scale", True),
    "host": ("Peak memory of the host", "GB", False),
    "gpu": ("Peak memory of the GPU", "GB", False),
}
"""What runs cost: the quantity, the unit on the axis, and whether that is a log scale."""


def cost_fields(cost: Cost) -> Fields:
    """Return what a row cost on a machine."""
    return _present(
        id=cost.row.anchor,
        machine=cost.machine,
        seconds=_short(cost.prune_seconds),
        least=_short(cost.least_seconds),
        most=_short(cost.most_seconds),
        host=_gigabytes(cost.peak_rss_bytes),
        gpu=_gigabytes(cost.peak_gpu_bytes),
        runs=cost.runs,
    )


def _gigabytes(value: float | None) -> float | None:
    return None if value is None else round(value / 1e9, 3)


def cost_rows(part: ModelPart, quantity: str, machine: str) -> list[Fields]:
    """Return the rows of one chart of cost."""
    rows = []
    for cost in part.costs:
        fields = cost_fields(cost)
        value = fields.get(quantity)
        if cost.machine != machine or value is None:
            continue
        several = quantity == "seconds" and cost.runs > 1
        rows.append(
            row_fields(cost.row)
            | _present(
                shown=value,
                text=cost_text(quantity, value),
                low=fields["least"] if several else None,
                high=fields["most"] if several else None,
            )
        )
    return rows


def cost_text(quantity: str, value: float) -> str:
    """Return a cost as it stands beside its bar; the page's script writes the same."""
    return duration(value) if quantity == "seconds" else f"{value:.2f} GB"


def curve_rows(curve: Curve) -> list[Fields]:
    """Return the points of a training."""
    return [
        {
            "id": curve.row.anchor, "method": curve.row.cell.method, "training": clean(curve.name),
            "step": point.step, "tokens": point.tokens, "value": _short(held_out_score(point)),
        }
        for point in curve.points
    ]  # fmt: skip


def heat_rows(heat: HeatMap, run: HeatRun, quantity: str) -> list[Fields]:
    """Return the cells of a heat map: `ratio` or `loss` of one run; none where it has no loss."""
    ends = ratio_range(run) if quantity == "ratio" else loss_range(run)
    values = run.ratios if quantity == "ratio" else run.losses
    if ends is None:
        return []
    grid = itertools.product(heat.modules, heat.blocks)
    return [
        {
            "module": clean(module), "block": block, "value": in_range(value, ends),
            "low": ends[0], "high": ends[1],
        }
        for (module, block), value in zip(grid, values, strict=True)
    ]  # fmt: skip


def in_range(value: float | None, ends: tuple[float, float]) -> float | None:
    """Return a value inside the ends of its color scale; what is not finite is beyond all."""
    if value is None:
        return None
    return _short(min(max(value, ends[0]), ends[1]) if value == value else ends[1])
