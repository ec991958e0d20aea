"""The charts of a report as Vega-Lite specifications, without their data.

A specification names two datasets, `rows` and `published`, and the parameters in `PARAMS`. The
page's script fills it with the rows that the reader's filters leave, `fill` with all of them. What
a chart has to compute from its rows (places side by side, the Pareto front) is in its
specification, so both get the same picture.
"""

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
SEPARATOR = "\u2063"  # invisible: between the id, the label and the value of a line
PARAMS = ("ink", "muted", "front", "back", "methods", "narrow", "columns")
_DODGE = 10  # pixels between points that would hide each other
_SPREAD = 36  # pixels that they take together at most
X_AXES = {
    "zeros": ("share of zeros", "%"),
    "bytes": ("bytes, of the dense model's", "~g"),
    "decode": ("decode speed, times dense", "~g"),
    "prefill": ("prefill speed, times dense", "~g"),
}
"""What quality is set against: the title of the axis, and the format of its ticks."""


def _specification(build: Callable[P, Spec]) -> Callable[P, Spec]:
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
    spec: Spec, datasets: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = ""
) -> Spec:
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
        "title": title or spec.get("title", ""),
    }


def _finish(chart: alt.LayerChart | alt.FacetChart, *, height: Any) -> Spec:
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


def _expr(text: str) -> Any:
    import altair as alt

    return alt.ExprRef(text)


def _open_scale(*, log: bool) -> Any:
    """Return a scale without a zero, with some room at its ends."""
    import altair as alt

    if log:
        return alt.Scale(type="log", nice=False, padding=14)
    return alt.Scale(zero=False, nice=False, padding=14)


def _method_color(methods: Sequence[str], *, legend: bool = True) -> Any:
    """Return the color channel: the same for a method in all charts of a report."""
    import altair as alt

    shown = alt.Legend(title=None, values=_expr("methods"), columns=_expr("columns"))
    return alt.Color(
        "method:N", scale=alt.Scale(domain=list(methods)), legend=shown if legend else None
    )


def _method_shape(methods: Sequence[str], *, legend: bool = True) -> Any:
    import altair as alt

    marks = [SHAPES[i % len(SHAPES)] for i in range(len(methods))]
    shown = alt.Legend(title=None, values=_expr("methods"), columns=_expr("columns"))
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


# ---------------------------------------------------------------- quality against zeros


@_specification
def trade_off(
    metric: str, methods: tuple[str, ...], *, against: str, log: bool, higher_is_better: bool
) -> Spec:
    """Draw a score against zeros, bytes or speed, with dense, errors and the Pareto front.

    Rows need `method`, `name`, `text`, `shown`, `low`, `high`, `pattern`, `best` and the
    field `against`.
    """
    import altair as alt

    x_title, x_format = X_AXES[against]
    x = alt.X(
        f"{against}:Q",
        title=x_title,
        # room on the right for the names of the best
        scale=alt.Scale(
            zero=against == "zeros",
            padding=14,
            domainMax=_expr(f"1.25 * extent(pluck(data('rows'), '{against}'))[1]"),
        ),
        axis=alt.Axis(format=x_format, tickCount=6, grid=False),
    )
    y_scale = _open_scale(log=log)
    y = alt.Y(
        "shown:Q",
        title=value_title(metric, log=log, higher_is_better=higher_is_better),
        scale=y_scale,
        axis=alt.Axis(format=metric_format(metric), tickCount=6),
    )
    rows = alt.Chart(alt.NamedData("rows"))
    front = _on_front(rows, against, higher_is_better=higher_is_better)
    tooltip = [
        alt.Tooltip("name:N", title="row"),
        alt.Tooltip("text:N", title=metric_name(metric)),
        alt.Tooltip(f"{against}:Q", title=x_title, format=".3~%" if x_format == "%" else ""),
    ]
    layers = [
        front.mark_line(strokeWidth=6, strokeCap="round", color=_expr("front"), aria=False).encode(
            x=x, y=y, order=alt.Order(f"{against}:Q")
        ),
        *_dense_and_published(x, y, methods),
        *_points(_side_by_side(rows, against, log=log), x, y, methods, tooltip=tooltip, log=log),
    ]
    return _finish(alt.layer(*layers), height=380)


def _points(
    chart: Any, x: Any, y: Any, methods: Sequence[str], *, tooltip: Any, log: bool
) -> list[Any]:
    """Return the layers of the pruned rows: lines, errors, points, names of the best."""
    import altair as alt

    color, dodge = _method_color(methods), _expr("datum.dodge")
    low = alt.Y("low:Q", scale=_open_scale(log=log))
    rim = alt.condition("datum.pattern", alt.value(_expr("ink")), alt.value(_expr("back")))
    return [
        chart.transform_filter("!datum.pattern")
        .mark_line(strokeWidth=1.4, opacity=0.7, aria=False)
        .encode(x=x, y=y, detail="series:N", color=color),
        chart.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.4, xOffset=dodge, aria=False)
        .encode(x=x, y=low, y2="high:Q", color=color),
        chart.mark_point(filled=True, opacity=1, strokeWidth=1.3, xOffset=dodge, aria=False)
        .encode(
            x=x, y=y, color=color, shape=_method_shape(methods), tooltip=tooltip, stroke=rim,
            size=alt.condition("datum.beyond", alt.value(60), alt.value(90)),
        ),
        chart.transform_filter("datum.beyond")
        .mark_text(text="↑", dy=-11, xOffset=dodge, fontSize=12, aria=False)
        .encode(x=x, y=y, color=color),
        chart.transform_filter("datum.best && !narrow")
        .transform_calculate(point="datum.method + ' ' + datum.sparsity")
        .mark_text(
            align="left", dx=9, dy=_expr("datum.pattern ? -8 : 9"), fontSize=11, xOffset=dodge,
            aria=False,
        )
        .encode(x=x, y=y, text="point:N", color=alt.value(_expr("ink"))),
    ]  # fmt: skip


def _dense_and_published(x: Any, y: Any, methods: Sequence[str]) -> list[Any]:
    """Return the layers of what the rows stand beside: the dense model, values of papers."""
    import altair as alt

    dense = alt.Chart(alt.NamedData("rows")).transform_filter("datum.method == 'dense'")
    published = alt.Chart(alt.NamedData("published"))
    return [
        dense.mark_rule(strokeDash=[4, 3], color=_expr("muted"), aria=False).encode(y=y),
        dense.mark_text(align="right", baseline="bottom", dx=-2, dy=-3, fontSize=11, aria=False)
        .encode(x=alt.value("width"), y=y, text="text:N", color=alt.value(_expr("muted"))),
        published.mark_point(filled=False, size=70, strokeWidth=1.6, aria=False).encode(
            x=x, y=y, color=_method_color(methods), shape=_method_shape(methods),
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip("text:N"), alt.Tooltip("source:N")],
        ),
    ]  # fmt: skip


def _side_by_side(chart: alt.Chart, against: str, *, log: bool) -> Any:
    """Keep the pruned rows; set those that would hide each other side by side, N:M last."""
    import altair as alt

    position = "log(datum.shown)" if log else "datum.shown"
    return (
        chart.transform_calculate(position=position)
        .transform_joinaggregate(bottom="min(position)", top="max(position)")
        .transform_filter(f"datum.method != 'dense' && isValid(datum.{against})")
        # 28 bands of the height and 40 of the width: about the size of a point
        .transform_calculate(
            band="floor(28 * (datum.position - datum.bottom) / (datum.top - datum.bottom))",
            place=f"round(40 * datum.{against})",
        )
        .transform_window(
            number="row_number()", groupby=["band", "place"],
            sort=[alt.SortField("pattern"), alt.SortField("shown")],
        )
        .transform_joinaggregate(count="count()", groupby=["band", "place"])
        # 0, 1, -1, 2, ... steps; closer together where there are many
        .transform_calculate(
            dodge=f"min({_DODGE}, {_SPREAD} / datum.count) * floor(datum.number / 2)"
            " * (datum.number % 2 ? -1 : 1)"
        )
    )  # fmt: skip


def _on_front(chart: alt.Chart, against: str, *, higher_is_better: bool) -> Any:
    """Keep the rows that no other one beats in both: from the sparsest down, the best so far."""
    import altair as alt

    # fewer bytes are better, more zeros and more speed are
    order: Any = "ascending" if against == "bytes" else "descending"
    return (
        chart.transform_filter(f"isValid(datum.{against}) && !datum.beyond")
        # ratios are rounded to 0.1%, as the realised ratios of one target differ a little
        .transform_calculate(
            rounded=f"round(1000 * datum.{against})",
            loss="-datum.shown" if higher_is_better else "datum.shown",
        )
        .transform_window(
            least="min(loss)", frame=[None, 0],
            sort=[alt.SortField("rounded", order), alt.SortField("loss", "ascending")],
        )
        .transform_filter("datum.loss <= datum.least")
    )  # fmt: skip


# ---------------------------------------------------------------- one line a row


@_specification
def lines(
    title: str, methods: tuple[str, ...], *, log: bool, number_format: str, dense: bool = True,
    bars: bool = False,
) -> Spec:  # fmt: skip
    """Draw one line a row: its label, a dot (or a bar from zero) with its error, its value.

    Rows need `id`, `line`, `text`, `shown`, `low`, `high`, `beyond`, `order` and `method`.
    """
    import altair as alt

    # the label and the value stand in the key: an axis has nothing else of its row
    key = f"datum.id + '{SEPARATOR}' + datum.line + '{SEPARATOR}' + datum.text"
    data = alt.Chart(alt.NamedData("rows")).transform_calculate(key=key)
    pruned = data.transform_filter("datum.method != 'dense'")
    reference = data.transform_filter("datum.method == 'dense'")
    label = _line_axis(1, "left", _expr("narrow ? 130 : 250"))
    scale = alt.Scale() if bars else _open_scale(log=log)
    ticks = alt.Axis(format=number_format, tickCount=_expr("narrow ? 3 : 6"))
    x = alt.X("shown:Q", title=title, scale=scale, axis=ticks)
    color = _method_color(methods, legend=False)
    tooltip = [alt.Tooltip("name:N", title="row"), alt.Tooltip("text:N", title="value")]
    ours = pruned.transform_filter("!datum.hollow")
    if bars:
        marks = ours.mark_bar(height={"band": 0.6}, aria=False)
        marks = marks.encode(x=x, y=label, color=color, tooltip=tooltip)
    else:
        # an arrow where the value lies beyond the scale
        shape = alt.condition("datum.beyond", alt.value("triangle-right"), alt.value("circle"))
        marks = ours.mark_point(filled=True, size=75, opacity=1, aria=False)
        marks = marks.encode(x=x, y=label, color=color, tooltip=tooltip, shape=shape)
    layers = [
        marks,
        pruned.transform_filter("datum.hollow")
        .mark_point(shape="diamond", size=75, strokeWidth=1.6, aria=False)
        .encode(x=x, y=label, color=color, tooltip=tooltip),
        pruned.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.6, aria=False)
        .encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=label,
                color=alt.value(_expr("ink"))),
    ]  # fmt: skip
    if dense:
        text = reference.mark_text(baseline="bottom", dy=-3, fontSize=11, aria=False).encode(
            x=x, y=alt.value(0), text="text:N", color=alt.value(_expr("muted"))
        )
        rule = reference.mark_rule(strokeDash=[4, 3], color=_expr("ink"), aria=False).encode(x=x)
        layers = [rule, text, *layers]
    # an invisible mark carries the axis of values on the right
    values = pruned.mark_point(opacity=0, aria=False).encode(x=x, y=_line_axis(2, "right", 160))
    independent = alt.Resolve(axis={"y": "independent"})
    chart = alt.layer(alt.layer(*layers), values, resolve=independent)
    return _finish(chart, height={"step": 20})


def _line_axis(part: int, orient: Any, limit: Any) -> Any:
    """Return the axis of the lines that shows a part of their key: the label or the value."""
    import altair as alt

    axis = alt.Axis(
        orient=orient, domain=False, ticks=False, grid=False, labelLimit=limit, labelPadding=8,
        labelExpr=f"split(datum.label, '{SEPARATOR}')[{part}]",
    )  # fmt: skip
    return alt.Y("key:N", title=None, sort=alt.EncodingSortField("order", op="min"), axis=axis)


# ---------------------------------------------------------------- layers, learning


@_specification
def layer_map(title: str, *, log: bool, number_format: str) -> Spec:
    """Draw a quantity of one run: modules downwards, blocks to the right.

    Rows need `module`, `block`, `value`, `low` and `high`, the ends of the run's own scale.
    """
    import altair as alt

    end = "data('rows')[0]"
    scale = alt.Scale(
        scheme="viridis", type="log" if log else "linear",
        domainMin=_expr(f"{end}.low"), domainMax=_expr(f"{end}.high"),
    )  # fmt: skip
    legend = alt.Legend(
        title=title, direction="horizontal", gradientLength=_expr("narrow ? 160 : 260"),
        format=number_format, tickCount=_expr("narrow ? 2 : 4"),
    )  # fmt: skip
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("module:N", title=None, sort=None, axis=alt.Axis(labelLimit=150)),
        tooltip=[
            alt.Tooltip("module:N"), alt.Tooltip("block:O"),
            alt.Tooltip("value:Q", format=number_format, title=title),
        ],
    )  # fmt: skip
    missing = base.transform_filter("!isValid(datum.value)")
    return _finish(
        alt.layer(
            missing.mark_rect(color=_expr("front"), aria=False),
            base.transform_filter("isValid(datum.value)")
            .mark_rect(aria=False)
            .encode(color=alt.Color("value:Q", scale=scale, legend=legend)),
        ),
        height={"step": 20},
    )


@_specification
def learning_curves() -> Spec:
    """Draw held-out perplexities, on a log scale, against tokens; one line a training.

    Rows need `training`, `step`, `tokens` and `value`.
    """
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("tokens:Q", title="tokens learned from", axis=alt.Axis(format="~s", grid=False)),
        y=alt.Y(
            "value:Q", title="held-out perplexity, log scale; lower is better",
            scale=_open_scale(log=True),
            axis=alt.Axis(format=metric_format("token_ppl"), tickCount=6),
        ),
        color=alt.Color("training:N", sort=None, legend=alt.Legend(title=None, columns=1)),
        tooltip=[
            alt.Tooltip("training:N"), alt.Tooltip("step:Q"),
            alt.Tooltip("tokens:Q", format=","),
            alt.Tooltip("value:Q", format=".4~g", title="held-out perplexity"),
        ],
    )  # fmt: skip
    return _finish(
        alt.layer(
            base.mark_line(strokeWidth=1.6, aria=False),
            base.mark_point(filled=True, size=45, opacity=1, aria=False).encode(
                shape=alt.Shape("training:N", sort=None, legend=None)
            ),
        ),
        height=300,
    )
