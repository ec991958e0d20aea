"""What the charts share: scales and the colors of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.results.render import value_text
from prunebench.results.report.drawing import SERIES_COLORS

WIDTH = 480.0
OFF_SCALE = 100.0  # a perplexity of more than so many times dense is drawn at the edge
_LOG_TICKS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8),
)


def color_of(method: str, methods: Sequence[str]) -> str:
    """Return the color of a method, the same in all figures of a report."""
    return f"s{methods.index(method) % SERIES_COLORS}" if method in methods else "muted"


@dataclass(frozen=True)
class Scale:
    """From values to pixels; `low` lies at `start`, what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        # min and max with a NaN return either argument, depending on their order
        value = self.high if math.isnan(value) else min(max(value, self.low), self.high)
        share = self._share(value)
        return self.start + share * (self.end - self.start)

    def _share(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 6) -> list[float]:
        """Return round values inside the scale."""
        if self.logarithmic:
            return self._log_ticks(about)
        # the smallest of 1, 2, 2.5, 5, 10, 20 times a power of ten that gives few enough ticks
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / about))
        step *= next(
            k for k in (1, 2, 2.5, 5, 10, 20) if (self.high - self.low) / (k * step) <= about
        )
        # 1e-9: 0.3 / 0.1 is 2.9999999999999996, which would cut off the last tick
        first = math.ceil(self.low / step - 1e-9)
        count = int((self.high - first * step) / step + 1e-9) + 1
        return [(first + i) * step for i in range(count)]

    def _log_ticks(self, about: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        best: list[float] = []
        # from coarse to fine: take the most ticks that still fit
        for steps in _LOG_TICKS:
            ticks = [k * 10.0**d for d in decades for k in steps]
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(inside) <= about + 2:
                best = inside if len(inside) > len(best) else best
        return best


def tick_text(metric: str, value: float) -> str:
    """Return the text of a tick."""
    if value_text(metric, 0.5).endswith("%"):
        return f"{100 * value:.3g}%"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
