"""A figure is a list of shapes at places in pixels, in colors that have names.

Whoever writes it decides what the names mean: the page follows the reader's light or dark theme,
a paper has the light one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape as escape_html

TEXT_SIZE = 12.5
Pixels = float | int
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
LIGHT = {
    "ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e7eb", "front": "#d5dae0", "back": "#ffffff",
    "s0": "#2563b0", "s1": "#c2410c", "s2": "#0f7b5f", "s3": "#9d3f8c", "s4": "#8a6d00",
    "s5": "#4b5a6b", "s6": "#b4232f", "s7": "#1d7fa3",
}  # fmt: skip
DARK = {
    "ink": "#e8ebee", "muted": "#a3adb8", "grid": "#2c343d", "front": "#3b4651", "back": "#14181d",
    "s0": "#7db3ff", "s1": "#ff9d66", "s2": "#56d3ab", "s3": "#e79bd8", "s4": "#e0c14e",
    "s5": "#aebccb", "s6": "#ff8f98", "s7": "#74d0ef",
}  # fmt: skip
SERIES_COLORS = 8
HEAT_COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")  # viridis, five of its 256


def _regular(corners: int, turn: float, radius: float) -> tuple[tuple[float, float], ...]:
    # y grows downwards in SVG: a turn of -pi/2 puts the first corner at the top
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


_CROSS = (
    (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4),
    (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4),
)  # fmt: skip
SHAPES = {
    "circle": _regular(24, 0.0, 1.0),
    "square": _regular(4, math.pi / 4, 1.25),
    "up": _regular(3, -math.pi / 2, 1.35),
    "diamond": _regular(4, 0.0, 1.35),
    "down": _regular(3, math.pi / 2, 1.35),
    "cross": _CROSS,
    "pentagon": _regular(5, -math.pi / 2, 1.15),
    "hexagon": _regular(6, 0.0, 1.1),
}


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[tuple[Pixels, Pixels], ...]
    color: str = "ink"
    width: Pixels = 1.0
    dash: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Box:
    """A filled rectangle; `key` is its number for the page's script."""

    x: Pixels
    y: Pixels
    width: Pixels
    height: Pixels
    color: str
    opacity: float = 1.0
    title: str = ""
    key: int | None = None


@dataclass(frozen=True)
class Mark:
    """A point of data: filled, or hollow where it is not ours; outlined where it is N:M."""

    x: Pixels
    y: Pixels
    shape: str
    color: str
    size: Pixels = 4.5
    hollow: bool = False
    outlined: bool = False
    title: str = ""
    link: str = ""

    @property
    def corners(self) -> list[tuple[Pixels, Pixels]]:
        """The corners of its shape."""
        return [(self.x + self.size * x, self.y + self.size * y) for x, y in SHAPES[self.shape]]


@dataclass(frozen=True)
class Label:
    """A text; `y` is its baseline, `key` its name for the page's script."""

    x: Pixels
    y: Pixels
    text: str
    color: str = "muted"
    anchor: str = "start"
    size: Pixels = TEXT_SIZE
    bold: bool = False
    key: str = ""


Shape = Line | Box | Mark | Label


@dataclass
class Drawing:
    """A figure.

    Attributes:
        name: A word that tells the figures of a model apart; part of file names.
        title: What a reader sees above it.
        summary: The figure in a sentence, for those who do not see it.
    """

    name: str
    title: str
    summary: str
    width: Pixels
    height: Pixels
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Put shapes on top."""
        self.shapes.extend(shapes)


def text_width(text: str, size: Pixels = TEXT_SIZE) -> float:
    """Return about how wide a text is; no font is at hand to ask."""
    return size * sum(
        0.36 if c in "iljtfr.,:;|!'()[] -" else 0.9 if c in "mwMW@%±" else 0.6 for c in text
    )


def fit(text: str, width: Pixels, size: Pixels = TEXT_SIZE) -> str:
    """Shorten a text to a width."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def heat_color(share: float) -> str:
    """Return the color of a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(HEAT_COLORS) - 1)
    # a share of 1 belongs to the last pair of colors, not to one beyond it
    low = min(int(place), len(HEAT_COLORS) - 2)
    ends = [[int(HEAT_COLORS[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (low, low + 1)]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def escape(text: str) -> str:
    """Escape a text for XML, which has no place for control characters either."""
    return escape_html("".join(c if c.isprintable() else "\ufffd" for c in text))


def to_svg(drawing: Drawing, *, themed: bool) -> str:
    """Return a drawing as an SVG element; `themed` for a page that defines the colors in CSS."""

    def color(name: str) -> str:
        if name.startswith("#"):
            return name
        return f"var(--{name})" if themed else LIGHT[name]

    size = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    # a file needs the namespace and a size of its own; inside HTML the page gives both
    if not themed:
        size = f'xmlns="http://www.w3.org/2000/svg" {size}'
        size += f' width="{drawing.width:g}" height="{drawing.height:g}"'
    body = "".join(_element(shape, color) for shape in drawing.shapes)
    return (
        f'<svg {size} role="img" '
        f'aria-label="{escape(drawing.title)}. {escape(drawing.summary)}" '
        f'font-family="{escape(FONT)}">{body}</svg>'
    )


def _element(shape: Shape, color: Callable[[str], str]) -> str:
    if isinstance(shape, Line):
        dash = f' stroke-dasharray="{" ".join(f"{d:g}" for d in shape.dash)}"' if shape.dash else ""
        return (
            f'<polyline points="{_places(shape.points)}" fill="none" stroke-linejoin="round" '
            f'stroke="{color(shape.color)}" stroke-width="{shape.width:g}"{dash}/>'
        )
    if isinstance(shape, Box):
        key = f' data-key="{shape.key}"' if shape.key is not None else ""
        opacity = f' fill-opacity="{shape.opacity:g}"' if shape.opacity < 1 else ""
        place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}"'
        fill = f'height="{shape.height:.1f}" fill="{color(shape.color)}"{opacity}{key}'
        return f"<rect {place} {fill}>{_title(shape.title)}</rect>"
    if isinstance(shape, Mark):
        fill = color("back" if shape.hollow else shape.color)
        # a rim in the background's color keeps overlapping marks apart
        stroke = color(shape.color if shape.hollow else "ink" if shape.outlined else "back")
        width = 1.6 if shape.hollow or shape.outlined else 0.8
        mark = (
            f'<polygon points="{_places(shape.corners)}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{width:g}">{_title(shape.title)}</polygon>'
        )
        # out of the tab order: the table behind the figure has the same links
        return f'<a href="#{escape(shape.link)}" tabindex="-1">{mark}</a>' if shape.link else mark
    weight = ' font-weight="600"' if shape.bold else ""
    key = f' data-key="{escape(shape.key)}"' if shape.key else ""
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" '
        f'text-anchor="{shape.anchor}" fill="{color(shape.color)}"{weight}{key}>'
        f"{escape(shape.text)}</text>"
    )


def _places(points: Iterable[tuple[Pixels, Pixels]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
