"""The charts of a report as Vega-Lite specifications, without their data.

A specification names two datasets, `rows` and `published`, and the parameters in `PARAMS`. The
page's script fills it with the rows that the reader's filters leave, `fill` with all of them. What
a chart has to compute from its rows (places side by side, the Pareto front) is in its
specification, so both get the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunebench.results.report.specification import (
    Spec,
    expr,
    finish,
    method_color,
    method_shape,
    metric_format,
    metric_name,
    open_scale,
    specification,
    value_title,
)

if TYPE_CHECKING:
    import altair as alt

SEPARATOR = "\u2063"  # invisible: between the id, the label and the value of a line
_DODGE = 10  # pixels between points that would hide each other
_SPREAD = 36  # pixels that they take together at most
X_AXES = {
    "zeros": ("share of zeros", "%"),
    "size": ("bytes, of the dense model's in 16 bits", "~g"),
    "decode": ("decode speed, times dense", "~g"),
    "prefill": ("prefill speed, times dense", "~g"),
}
"""What quality is set against: the title of the axis, and the format of its ticks."""


# ---------------------------------------------------------------- quality against zeros


@specification
def trade_off(
    metric: str, methods: tuple[str, ...], *, against: str, log: bool, higher_is_better: bool
) -> Spec:
    """Draw a score against zeros, size or speed, with dense, errors and the Pareto front.

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
            domainMax=expr(f"1.25 * extent(pluck(data('rows'), '{against}'))[1]"),
        ),
        axis=alt.Axis(format=x_format, tickCount=6, grid=False),
    )
    y_scale = open_scale(log=log)
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
        front.mark_line(strokeWidth=6, strokeCap="round", color=expr("front"), aria=False).encode(
            x=x, y=y, order=alt.Order(f"{against}:Q")
        ),
        *_dense_and_published(x, y, methods),
        *_points(_side_by_side(rows, against, log=log), x, y, methods, against, tooltip=tooltip,
                 log=log),
    ]  # fmt: skip
    return finish(alt.layer(*layers), height=380)


def _points(
    chart: Any, x: Any, y: Any, methods: Sequence[str], against: str, *, tooltip: Any, log: bool
) -> list[Any]:
    """Return the layers of the pruned rows: lines, errors, points, names of the best."""
    import altair as alt

    color, dodge = method_color(methods), expr("datum.dodge")
    low = alt.Y("low:Q", scale=open_scale(log=log))
    rim = alt.condition("datum.pattern", alt.value(expr("ink")), alt.value(expr("back")))
    return [
        chart.transform_filter("!datum.pattern")
        .mark_line(strokeWidth=1.4, opacity=0.7, aria=False)
        .encode(x=x, y=y, detail="series:N", color=color),
        chart.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.4, xOffset=dodge, aria=False)
        .encode(x=x, y=low, y2="high:Q", color=color),
        chart.mark_point(filled=True, opacity=1, strokeWidth=1.3, xOffset=dodge, aria=False)
        .encode(
            x=x, y=y, color=color, shape=method_shape(methods), tooltip=tooltip, stroke=rim,
            size=alt.condition("datum.beyond", alt.value(60), alt.value(90)),
        ),
        chart.transform_filter("datum.beyond")
        .mark_text(text="↑", dy=-11, xOffset=dodge, fontSize=12, aria=False)
        .encode(x=x, y=y, color=color),
        *_names_of_best(chart, x, y, against),
    ]  # fmt: skip


def _names_of_best(chart: Any, x: Any, y: Any, against: str) -> list[Any]:
    """Return the layers of the names of the best: N:M on the left of its point, others right."""
    import altair as alt

    best = (
        chart.transform_filter("datum.best && !narrow")
        .transform_calculate(point="datum.method + ' ' + datum.sparsity", side="!datum.pattern")
        # of two names that would be one on the other, the better row has its name
        .transform_window(
            below="lag(position)", beside=f"lag({against})", groupby=["side"],
            sort=[alt.SortField("position")],
        )
        .transform_filter(
            "!isValid(datum.below) || datum.position - datum.below > 0.05 * (datum.top"
            " - datum.bottom)"
            f" || abs(datum.{against} - datum.beside) > 0.25 * extent(pluck(data('rows'),"
            f" '{against}'))[1]"
        )
    )  # fmt: skip
    return [
        best.transform_filter(f"{'' if on_the_left else '!'}datum.pattern")
        .mark_text(
            align="right" if on_the_left else "left", dx=-9 if on_the_left else 9,
            dy=0 if on_the_left else 9, limit=expr("0.2 * width"), fontSize=11,
            xOffset=expr("datum.dodge"), aria=False,
        )
        .encode(x=x, y=y, text="point:N", color=alt.value(expr("ink")))
        for on_the_left in (True, False)
    ]  # fmt: skip


def _dense_and_published(x: Any, y: Any, methods: Sequence[str]) -> list[Any]:
    """Return the layers of what the rows stand beside: the dense model, values of papers."""
    import altair as alt

    dense = alt.Chart(alt.NamedData("rows")).transform_filter("datum.method == 'dense'")
    published = alt.Chart(alt.NamedData("published"))
    return [
        dense.mark_rule(strokeDash=[4, 3], color=expr("muted"), aria=False).encode(y=y),
        dense.mark_text(align="right", baseline="bottom", dx=-2, dy=-3, fontSize=11, aria=False)
        .encode(x=alt.value("width"), y=y, text="text:N", color=alt.value(expr("muted"))),
        published.mark_point(filled=False, size=70, strokeWidth=1.6, aria=False).encode(
            x=x, y=y, color=method_color(methods), shape=method_shape(methods),
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
    order: Any = "ascending" if against == "size" else "descending"
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


@specification
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
    label = _line_axis(1, "left", expr("narrow ? 130 : 250"))
    scale = alt.Scale() if bars else open_scale(log=log)
    ticks = alt.Axis(format=number_format, tickCount=expr("narrow ? 3 : 6"))
    x = alt.X("shown:Q", title=title, scale=scale, axis=ticks)
    color = method_color(methods, legend=False)
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
                color=alt.value(expr("ink"))),
    ]  # fmt: skip
    if dense:
        text = reference.mark_text(baseline="bottom", dy=-3, fontSize=11, aria=False).encode(
            x=x, y=alt.value(0), text="text:N", color=alt.value(expr("muted"))
        )
        rule = reference.mark_rule(strokeDash=[4, 3], color=expr("ink"), aria=False).encode(x=x)
        layers = [rule, text, *layers]
    # an invisible mark carries the axis of values on the right
    values = pruned.mark_point(opacity=0, aria=False).encode(x=x, y=_line_axis(2, "right", 160))
    independent = alt.Resolve(axis={"y": "independent"})
    chart = alt.layer(alt.layer(*layers), values, resolve=independent)
    return finish(chart, height={"step": 20})


def _line_axis(part: int, orient: Any, limit: Any) -> Any:
    """Return the axis of the lines that shows a part of their key: the label or the value."""
    import altair as alt

    axis = alt.Axis(
        orient=orient, domain=False, ticks=False, grid=False, labelLimit=limit, labelPadding=8,
        labelExpr=f"split(datum.label, '{SEPARATOR}')[{part}]",
    )  # fmt: skip
    return alt.Y("key:N", title=None, sort=alt.EncodingSortField("order", op="min"), axis=axis)


# ---------------------------------------------------------------- layers, learning


@specification
def layer_map(title: str, *, log: bool, number_format: str) -> Spec:
    """Draw a quantity of one run: modules downwards, blocks to the right.

    Rows need `module`, `block`, `value`, `low` and `high`, the ends of the run's own scale.
    """
    import altair as alt

    end = "data('rows')[0]"
    scale = alt.Scale(
        scheme="viridis", type="log" if log else "linear",
        domainMin=expr(f"{end}.low"), domainMax=expr(f"{end}.high"),
    )  # fmt: skip
    legend = alt.Legend(
        title=title, direction="horizontal", gradientLength=expr("narrow ? 160 : 260"),
        format=number_format, tickCount=expr("narrow ? 2 : 4"),
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
    return finish(
        alt.layer(
            missing.mark_rect(color=expr("front"), aria=False),
            base.transform_filter("isValid(datum.value)")
            .mark_rect(aria=False)
            .encode(color=alt.Color("value:Q", scale=scale, legend=legend)),
        ),
        height={"step": 20},
    )


@specification
def learning_curves() -> Spec:
    """Draw held-out perplexities, on a log scale, against tokens; one line a training.

    Rows need `training`, `step`, `tokens` and `value`.
    """
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("tokens:Q", title="tokens learned from", axis=alt.Axis(format="~s", grid=False)),
        y=alt.Y(
            "value:Q", title="held-out perplexity, log scale; lower is better",
            scale=open_scale(log=True),
            axis=alt.Axis(format=metric_format("token_ppl"), tickCount=6),
        ),
        color=alt.Color("training:N", sort=None, legend=alt.Legend(title=None, columns=1)),
        tooltip=[
            alt.Tooltip("training:N"), alt.Tooltip("step:Q"),
            alt.Tooltip("tokens:Q", format=","),
            alt.Tooltip("value:Q", format=".4~g", title="held-out perplexity"),
        ],
    )  # fmt: skip
    return finish(
        alt.layer(
            base.mark_line(strokeWidth=1.6, aria=False),
            base.mark_point(filled=True, size=45, opacity=1, aria=False).encode(
                shape=alt.Shape("training:N", sort=None, legend=None)
            ),
        ),
        height=300,
    )
