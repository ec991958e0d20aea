"""What the charts of a report share: parameters, colors, shapes, and how they get their data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from prunebench.results.render import value_text
from prunebench.results.report.theme import SHAPES, theme_params, vega_config

if TYPE_CHECKING:
    import altair as alt

Spec = dict[str, Any]
P = ParamSpec("P")
PARAMS = ("ink", "muted", "front", "back", "methods", "narrow", "columns")


def specification(build: Callable[P, Spec]) -> Callable[P, Spec]:
    """Build a specification once for the same arguments, and without Altair's validation.

    Validation takes longer than all else; the tests validate every specification.
    """

    @functools.wraps(build)
    def without_validation(*args: P.args, **kwargs: P.kwargs) -> Spec:
        from altair.utils.schemapi import debug_mode

        with debug_mode(False):
            return build(*args, **kwargs)

    return cast("Callable[P, Spec]", functools.cache(without_validation))


def fill(
    spec: Spec, datasets: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "",
    subtitle: str = "",
) -> Spec:  # fmt: skip
    """Return a specification with data and colors, for a figure in a paper."""
    rows = [row for name in ("rows", "published") for row in datasets.get(name, ())]
    # a height of steps: lines with labels on both sides, or blocks side by side
    width = 640 if isinstance(spec["height"], dict) else 480
    values: dict[str, Any] = {
        **theme_params("light"),
        "methods": sorted({row["method"] for row in rows if row.get("method", "dense") != "dense"}),
        "narrow": False,
        "columns": width // 110,
    }
    params = [
        {**param, "value": values[param["name"]]} if param["name"] in values else param
        for param in spec["params"]
    ]
    return {
        **spec,
        "params": params,
        "datasets": {name: list(datasets.get(name, ())) for name in ("rows", "published")},
        "config": vega_config("light", paper=True),
        "width": width,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "title": {"text": title, "subtitle": subtitle},
    }


def finish(chart: alt.LayerChart | alt.FacetChart, *, height: Any) -> Spec:
    """Turn a chart into a specification with its parameters and size."""
    spec: Spec = chart.to_dict(validate=False)
    # a chart has the colors of the page or of a paper, never Altair's own
    spec.pop("config", None)
    return spec | {
        # added here: Altair copies the whole chart for every parameter
        "params": [{"name": name, "value": None} for name in PARAMS],
        "width": "container",
        "height": height,
    }


def expr(text: str) -> Any:
    """Return an expression that Vega computes."""
    import altair as alt

    return alt.ExprRef(text)


def open_scale(*, log: bool) -> Any:
    """Return a scale without a zero, with some room at its ends."""
    import altair as alt

    if log:
        return alt.Scale(type="log", nice=False, padding=14)
    return alt.Scale(zero=False, nice=False, padding=14)


def method_color(methods: Sequence[str], *, legend: bool = True) -> Any:
    """Return the color channel: the same for a method in all charts of a report."""
    import altair as alt

    shown = alt.Legend(title=None, values=expr("methods"), columns=expr("columns"))
    return alt.Color(
        "method:N", scale=alt.Scale(domain=list(methods)), legend=shown if legend else None
    )


def method_shape(methods: Sequence[str], *, legend: bool = True) -> Any:
    """Return the shape channel: the same for a method in all charts of a report."""
    import altair as alt

    marks = [SHAPES[i % len(SHAPES)] for i in range(len(methods))]
    shown = alt.Legend(title=None, values=expr("methods"), columns=expr("columns"))
    return alt.Shape(
        "method:N",
        scale=alt.Scale(domain=list(methods), range=marks),
        legend=shown if legend else None,
    )


def metric_format(metric: str) -> str:
    """Return the format of an axis in the metric's own unit."""
    return "%" if value_text(metric, 0.5).endswith("%") else ",.6~g"


def metric_name(metric: str) -> str:
    """Return what an axis calls a metric."""
    return {"token_ppl": "perplexity"}.get(metric, metric.replace("_", " "))


def value_title(metric: str, *, log: bool, higher_is_better: bool) -> str:
    """Return the title of an axis of a metric."""
    scale = ", log scale" if log else ""
    return f"{metric_name(metric)}{scale}; {'higher' if higher_is_better else 'lower'} is better"
