"""The figures of a report as files for a paper: PDF, SVG and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunebench.errors import SaveError
from prunebench.files import atomic_file, require_writable, write_text
from prunebench.results.render import score_title
from prunebench.results.report import charts
from prunebench.results.report.data import ModelPart, Report
from prunebench.results.report.page import (
    LAYER_TITLES,
    MAX_CURVES,
    axes_of,
    cost_spec,
    layer_spec,
    lines_spec,
    metric_key,
    trade_off_spec,
)
from prunebench.results.report.payload import (
    COSTS,
    Fields,
    clean,
    cost_rows,
    curve_rows,
    heat_rows,
    published_rows,
    score_rows,
)
from prunebench.results.report.specification import Spec, fill
from prunebench.spec import slug

FORMATS = ("pdf", "svg", "png")
MAX_HEAT_FILES = 12
MAX_LINES = 60  # more rows than these are not readable in one figure
_PNG_SCALE = 300 / 72  # 300 dots an inch


@dataclass(frozen=True)
class Figure:
    """A chart with its data, and the name of its files."""

    name: str
    spec: Spec


def figures_of(report: Report) -> tuple[list[Figure], int]:
    """Return the figures of a report, and how many heat maps are left out."""
    figures: list[Figure] = []
    left_out = 0
    for part in report.models:
        named = [*_scores(part, report), *_curves(part), *_layers(part), *_costs(part, report)]
        figures += [Figure(f"{slug(part.table.model)}-{name}", spec) for name, spec in named]
        if part.heat:
            left_out += max(0, len(part.heat.runs) - MAX_HEAT_FILES) + part.heat.left_out
    return _with_unique_names(figures), left_out


def _with_unique_names(figures: Sequence[Figure]) -> list[Figure]:
    # slugs drop punctuation, so two protocols may give the same file name
    unique: dict[str, Figure] = {}
    for figure in figures:
        name, number = figure.name, 2
        while name in unique:
            name, number = f"{figure.name}-{number}", number + 1
        unique[name] = Figure(name, figure.spec)
    return list(unique.values())


_Named = Iterator[tuple[str, Spec]]


def _methods(report: Report) -> tuple[str, ...]:
    return tuple(map(clean, report.methods))


def _scores(part: ModelPart, report: Report) -> _Named:
    for column in part.table.columns:
        rows = [row for row in score_rows(part, column) if row.get("short")]
        published = published_rows(part, column, first=len(part.rows))
        if all(row["method"] == "dense" for row in rows):
            continue
        key, title = metric_key(part, column), clean(score_title(column, part.protocols))
        metric, _, protocol = column.partition(" ")
        # a picture in a paper has no tooltip: the whole id stands below the title
        short = part.protocols[protocol]
        subtitle = clean(f"{short} = {protocol}") if short != protocol else ""
        name = slug(f"{metric}-{protocol}")
        for against in axes_of(part):
            spec = trade_off_spec(key, _methods(report), against)
            values = {"rows": rows, "published": published if against == "zeros" else []}
            heading = f"{title} against {charts.X_AXES[against][0]}"
            yield f"{name}-against-{against}", fill(spec, values, title=heading, subtitle=subtitle)
        spec = lines_spec(key, _methods(report))
        lines: list[Fields] = [*rows[: MAX_LINES + 1], *published[:MAX_LINES]]
        yield f"{name}-by-method", fill(spec, {"rows": lines}, title=title, subtitle=subtitle)


def _curves(part: ModelPart) -> _Named:
    points = [row for curve in part.curves[:MAX_CURVES] for row in curve_rows(curve)]
    if points:
        title = "Perplexity of the hard mask on held-out training text"
        yield (
            "learning-curves",
            fill(charts.learning_curves(), {"rows": points}, title=title),
        )


def _layers(part: ModelPart) -> _Named:
    for run in part.heat.runs[:MAX_HEAT_FILES] if part.heat else ():
        for quantity, title in LAYER_TITLES.items():
            rows = heat_rows(part.heat, run, quantity) if part.heat else []
            if rows:
                name = f"{slug(run.name)}-layer-{'sparsity' if quantity == 'ratio' else 'loss'}"
                heading = f"{title}: {clean(run.name)}"
                yield name, fill(layer_spec(quantity), {"rows": rows}, title=heading)


def _costs(part: ModelPart, report: Report) -> _Named:
    for number, machine in enumerate(sorted({cost.machine for cost in part.costs})):
        for quantity, (title, _, _) in COSTS.items():
            rows = [r for r in cost_rows(part, quantity, machine) if r.get("short")][:MAX_LINES]
            if rows:
                heading = f"{title}, {machine}"
                spec = fill(cost_spec(quantity, _methods(report)), {"rows": rows}, title=heading)
                yield f"{slug(title.lower())}-{number}", spec


# ---------------------------------------------------------------- files


def require_figures(folder: Path, figures: Sequence[Figure], *, force: bool) -> None:
    """Find out before the work whether figures can be written.

    Raises:
        SaveError: The folder cannot be written to, or holds one of the files and not `force`.
    """
    require_writable(folder)
    taken = [path for figure in figures for path in _paths(folder, figure) if path.exists()]
    if taken and not force:
        raise SaveError(
            f"{taken[0]} exists already",
            where=f"so do {len(taken) - 1} other figures" if len(taken) > 1 else "",
            fix="name another folder, or replace them with --force",
        )


def write_figures(folder: Path, figures: Sequence[Figure]) -> list[Path]:
    """Write every figure in every format under its name.

    The same figures give the same SVG and PNG; a PDF has its parts in another order each time.

    Raises:
        SaveError: A file could not be written.
    """
    import vl_convert

    written = []
    for figure in figures:
        # one conversion gives the picture, the other formats are made from it
        svg = vl_convert.vegalite_to_svg(figure.spec)
        for path in _paths(folder, figure):
            if path.suffix == ".svg":
                write_text(path, svg + "\n")
            else:
                is_pdf = path.suffix == ".pdf"
                content = (
                    vl_convert.svg_to_pdf(svg)
                    if is_pdf
                    else vl_convert.svg_to_png(svg, scale=_PNG_SCALE)
                )
                with atomic_file(path) as part:
                    part.write_bytes(content)
            written.append(path)
    return written


def _paths(folder: Path, figure: Figure) -> Iterator[Path]:
    return (folder / f"{figure.name}.{suffix}" for suffix in FORMATS)
