"""The heat map: modules downwards, blocks to the right. The page refills it for another run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.results.report.drawing import Box, Drawing, Label, fit, heat_color, text_width
from prunebench.results.report.heat import HeatMap, HeatRun
from prunebench.results.report.scale import WIDTH

_ROW_HEIGHT = 20.0
_MIN_RANGE = 0.01  # realised ratios that differ by less than this are all of one color


@dataclass(frozen=True)
class HeatScale:
    """The range of the colors of one run; `low` is dark, `high` is bright."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1; what is not finite is beyond all others."""
        if not math.isfinite(value):
            return 1.0
        if self.logarithmic:
            if value <= self.low:  # a loss of 0 has no logarithm
                return 0.0
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        """Return a value as it is shown."""
        if not self.logarithmic:
            return f"{value:.1%}"
        return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"

    def middle(self) -> float:
        """Return the value of the middle color."""
        if self.logarithmic:
            return math.sqrt(self.low * self.high)  # halfway between the logarithms
        return (self.low + self.high) / 2


def ratio_scale(run: HeatRun) -> HeatScale:
    """Return the scale of realised sparsity: as narrow as the run's own range."""
    finite = [value for value in run.ratios if value is not None]
    low, high = min(finite), max(finite)
    room = max(0.0, _MIN_RANGE - (high - low)) / 2
    return HeatScale(low - room, high + room, logarithmic=False)


def loss_scale(run: HeatRun) -> HeatScale | None:
    """Return the logarithmic scale of layer loss; None where no loss is above zero."""
    finite = [value for value in run.losses if value is not None and 0 < value < math.inf]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    # equal ends would divide by log(1) = 0
    return HeatScale(low, high if high > low else low * 10, logarithmic=True)


def heat_chart(
    heat: HeatMap, values: Sequence[float | None], scale: HeatScale, *, name: str, title: str
) -> Drawing:
    """Draw one quantity of one run."""
    left = min(max(text_width(module) for module in heat.modules) + 14, 165.0)
    width = (WIDTH - left - 6) / len(heat.blocks)
    drawing = Drawing(
        name=name,
        title=title,
        summary=f"{len(heat.modules)} kinds of layers in {len(heat.blocks)} blocks. "
        "The values are in the table below.",
        width=WIDTH,
        height=0.0,
    )
    gap = 1.0 if width > 5 else 0.0
    for i, module in enumerate(heat.modules):
        y = 4 + i * _ROW_HEIGHT
        drawing.add(Label(left - 8, y + 14, fit(module, left - 12), "ink", "end"))
        for j, block in enumerate(heat.blocks):
            key = i * len(heat.blocks) + j
            value = values[key]
            text = "-" if value is None else scale.text(value)
            color = "grid" if value is None else heat_color(scale.share(value))
            at = f"{module}, block {block}: {text}"
            drawing.add(
                Box(left + j * width, y, width - gap, _ROW_HEIGHT - gap, color, 1.0, at, key)
            )
    bottom = 4 + len(heat.modules) * _ROW_HEIGHT
    # block numbers stand at least 24 pixels apart
    every = max(1, math.ceil(24 / width))
    for j, block in enumerate(heat.blocks):
        if j % every == 0:
            x = left + (j + 0.5) * width
            drawing.add(Label(x, bottom + 15, str(block), anchor="middle"))
    drawing.add(Label(left - 8, bottom + 15, "block", anchor="end"))
    _color_bar(drawing, scale, left, bottom + 28)
    return drawing


def _color_bar(drawing: Drawing, scale: HeatScale, left: float, top: float) -> None:
    steps, width = 64, WIDTH - left - 6
    for i in range(steps):
        x = left + i * width / steps
        # half a pixel of overlap hides the seams that antialiasing leaves between steps
        drawing.add(Box(x, top, width / steps + 0.5, 10, heat_color(i / (steps - 1))))
    places = (("low", left, "start", scale.low), ("high", left + width, "end", scale.high))
    for key, x, anchor, value in (*places, ("middle", left + width / 2, "middle", scale.middle())):
        drawing.add(Label(x, top + 24, scale.text(value), "ink", anchor, key=key))
    if scale.logarithmic:
        drawing.add(Label(left - 8, top + 10, "log scale", anchor="end"))
    drawing.height = top + 32
