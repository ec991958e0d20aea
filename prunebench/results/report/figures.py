"""The figures of a report as files for a paper: PDF, SVG and PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunebench.errors import MissingResource, SaveError
from prunebench.files import atomic_file, require_writable, write_text
from prunebench.results.report.drawing import LIGHT, Box, Drawing, Line, Mark, Shape, to_svg

FORMATS = ("pdf", "svg", "png")
_POINTS = 0.75  # of a pixel
_SETTINGS: Any = {
    "pdf.fonttype": 42,  # letters stay letters
    "svg.fonttype": "none",
    "svg.hashsalt": "prunebench",
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Liberation Sans", "DejaVu Sans"],
}


def require_figures(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Find out before the work whether figures can be made and written.

    Raises:
        MissingResource: matplotlib is not installed.
        SaveError: The folder cannot be written to, or holds one of the files and not `force`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingResource(
            "matplotlib is not installed",
            where="figures for a paper are drawn by it",
            fix="pip install 'prunebench[report]'",
        )
    require_writable(folder)
    taken = [path for name in names for path in _paths(folder, name) if path.exists()]
    if taken and not force:
        raise SaveError(
            f"{taken[0]} exists already",
            where=f"so do {len(taken) - 1} other figures" if len(taken) > 1 else "",
            fix="name another folder, or replace them with --force",
        )


def write_figures(folder: Path, drawings: Sequence[tuple[str, Drawing]]) -> list[Path]:
    """Write every drawing in every format under its name; the same ones give the same bytes.

    Raises:
        SaveError: A file could not be written.
    """
    written = []
    for name, drawing in drawings:
        for path in _paths(folder, name):
            if path.suffix == ".svg":
                write_text(path, to_svg(drawing, themed=False) + "\n")
            else:
                _write(path, drawing)
            written.append(path)
    return written


def _paths(folder: Path, name: str) -> Iterator[Path]:
    return (folder / f"{name}.{suffix}" for suffix in FORMATS)


def _write(path: Path, drawing: Drawing) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix[1:]
    with mpl.rc_context(_SETTINGS):
        size = (drawing.width * _POINTS / 72, drawing.height * _POINTS / 72)  # inches
        figure = Figure(figsize=size, facecolor=LIGHT["back"])
        # without pyplot: no display is needed, and no figure stays in its global list
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))  # y downwards, as in SVG
        axes.axis("off")
        # zorder by place in the list: matplotlib would draw all patches below all lines
        for order, shape in enumerate(drawing.shapes):
            _draw(axes, shape, order)
        # a date or a version in the file would make equal figures differ
        metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
        with atomic_file(path) as part:
            figure.savefig(part, format=kind, dpi=300, metadata=metadata)


def _color(name: str) -> str:
    return name if name.startswith("#") else LIGHT[name]


def _draw(axes: Any, shape: Shape, order: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon, Rectangle

    if isinstance(shape, Line):
        # matplotlib's dashes are in line widths, SVG's in pixels
        dash: Any = (0, tuple(d / shape.width for d in shape.dash)) if shape.dash else "solid"
        axes.add_line(
            Line2D(
                *zip(*shape.points, strict=True), color=_color(shape.color), linestyle=dash,
                linewidth=shape.width * _POINTS, zorder=order,
            )
        )  # fmt: skip
    elif isinstance(shape, Box):
        axes.add_patch(
            Rectangle(
                (shape.x, shape.y), shape.width, shape.height, color=_color(shape.color),
                alpha=shape.opacity, linewidth=0, zorder=order,
            )
        )  # fmt: skip
    elif isinstance(shape, Mark):
        stroke = shape.color if shape.hollow else "ink" if shape.outlined else "back"
        axes.add_patch(
            Polygon(
                shape.corners, facecolor=_color("back" if shape.hollow else shape.color),
                edgecolor=_color(stroke), zorder=order,
                linewidth=(1.6 if shape.hollow or shape.outlined else 0.8) * _POINTS,
            )
        )  # fmt: skip
    else:
        axes.text(
            shape.x, shape.y, shape.text, color=_color(shape.color), zorder=order,
            fontsize=shape.size * _POINTS, fontweight="bold" if shape.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor], va="baseline",
        )  # fmt: skip
