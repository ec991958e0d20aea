"""The page: what the template needs, in words and shapes, and the template filled."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from prunebench.results.compare import Cell, Table
from prunebench.results.published import PublishedValue
from prunebench.results.render import (
    column_title,
    header,
    legend,
    row,
    score_text,
    setting_text,
    text_columns,
    value_text,
)
from prunebench.results.report.bar_chart import cost_bars, one_line_a_row
from prunebench.results.report.curve_chart import curves_of, learning_curves
from prunebench.results.report.data import (
    ModelPart,
    Report,
    Row,
    ScoreFigure,
    machine_name,
)
from prunebench.results.report.drawing import DARK, LIGHT, Drawing, heat_color, to_svg
from prunebench.results.report.heat import HeatMap, HeatRun
from prunebench.results.report.heat_chart import HeatScale, heat_chart, loss_scale, ratio_scale
from prunebench.results.report.scatter_chart import against_sparsity
from prunebench.results.schema import Result
from prunebench.spec import slug

NOT_MEASURED = "not measured"
MAX_CURVES = 8  # more lines than these cannot be distinguished in one figure
_HEAT_STEPS = 64
_MAX_HEAT_FILES = 12


@dataclass(frozen=True)
class Figure:
    """A figure of the page with the data behind it; the first column of the data has links."""

    drawing: Drawing
    svg: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # link, texts


def render_page(report: Report) -> str:
    """Return the page as HTML, the same bytes for the same report."""
    import jinja2

    # StrictUndefined: a name that the template misspells is an error, not an empty text
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    style, script = _file("page.css"), _file("page.js")
    themes = {"light": LIGHT, "dark": DARK}
    return environment.from_string(_file("page.html")).render(
        report=report,
        legend=legend([part.table for part in report.models]),
        models=[_model(part, report.methods) for part in report.models],
        style=style,
        script=script,
        # the page's Content-Security-Policy lets only the script with this hash run
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        themes=themes,
        palette=[heat_color(i / (_HEAT_STEPS - 1)) for i in range(_HEAT_STEPS)],
        protocols=sorted({column for part in report.models for column in part.table.columns}),
        not_measured=NOT_MEASURED,
    )


def drawings_of(report: Report) -> tuple[list[tuple[str, Drawing]], int]:
    """Return the figures of a report with names for files, and how many heat maps are left out."""
    named: dict[str, Drawing] = {}
    left_out = 0
    for part in report.models:
        figures = [*_score_figures(part, report.methods), *_curve_figures(part)]
        drawings = [figure.drawing for figure in figures]
        if part.heat:
            runs = part.heat.runs[:_MAX_HEAT_FILES]
            left_out += len(part.heat.runs) - len(runs)
            drawings += [d for run in runs for d in _heat_drawings(part.heat, run, prefix=True)]
        drawings += [figure.drawing for figure in _cost_figures(part, report.methods)]
        for drawing in drawings:
            # slugs drop punctuation, so two protocols may give the same file name
            name = unique = f"{slug(part.table.model)}-{drawing.name}"
            number = 2
            while unique in named:
                unique, number = f"{name}-{number}", number + 1
            named[unique] = drawing
    return list(named.items()), left_out


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _model(part: ModelPart, methods: Sequence[str]) -> dict[str, Any]:
    return {
        "part": part,
        "head": header(part.table),
        "words": text_columns(part.table),
        "rows": [(row, _table_row(part.table, row.cell)) for row in part.rows],
        "figures": [*_score_figures(part, methods), *_curve_figures(part)],
        "heat": _heat(part.heat) if part.heat else None,
        "costs": _cost_figures(part, methods),
        "provenance": [(row, [_provenance(r) for r in row.results]) for row in part.rows],
    }


# ---------------------------------------------------------------- the table


def _table_row(table: Table, cell: Cell) -> list[dict[str, Any]]:
    """Return the texts of `compare`, each with what it is sorted by."""
    scores = [cell.scores.get(column) for column in table.columns]
    settings = [cell.shown[name] for name in table.settings]
    seeds = max((score.seeds for score in cell.scores.values()), default=None)
    pruned = cell.method != "dense"
    # in the order of `render.row`; a report has no benches, so their columns are never there
    keys: list[Any] = [
        cell.method,
        cell.order[0],
        *settings,
        *(score.mean if score else None for score in scores),
        cell.realised_ratio if pruned else None,
        cell.prune_seconds,
        seeds if pruned else None,
    ]
    noise = [False] * (2 + len(settings)) + [bool(s and s.within_noise) for s in scores]
    noise += [False] * 3
    # NUL marks bold: no text holds one, and escaping does not touch it
    texts = row(table, cell, bold=("\0", "\0"))
    return [
        {
            "text": text.replace("\0", "").removeprefix("~" if noisy else ""),
            "best": "\0" in text,
            "noise": noisy,
            "parts": text.split("\0"),
            "key": _sort_key(key),
        }
        for text, key, noisy in zip(texts, keys, noise, strict=True)
    ]


def _sort_key(value: Any) -> str:
    """Return a value as the page's script reads it: empty is last."""
    if value is None or value != value:  # NaN is not equal to itself
        return ""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return setting_text(value)


# ---------------------------------------------------------------- figures


def _score_figures(part: ModelPart, methods: Sequence[str]) -> list[Figure]:
    drawn = [figure for figure in part.figures if figure.rows]
    drawn.sort(key=lambda figure: figure.higher_is_better)  # perplexities first
    return [_score_figure(figure, part, methods) for figure in drawn]


def _score_figure(figure: ScoreFigure, part: ModelPart, methods: Sequence[str]) -> Figure:
    if figure.higher_is_better or figure.at_one_sparsity:
        drawing = one_line_a_row(figure, methods)
        caption = "Error bars: deviation over seeds, of a single seed the standard error."
    else:
        drawing = against_sparsity(figure, methods)
        caption = (
            "Points that would hide each other stand side by side. "
            "Error bars: deviation over seeds, of a single seed the standard error."
        )
    if part.drawn_of:
        caption += (
            f" Of {part.drawn_of} rows, for each method and sparsity the one that is best in "
            f"{column_title(part.ranked_by)}."
        )
    if figure.published:
        caption += " Hollow marks are published values, not ours."
    rows = [_score_data(figure, row) for row, _ in figure.rows]
    dense = [row for row in part.rows if row.cell.method == "dense" and figure.dense]
    rows = [*(_score_data(figure, row) for row in dense[:1]), *rows]
    rows += [_published_data(point) for point in figure.published]
    head = ("row", "zeros", "value", "seeds", "on the front" if not figure.higher_is_better else "")
    return Figure(
        drawing=drawing,
        svg=to_svg(drawing, themed=True),
        caption=caption,
        head=head if head[-1] else head[:-1],
        rows=tuple(
            (link, texts if not figure.higher_is_better else texts[:-1]) for link, texts in rows
        ),
    )


def _curve_figures(part: ModelPart) -> list[Figure]:
    all_curves = curves_of(part.rows)
    curves = all_curves[:MAX_CURVES]
    if not curves:
        return []
    drawing = learning_curves(curves)
    rows = tuple(
        (curve.row.anchor, (curve.name, f"{p.step}", f"{p.tokens:,}", f"{p.held_out_ppl:.4g}"))
        for curve in curves
        for p in curve.points
    )
    caption = "Windows of the training text that were not learned from; step 0 is the prior."
    if len(all_curves) > len(curves):
        caption += (
            f" The first {len(curves)} of {len(all_curves)} trainings, in the order of the table."
        )
    head = ("training", "step", "tokens", "held-out perplexity")
    return [Figure(drawing, to_svg(drawing, themed=True), caption, head, rows)]


def _score_data(figure: ScoreFigure, row: Row) -> tuple[str, tuple[str, ...]]:
    score = row.cell.scores[figure.column]
    on_front = "yes" if row.name in figure.front else "no"
    ratio = f"{row.cell.realised_ratio:.1%}"
    value = score_text(score, bold=("", ""))
    return row.anchor, (row.name, ratio, value, str(score.seeds), on_front)


def _published_data(point: PublishedValue) -> tuple[str, tuple[str, ...]]:
    name = f"{point.method} {point.sparsity}, published in {point.source}"
    return "", (name, "-", value_text(point.metric, point.value), "-", "-")


def _cost_figures(part: ModelPart, methods: Sequence[str]) -> list[Figure]:
    figures = []
    for number, machine in enumerate(part.machines):
        head = ("row", "prune time in s", "peak memory of host in GB", "peak memory of GPU in GB")
        rows = tuple(
            (
                cost.row.anchor,
                (
                    cost.row.name,
                    _plus_minus(cost.prune_seconds, cost.prune_seconds_std),
                    _gigabytes(cost.peak_rss_bytes),
                    _gigabytes(cost.peak_gpu_bytes),
                    str(cost.runs),
                    NOT_MEASURED,
                ),
            )
            for cost in machine.costs
        )
        figures += [
            Figure(drawing, to_svg(drawing, themed=True), "", (*head, "runs", "speed"), rows)
            for drawing in cost_bars(machine, methods, number=number)
        ]
    return figures


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


# ---------------------------------------------------------------- layer by layer


def _heat(heat: HeatMap) -> dict[str, Any]:
    """Return the first run with a loss as drawn, and all runs as data for the page's script."""
    chosen = next((i for i, run in enumerate(heat.runs) if run.losses), 0)
    data: list[dict[str, Any]] = [
        {
            "ratio": _quantity(run.ratios, ratio_scale(run)),
            "loss": _quantity(run.losses, loss_scale(run)),
        }
        for run in heat.runs
    ]
    drawings = _heat_drawings(heat, heat.runs[chosen], prefix=False)
    return {
        "heat": heat,
        "chosen": chosen,
        "charts": [
            (kind, drawing, to_svg(drawing, themed=True), _grid(heat, data[chosen][kind]["texts"]))
            # a run without a loss has one drawing only: zip stops there
            for kind, drawing in zip(("ratio", "loss"), drawings, strict=False)
        ],
        "data": data,
    }


def _heat_drawings(heat: HeatMap, run: HeatRun, *, prefix: bool) -> list[Drawing]:
    name = f"{slug(run.name)}-" if prefix else ""
    of = f" of {run.name}" if prefix else ""
    drawings = [
        heat_chart(
            heat, run.ratios, ratio_scale(run),
            name=f"{name}layer-sparsity", title=f"Realised sparsity, layer by layer{of}",
        )
    ]  # fmt: skip
    scale = loss_scale(run)
    if scale:
        title = f"Reconstruction loss, layer by layer{of}"
        drawings.append(heat_chart(heat, run.losses, scale, name=f"{name}layer-loss", title=title))
    return drawings


def _grid(heat: HeatMap, texts: Sequence[str]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the rows of the table behind a heat map: module, and key and text of each block."""
    width = len(heat.blocks)
    keys = [range(i * width, (i + 1) * width) for i in range(len(heat.modules))]
    return [
        (module, [(key, texts[key]) for key in row_keys])
        for module, row_keys in zip(heat.modules, keys, strict=True)
    ]


def _quantity(values: Sequence[float | None], scale: HeatScale | None) -> dict[str, Any] | None:
    if scale is None:
        return None
    return {
        "colors": [
            None if value is None else round(scale.share(value) * (_HEAT_STEPS - 1))
            for value in values
        ],
        "texts": ["-" if value is None else scale.text(value) for value in values],
        "low": scale.text(scale.low),
        "middle": scale.text(scale.middle()),
        "high": scale.text(scale.high),
    }


# ---------------------------------------------------------------- provenance


def _provenance(result: Result) -> dict[str, Any]:
    """Return all that a reader needs to repeat a run, and to know that it is the same one."""
    software = result.software
    libraries = [f"torch {software.torch}", f"transformers {software.transformers}"]
    if software.lm_eval:
        libraries.append(f"lm-eval {software.lm_eval}")
    facts = {
        "scores": "; ".join(
            f"{column_title(f'{score.metric} {score.protocol}')}: "
            f"{value_text(score.metric, score.value)}"
            for score in result.scores
        ),
        "date": result.created_at,
        "spec hash": result.spec_id,
        "hardware": machine_name(result),
        "software": f"prunebench {software.prunebench}, python {software.python}, "
        + ", ".join(libraries),
    }
    if result.model:
        facts["model revision"] = f"{result.model.commit} ({result.model.source})"
        facts["hash of the dense weights"] = result.model.dense_sha256
        facts["hash of the scored weights"] = result.model.evaluated_sha256
    if result.method:
        method = result.method
        facts["method"] = f"{method.implementation}, {method.version}"
    if result.calibration:
        calibration = result.calibration
        facts["calibration"] = (
            f"{calibration.text} from {calibration.origin}, {calibration.samples} x "
            f"{calibration.seqlen} tokens, seed {calibration.seed}"
        )
        facts["hash of the calibration tokens"] = calibration.tokens_sha256
    return {
        "id": result.id,
        "seed": result.spec.seed,
        "command": result.command,
        "facts": facts,
    }
