"""How a training went: the held-out perplexity of the hard mask against the tokens learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.results.report.data import Row
from prunebench.results.report.drawing import SHAPES, Drawing, Label, Line, Mark, fit, text_width
from prunebench.results.report.scale import WIDTH, Scale, tick_text
from prunebench.results.schema import TrainingPoint

_LEFT, _RIGHT, _TOP = 58.0, 24.0, 26.0
_PLOT_HEIGHT = 240.0
_COLORS = 8


@dataclass(frozen=True)
class Curve:
    """The measured points of one training: those with a held-out score."""

    row: Row
    name: str
    points: tuple[TrainingPoint, ...]


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """Return the trainings of all rows, one a seed, the newest where one was repeated."""
    curves = []
    for row in rows:
        for result in sorted(row.results, key=lambda r: r.spec.seed):
            # `counted` leaves out the older runs of a seed
            if result.training is None or result.id not in row.counted:
                continue
            points = tuple(p for p in result.training.curve if _score(p) is not None)
            if len(points) > 1:
                curves.append(Curve(row, f"{row.name}, seed {result.spec.seed}", points))
    return curves


def learning_curves(curves: Sequence[Curve]) -> Drawing:
    """Draw held-out perplexities, on a log scale, against tokens."""
    drawing = Drawing(
        name="learning-curves",
        title="Perplexity of the hard mask on held-out training text",
        summary="One line a training; lower is better. The values are in the table below.",
        width=WIDTH,
        height=0.0,
    )
    scores = [s for c in curves for p in c.points if (s := _score(p)) is not None]
    largest = max(p.tokens for c in curves for p in c.points)
    low, high = min(scores) / 1.1, max(scores) * 1.1
    x = Scale(0.0, float(largest), _LEFT + 12, WIDTH - _RIGHT)
    # pixels grow downwards, so the lowest perplexity is at the bottom, where y is largest
    y = Scale(low, high, _TOP + _PLOT_HEIGHT, _TOP + 8, logarithmic=True)
    _axes(drawing, x, y)
    shapes = list(SHAPES)
    for number, curve in enumerate(curves):
        color, shape = f"s{number % _COLORS}", shapes[number % len(shapes)]
        places = tuple((x(float(p.tokens)), y(_score(p) or high)) for p in curve.points)
        drawing.add(Line(places, color, 1.6))
        for point, (across, down) in zip(curve.points, places, strict=True):
            title = f"{curve.name}: {_score(point):.4g} after {point.tokens:,} tokens"
            drawing.add(Mark(across, down, shape, color, title=title, link=curve.row.anchor))
    for number, curve in enumerate(curves):
        line = drawing.height + 10
        drawing.add(
            Mark(14, line - 4, shapes[number % len(shapes)], f"s{number % _COLORS}"),
            Label(28, line, fit(curve.name, WIDTH - 50), "ink"),
        )
        drawing.height = line + 8
    return drawing


def _axes(drawing: Drawing, x: Scale, y: Scale) -> None:
    bottom = _TOP + _PLOT_HEIGHT
    drawing.add(Label(4, 14, "perplexity, log scale; lower is better"))
    for tick in y.ticks():
        drawing.add(Line(((_LEFT, y(tick)), (WIDTH - _RIGHT, y(tick))), "grid"))
        drawing.add(Label(_LEFT - 7, y(tick) + 4, tick_text("token_ppl", tick), anchor="end"))
    drawing.add(Line(((_LEFT, bottom), (WIDTH - _RIGHT, bottom)), "muted"))
    for tick in x.ticks(5):
        drawing.add(Line(((x(tick), bottom), (x(tick), bottom + 4)), "muted"))
        text = f"{tick:,.0f}"
        if x(tick) + text_width(text) / 2 <= WIDTH:
            drawing.add(Label(x(tick), bottom + 18, text, anchor="middle"))
    middle = (x.start + x.end) / 2
    drawing.add(Label(middle, bottom + 36, "tokens learned from", anchor="middle"))
    drawing.height = bottom + 48


def _score(point: TrainingPoint) -> float | None:
    value = point.held_out_ppl
    # only what has a place on a log scale
    return value if value is not None and math.isfinite(value) and value > 0 else None
