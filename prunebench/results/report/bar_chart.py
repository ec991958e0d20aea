"""One line a row: accuracies and what runs cost as bars, perplexities of one sparsity as dots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunebench.results.cell_score import CellScore
from prunebench.results.render import score_text, value_text
from prunebench.results.report.data import Cost, Machine, Row, ScoreFigure, sparsity_ratio
from prunebench.results.report.drawing import Box, Drawing, Label, Line, Mark, fit, text_width
from prunebench.results.report.scale import OFF_SCALE, WIDTH, Scale, color_of, tick_text
from prunebench.spec import slug

_PLAIN = ("", "")  # nothing around the best
_ROW_HEIGHT = 21.0
PublishedKey = tuple[str, str]  # method, sparsity


@dataclass(frozen=True)
class Bar:
    """A bar: its group, label, value with plus-minus, and what stands at its end.

    Attributes:
        hollow: Published values, each with its title.
    """

    group: str
    label: str
    color: str
    value: float | None
    error: float | None
    text: str
    title: str
    link: str
    hollow: tuple[tuple[float, str], ...] = ()


def one_line_a_row(figure: ScoreFigure, methods: Sequence[str]) -> Drawing:
    """Draw a metric with error bars beside the dense model.

    One that is better when higher gets bars from zero; a perplexity, dots on a log scale.
    """
    # a published value is drawn once, beside the first row of its method and sparsity
    used: set[PublishedKey] = set()
    label = _labels([row for row, _ in figure.rows], by_method=figure.by_method)
    bars = [_score_bar(figure, row, score, methods, used, label(row)) for row, score in figure.rows]
    # published values without a row of ours get a line of their own
    for point in figure.published:
        if (point.method, point.sparsity) not in used:
            used.add((point.method, point.sparsity))
            hollow = _published(figure, (point.method, point.sparsity))
            text = f"{value_text(point.metric, point.value)} published"
            color = color_of(point.method, methods)
            bars.append(
                Bar(point.sparsity, point.method, color, None, None, text, text, "", hollow)
            )
    logarithmic = figure.metric.endswith("_ppl")
    kind, better = (
        "Dots" if logarithmic else "Bars",
        "higher" if figure.higher_is_better else "lower",
    )
    drawing = Drawing(
        name=slug(f"{figure.metric}-{figure.protocol}"),
        title=figure.title,
        summary=f"{kind}, one a row; {better} is better. The values are in the table below.",
        width=WIDTH,
        height=0.0,
    )
    note = f"perplexity, log scale; {better} is better" if logarithmic else f"{better} is better"
    _bars(drawing, bars, figure.metric, dense=figure.dense, note=note, logarithmic=logarithmic)
    return drawing


def _labels(rows: Sequence[Row], *, by_method: bool) -> Callable[[Row], str]:
    """Return what to call a row beside these: what tells it apart, in few words."""
    if by_method:
        return lambda row: row.cell.method
    if len({row.cell.method for row in rows}) > 1:
        return lambda row: row.label
    return lambda row: row.variant or row.label


def _published(figure: ScoreFigure, key: PublishedKey) -> tuple[tuple[float, str], ...]:
    return tuple(
        (p.value, f"{p.method} {p.sparsity}: {value_text(p.metric, p.value)}, in {p.source}")
        for p in figure.published
        if (p.method, p.sparsity) == key
    )


def _score_bar(
    figure: ScoreFigure, row: Row, score: CellScore, methods: Sequence[str],
    used: set[PublishedKey], label: str,
) -> Bar:  # fmt: skip
    key = (row.cell.method, row.cell.sparsity)
    hollow = () if key in used else _published(figure, key)
    used.add(key)
    return Bar(
        group=row.cell.sparsity,
        label=label,
        color=color_of(row.cell.method, methods),
        value=score.mean,
        error=score.error,
        text=value_text(score.metric, score.mean),
        title=f"{row.name}: {score_text(score, bold=_PLAIN)}",
        link=row.anchor,
        hollow=hollow,
    )


def cost_bars(machine: Machine, methods: Sequence[str], *, number: int) -> list[Drawing]:
    """Draw prune time and peak memory on one machine."""
    drawings = []
    for quantity, unit, value_of, error_of in _QUANTITIES:
        measured = [cost for cost in machine.costs if value_of(cost) is not None]
        if not measured:
            continue
        title = f"{quantity}, {machine.name}"
        drawing = Drawing(
            name=f"{slug(quantity.lower())}-{number}",
            title=title,
            summary=f"Bars in {unit}, one a row; lower is better.",
            width=WIDTH,
            height=0.0,
        )
        label = _labels([cost.row for cost in measured], by_method=machine.by_method)
        bars = [
            _cost_bar(cost, methods, unit, (value_of(cost), error_of(cost)), label(cost.row))
            for cost in measured
        ]
        _bars(drawing, bars, "cost", dense=None, note=f"{unit}; lower is better")
        drawings.append(drawing)
    return drawings


def _gigabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e9


_Value = Callable[[Cost], float | None]
_QUANTITIES: tuple[tuple[str, str, _Value, _Value], ...] = (
    ("Prune time", "s", lambda c: c.prune_seconds, lambda c: c.prune_seconds_std),
    ("Peak memory of the host", "GB", lambda c: _gigabytes(c.peak_rss_bytes), lambda c: None),
    ("Peak memory of the GPU", "GB", lambda c: _gigabytes(c.peak_gpu_bytes), lambda c: None),
)


def _cost_bar(
    cost: Cost, methods: Sequence[str], unit: str, value: tuple[float | None, float | None],
    label: str,
) -> Bar:  # fmt: skip
    row, mean = cost.row, value[0] or 0.0
    text = f"{mean:,.0f} {unit}" if mean >= 1000 else f"{mean:.3g} {unit}"
    return Bar(
        group=row.cell.sparsity,
        label=label,
        color=color_of(row.cell.method, methods),
        value=value[0],
        error=value[1],
        text=text,
        title=f"{row.name}: {text}",
        link=row.anchor,
    )


def _bars(
    drawing: Drawing, bars: Sequence[Bar], metric: str, *, dense: CellScore | None, note: str,
    logarithmic: bool = False,
) -> None:  # fmt: skip
    left = min(max((text_width(bar.label) for bar in bars), default=0.0) + 28, 200.0)
    right = WIDTH - max((text_width(bar.text) for bar in bars), default=0.0) - 16
    tops = [bar.value + (bar.error or 0) for bar in bars if bar.value is not None]
    tops += [value for bar in bars for value, _ in bar.hollow]
    if dense:
        tops.append(dense.mean + (dense.dense_stderr or 0))
    # a broken model (inf, NaN) must not set the scale
    tops = [top for top in tops if math.isfinite(top)]
    if logarithmic:
        values = [bar.value for bar in bars if bar.value] + ([dense.mean] if dense else [])
        low = min(filter(math.isfinite, [*values, *tops]), default=1.0)
        # one model with a perplexity of 1e6 would push all others together
        high = min(max(tops, default=low), OFF_SCALE * (dense.mean if dense else low))
        x = Scale(low / 1.1, high * 1.1, left, right - 10, logarithmic=True)
    else:
        x = Scale(0.0, max(tops, default=1.0) * 1.02 or 1.0, left, right)  # `or`: all are 0
    y, plot_top = (42.0, 34.0) if dense else (26.0, 22.0)
    places: list[tuple[float, Bar | str]] = []
    last = None
    # by ratio, unstructured before N:M; the sort is stable, so rows keep the table's order
    for bar in sorted(bars, key=lambda bar: (sparsity_ratio(bar.group) or 0.0, ":" in bar.group)):
        if bar.group != last:
            places.append((y + 14, bar.group))
            y += 22
        last = bar.group
        places.append((y, bar))
        y += _ROW_HEIGHT
    plot_bottom = y + 4
    for tick in x.ticks(5):
        drawing.add(Line(((x(tick), plot_top), (x(tick), plot_bottom)), "grid"))
        drawing.add(Label(x(tick), plot_bottom + 15, tick_text(metric, tick), anchor="middle"))
    drawing.add(Label(4, 14, note))
    if dense:
        _dense_line(drawing, dense, x, plot_top, plot_bottom)
    for top, place in places:
        if isinstance(place, str):
            drawing.add(Label(4, top, place, "ink", bold=True))
        else:
            _bar(drawing, place, x, top)
    drawing.height = plot_bottom + 24


def _dense_line(
    drawing: Drawing, dense: CellScore, x: Scale, plot_top: float, plot_bottom: float
) -> None:
    place = x(dense.mean)
    if dense.stderr:
        low, high = x(dense.mean - dense.stderr), x(dense.mean + dense.stderr)
        drawing.add(Box(low, plot_top, high - low, plot_bottom - plot_top, "front", opacity=0.7))
    drawing.add(Line(((place, plot_top), (place, plot_bottom)), "ink", 1.4, (5, 3)))
    text = f"dense {value_text(dense.metric, dense.mean)}"
    drawing.add(Label(min(place, WIDTH - text_width(text) / 2 - 4), 29, text, "ink", "middle"))


def _bar(drawing: Drawing, bar: Bar, x: Scale, top: float) -> None:
    middle = top + _ROW_HEIGHT / 2
    label = fit(bar.label, x.start - 20)
    drawing.add(Label(14, middle + 4, label, "ink"))
    if bar.value is not None:
        height = _ROW_HEIGHT - 6
        if not x.logarithmic:  # a log scale has no zero that a bar could begin at
            drawing.add(
                Box(x.start, top + 3, x(bar.value) - x.start, height, bar.color, 0.85, bar.title)
            )
        if bar.error and bar.value <= x.high:
            low, high = x(bar.value - bar.error), x(bar.value + bar.error)
            drawing.add(Line(((low, middle), (high, middle)), "ink", 1.4))
            for end in (low, high):
                drawing.add(Line(((end, middle - 4), (end, middle + 4)), "ink", 1.4))
        if x.logarithmic:
            at, title = x(bar.value), bar.title
            if not bar.value <= x.high:  # so is NaN
                title = f"{title}, beyond the scale"
                drawing.add(Line(((at, middle), (at + 12, middle)), bar.color, 1.5))
            drawing.add(Mark(at, middle, "circle", bar.color, title=title, link=bar.link))
    for value, title in bar.hollow:
        drawing.add(Mark(x(value), middle, "diamond", "ink", hollow=True, title=title))
    drawing.add(Label(WIDTH - 8, middle + 4, bar.text, "ink", "end"))
