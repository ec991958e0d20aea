"""A metric that is better when lower, such as perplexity, against the share of zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunebench.results.cell_score import CellScore
from prunebench.results.render import score_text, value_text
from prunebench.results.report.data import Row, ScoreFigure, sparsity_ratio
from prunebench.results.report.drawing import SHAPES, Drawing, Label, Line, Mark, fit, text_width
from prunebench.results.report.scale import OFF_SCALE, WIDTH, Scale, color_of, tick_text
from prunebench.spec import slug

_PLAIN = ("", "")  # nothing around the best
_LEFT, _RIGHT, _TOP = 58.0, 24.0, 26.0
_PLOT_HEIGHT = 290.0
_APART = 10.0  # pixels between points, so that none hides another


@dataclass(frozen=True)
class _Place:
    """A point before it has a place in pixels."""

    row: Row | None
    score: CellScore | None
    series: str
    method: str
    ratio: float
    value: float
    pattern: bool
    title: str
    hollow: bool = False


def against_sparsity(figure: ScoreFigure, methods: Sequence[str]) -> Drawing:
    """Draw a metric that is better when lower against the share of zeros, with its front."""
    places = _places(figure)
    looks = _looks(places, methods)
    logarithmic = figure.metric.endswith("_ppl") and not any(p.value <= 0 for p in places)
    x, y = _scales(places, logarithmic=logarithmic, dense=figure.dense)
    title = f"{figure.title} against sparsity"
    drawing = Drawing(
        name=slug(f"{figure.metric}-{figure.protocol}"),
        title=title,
        summary="Points, one a row; lower is better. The values are in the table below.",
        width=WIDTH,
        height=0.0,
    )
    _axes(drawing, x, y, figure.metric, note=", log scale" if logarithmic else "")
    centres = _dodged(places, x, y)
    on_front = [
        (centre, y(p.value))
        for p, centre in zip(places, centres, strict=True)
        if not p.hollow and (p.row.name if p.row else "dense") in figure.front
    ]
    if len(on_front) > 1:
        # before the points, so that it lies under them
        drawing.add(Line(tuple(sorted(on_front)), "front", 7))
    if figure.dense:
        level = y(figure.dense.mean)
        drawing.add(Line(((x.start, level), (x.end, level)), "muted", 1, (2, 3)))
    _join(drawing, places, centres, y, looks)
    for place, centre in zip(places, centres, strict=True):
        _point(drawing, place, centre, y, looks[place.series])
    _legend(drawing, _legend_entries(places, looks, front=len(on_front) > 1))
    return drawing


def _places(figure: ScoreFigure) -> list[_Place]:
    places = []
    dense_row = [] if figure.dense is None else [(None, figure.dense)]
    for row, score in [*dense_row, *figure.rows]:
        label = (row.cell.method if figure.by_method else row.label) if row else "dense"
        name = row.name if row else "dense"
        places.append(
            _Place(
                row=row, score=score, series=label, method=row.cell.method if row else "dense",
                ratio=row.cell.realised_ratio if row else 0.0, value=score.mean,
                pattern=bool(row and row.is_pattern),
                title=f"{name}: {score_text(score, bold=_PLAIN)}",
            )
        )  # fmt: skip
    for point in figure.published:
        ratio = sparsity_ratio(point.sparsity)
        if ratio is not None:
            text = f"{point.method} {point.sparsity}: {value_text(point.metric, point.value)}"
            places.append(
                _Place(
                    row=None, score=None, series=f"{point.method}, published", method=point.method,
                    ratio=ratio, value=point.value, pattern=":" in point.sparsity,
                    title=f"{text}, published in {point.source}", hollow=True,
                )
            )  # fmt: skip
    return places


def _looks(places: Sequence[_Place], methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give every series a color (its method's) and a shape; a published one looks like ours."""
    shapes = itertools.cycle(shape for shape in SHAPES if shape != "diamond")  # that is dense
    looks: dict[str, tuple[str, str]] = {}
    of_method: dict[str, str] = {}
    for place in places:
        if place.method == "dense":
            looks[place.series] = ("ink", "diamond")
        elif place.series not in looks:
            shape = of_method.get(place.method) if place.hollow else None
            shape = shape or next(shapes)
            of_method.setdefault(place.method, shape)
            looks[place.series] = (color_of(place.method, methods), shape)
    return looks


def _scales(
    places: Sequence[_Place], *, logarithmic: bool, dense: CellScore | None
) -> tuple[Scale, Scale]:
    values = [p.value for p in places if math.isfinite(p.value)] or [1.0]
    low, high = min(values), max(values)
    if logarithmic:
        # one model with a perplexity of 1e6 would push all others together
        high = min(high, OFF_SCALE * (dense.mean if dense else low))
        low, high = low / 1.15, max(high, low * 1.5) * 1.2
    else:
        low, high = min(low, 0.0), high + 0.08 * (high - min(low, 0.0) or 1.0)
    right = min(1.0, max(p.ratio for p in places) + 0.1)
    x = Scale(0.0, right, _LEFT + 16, WIDTH - _RIGHT)
    return x, Scale(low, high, _TOP + _PLOT_HEIGHT, _TOP + 10, logarithmic)


def _axes(drawing: Drawing, x: Scale, y: Scale, metric: str, *, note: str) -> None:
    bottom = _TOP + _PLOT_HEIGHT
    name = {"token_ppl": "perplexity"}.get(metric, metric.replace("_", " "))
    drawing.add(Label(4, 14, f"{name}{note}; lower is better"))
    for tick in y.ticks():
        drawing.add(Line(((_LEFT, y(tick)), (WIDTH - _RIGHT, y(tick))), "grid"))
        drawing.add(Label(_LEFT - 7, y(tick) + 4, tick_text(metric, tick), anchor="end"))
    drawing.add(Line(((_LEFT, bottom), (WIDTH - _RIGHT, bottom)), "muted"))
    for tick in x.ticks(8):
        drawing.add(Line(((x(tick), bottom), (x(tick), bottom + 4)), "muted"))
        drawing.add(Label(x(tick), bottom + 18, f"{tick:.0%}", anchor="middle"))
    drawing.add(Label((x.start + x.end) / 2, bottom + 36, "share of zeros", anchor="middle"))
    drawing.height = bottom + 48


def _dodged(places: Sequence[_Place], x: Scale, y: Scale) -> list[float]:
    """Set points that would hide each other side by side, N:M to the right of their rivals."""
    centres = [0.0] * len(places)
    put: list[tuple[float, float]] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i].pattern, i)):
        true, height = x(places[i].ratio), y(places[i].value)
        near = [at for at, other in put if abs(other - height) < _APART]
        # 0, 10, -10, 20, ...: the nearest free place. Each neighbor blocks two of these offsets at
        # most, so len(places) of them to either side always leave one free
        offsets = (k * _APART * side for k in range(len(places) + 1) for side in (1, -1))
        free = (true + o for o in offsets if all(abs(true + o - at) >= _APART for at in near))
        centres[i] = next(free)
        put.append((centres[i], height))
    return centres


def _join(
    drawing: Drawing, places: Sequence[_Place], centres: Sequence[float], y: Scale,
    looks: dict[str, tuple[str, str]],
) -> None:  # fmt: skip
    series: dict[str, list[tuple[float, float]]] = {}
    for place, centre in zip(places, centres, strict=True):
        # a line follows the ratio of unstructured rows; an N:M row is no point on that curve
        if not place.pattern and not place.hollow:
            series.setdefault(place.series, []).append((centre, y(place.value)))
    for name, points in series.items():
        if len(points) > 1:
            drawing.add(Line(tuple(sorted(points)), looks[name][0], 1.2))


def _point(drawing: Drawing, place: _Place, centre: float, y: Scale, look: tuple[str, str]) -> None:
    color, shape = look
    height, title = y(place.value), place.title
    error = place.score.error if place.score else None
    beyond = not place.value <= y.high  # so is NaN
    if beyond:
        height, title = _TOP + 8, f"{title}, beyond the scale"
        drawing.add(Line(((centre, height), (centre, height - 12)), color, 1.5))
    elif error:
        low = max(place.value - error, y.low)
        drawing.add(Line(((centre, y(low)), (centre, y(place.value + error))), "muted", 1.4))
    drawing.add(
        Mark(
            centre, height, shape, color, hollow=place.hollow, outlined=place.pattern,
            title=title, link=place.row.anchor if place.row else "",
        )
    )  # fmt: skip


_Entry = tuple[str, Callable[[float, float], list[Mark | Line]]]


def _legend_entries(
    places: Sequence[_Place], looks: dict[str, tuple[str, str]], *, front: bool
) -> list[_Entry]:
    def mark(
        color: str, shape: str, *, hollow: bool = False, outlined: bool = False
    ) -> Callable[[float, float], list[Mark | Line]]:
        return lambda x, y: [Mark(x, y, shape, color, hollow=hollow, outlined=outlined)]

    hollow = {place.series for place in places if place.hollow}
    entries: list[_Entry] = [
        (series, mark(color, shape, hollow=series in hollow))
        for series, (color, shape) in looks.items()
    ]
    if any(place.pattern for place in places):
        entries.append(("N:M: outlined", mark("back", "circle", outlined=True)))
    if front:
        entries.append(("Pareto front", lambda x, y: [Line(((x - 8, y), (x + 8, y)), "front", 7)]))
    return entries


def _legend(drawing: Drawing, entries: Sequence[_Entry]) -> None:
    x, y = 14.0, drawing.height + 10
    for text, draw in entries:
        shown = fit(text, WIDTH - 50)
        width = 34 + text_width(shown)
        if x > 14 and x + width > WIDTH:  # does not fit: a new line
            x, y = 14.0, y + 19
        drawing.add(*draw(x, y - 4), Label(x + 14, y, shown, "ink"))
        x += width
    drawing.height = y + 12
