"""The page: the data and the specifications that its script works on, and the template filled."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from prunebench.results.render import column_title, legend, score_title, value_text
from prunebench.results.report import charts
from prunebench.results.report.data import ModelPart, Report, Row, held_out_score, machine_name
from prunebench.results.report.heat import HeatMap, HeatRun, loss_range, ratio_range
from prunebench.results.report.libraries import charts_script, table_script
from prunebench.results.report.payload import (
    COSTS,
    Fields,
    clean,
    cost_fields,
    in_range,
    published_rows,
    row_fields,
    scale_of,
    score_fields,
)
from prunebench.results.report.specification import Spec, metric_format, value_title
from prunebench.results.report.theme import THEMES, theme_params, vega_config
from prunebench.results.schema import Result

MAX_CURVES = 8  # more lines than these cannot be distinguished in one chart
ERRORS = "Error bars: deviation over seeds, of a single accuracy the standard error."
LAYER_TITLES = {"ratio": "Realised sparsity", "loss": "Reconstruction loss"}


def render_page(report: Report) -> str:
    """Return the page as HTML, the same bytes for the same report.

    Raises:
        MissingResource: The installed itables has no table that a page can use.
    """
    import jinja2

    # StrictUndefined: a name that the template misspells is an error, not an empty text
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    scripts = [charts_script(), table_script(), _file("page.js")]
    models = report.models
    title = f"Pruning {models[0].table.model}" if len(models) == 1 else "Pruned language models"
    return environment.from_string(_file("page.html")).render(
        report=report,
        title=f"{clean(title)}: prunebench report",
        findings=[(clean(part.finding), clean(f"{part.caption}.")) for part in models],
        style=_file("page.css"),
        scripts=scripts,
        # the page's Content-Security-Policy lets only the scripts with these hashes run
        script_hashes=" ".join(map(_script_hash, scripts)),
        themes=THEMES,
        data=_embedded(page_data(report)),
    )


def page_data(report: Report) -> dict[str, Any]:
    """Return all that the page's script reads."""
    texts: dict[str, int] = {}
    models = [_model(part, texts) for part in report.models]
    return {
        "models": models,
        "methods": list(map(clean, report.methods)),
        "charts": _charts(report),
        "against": {name: title for name, (title, _) in charts.X_AXES.items()},
        "errors": ERRORS,
        "layerTitles": LAYER_TITLES,
        "maxCurves": MAX_CURVES,
        "themes": {
            name: {"config": vega_config(name), "params": theme_params(name)} for name in THEMES
        },
        "facts": _SHARED,
        "texts": list(texts),
    }


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _script_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(data: Any) -> str:
    """Return JSON for a script element: no character in it begins a tag."""
    # allow_nan: a NaN that slipped through would break the page in the browser, not here
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# ---------------------------------------------------------------- charts


def metric_key(part: ModelPart, column: str) -> str:
    """Return what columns share that are drawn by one specification."""
    metric = column.partition(" ")[0]
    higher = _scores(part, column)[0].higher_is_better
    return f"{metric}/{'log' if scale_of(part, column).log else 'linear'}/{'+' if higher else '-'}"


def _scores(part: ModelPart, column: str) -> list[Any]:
    return [row.cell.scores[column] for row in part.rows if column in row.cell.scores]


def axes_of(part: ModelPart) -> list[str]:
    """Return what quality can be set against: zeros and bytes, and speed where any is there."""
    benches = [row.cell.bench for row in part.rows if row.cell.bench]
    present = {
        "zeros": True,
        "size": any(row.cell.size for row in part.rows if row.cell.method != "dense"),
        "decode": any(bench.decode for bench in benches),
        "prefill": any(bench.prefill for bench in benches),
    }
    return [name for name in charts.X_AXES if present[name]]


def _charts(report: Report) -> dict[str, Any]:
    methods = tuple(map(clean, report.methods))
    trade_off: dict[str, dict[str, Spec]] = {}
    lines: dict[str, Spec] = {}
    for part in report.models:
        for column in part.table.columns:
            key = metric_key(part, column)
            for against in axes_of(part):
                spec = trade_off_spec(key, methods, against)
                trade_off.setdefault(key, {})[against] = spec
            lines[key] = lines_spec(key, methods)
    with_loss = any(run.losses for part in report.models if part.heat for run in part.heat.runs)
    return {
        "tradeOff": trade_off,
        "lines": lines,
        "costs": {
            name: {
                "title": title.partition(" in ")[0].capitalize(),
                "spec": cost_spec(name, methods),
            }
            for name, (title, _, _) in COSTS.items()
            if any(name in cost_fields(cost) for part in report.models for cost in part.costs)
        },
        "curves": charts.learning_curves() if any(p.curves for p in report.models) else None,
        "layers": {
            name: layer_spec(name)
            for name in LAYER_TITLES
            if any(part.heat for part in report.models) and (name == "ratio" or with_loss)
        },
    }


def trade_off_spec(key: str, methods: tuple[str, ...], against: str) -> Spec:
    """Return the specification of quality against zeros, bytes or speed."""
    metric, scale, sign = key.split("/")
    return charts.trade_off(
        metric, methods, against=against, log=scale == "log", higher_is_better=sign == "+"
    )


def lines_spec(key: str, methods: tuple[str, ...]) -> Spec:
    """Return the specification of a score with one line a row."""
    metric, scale, sign = key.split("/")
    title = value_title(metric, log=scale == "log", higher_is_better=sign == "+")
    return charts.lines(title, methods, log=scale == "log", number_format=metric_format(metric))


def cost_spec(quantity: str, methods: tuple[str, ...]) -> Spec:
    """Return the specification of a chart of cost."""
    _, unit, log = COSTS[quantity]
    return charts.lines(
        f"{unit}; lower is better", methods, log=log, bars=not log, dense=False,
        number_format=",.4~g",
    )  # fmt: skip


def layer_spec(quantity: str) -> Spec:
    """Return the specification of a heat map."""
    title = {"ratio": "share of zeros", "loss": "loss, log scale"}[quantity]
    return charts.layer_map(
        title, log=quantity == "loss", number_format=".1%" if quantity == "ratio" else ".3~g"
    )


# ---------------------------------------------------------------- data


def _model(part: ModelPart, texts: dict[str, int]) -> dict[str, Any]:
    columns = part.table.columns
    scales = {column: scale_of(part, column) for column in columns}
    scores = {
        column: {
            row.anchor: score_fields(row, row.cell.scores[column], scales[column])
            for row in part.rows
            if column in row.cell.scores
        }
        for column in columns
    }
    protocols = part.protocols
    explained = [f"{short} = {long}" for long, short in protocols.items() if short != long]
    note = "; ".join([legend([part.table]), *explained])
    return {
        "name": clean(part.table.model),
        "column": part.column,
        "columns": [
            {
                "key": key, "title": clean(score_title(key, protocols)),
                "id": clean(column_title(key)), "metric": metric_key(part, key),
            }
            for key in columns
        ],
        "note": clean(f"{note[:1].upper()}{note[1:]}."),
        "rows": [row_fields(row) for row in part.rows],
        "scores": scores,
        "published": {
            column: rows
            for column in columns
            if (rows := published_rows(part, column, first=len(part.rows)))
        },
        "twins": _twins(part),
        "machines": sorted({cost.machine for cost in part.costs}),
        "costs": [cost_fields(cost) for cost in part.costs],
        "curves": [
            {
                "id": curve.row.anchor, "method": clean(curve.row.cell.method),
                "training": clean(curve.name),
                "points": [[p.step, p.tokens, held_out_score(p)] for p in curve.points],
            }
            for curve in part.curves
        ],
        "heat": _heat(part.heat) if part.heat else None,
        "runs": {
            row.anchor: [_provenance(row, result, texts) for result in row.results]
            for row in part.rows
        },
    }  # fmt: skip


def _twins(part: ModelPart) -> list[Fields]:
    rows = []
    for twin in part.twins:
        value = twin.published
        relative = value.metric == "token_ppl"
        difference = (
            f"{twin.difference:+.1%}" if relative else f"{100 * twin.difference:+.1f} points"
        )
        theirs = value_text(value.metric, value.value)
        column = f"{value.metric} {value.protocol}"
        rows.append(
            {
                "method": clean(value.method), "sparsity": value.sparsity,
                "score": clean(score_title(column, part.protocols)),
                "id": clean(column_title(column)), "theirs": theirs,
                "ours": value_text(value.metric, twin.mean), "difference": difference,
                "verdict": twin.verdict, "source": value.source,
            }
        )  # fmt: skip
    return rows


def _heat(heat: HeatMap) -> dict[str, Any]:
    # a run with two telling maps is shown first: one with a loss, and layers that differ
    chosen = max(range(len(heat.runs)), key=lambda i: (_tells(heat.runs[i]), -i))
    return {
        "modules": list(map(clean, heat.modules)),
        "blocks": list(heat.blocks),
        "chosen": chosen,
        "leftOut": heat.left_out,
        "runs": [_heat_run(run) for run in heat.runs],
    }


def _tells(run: HeatRun) -> tuple[bool, bool]:
    ratios = [value for value in run.ratios if value is not None]
    return bool(run.losses), max(ratios) - min(ratios) > 0.01


def _heat_run(run: HeatRun) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": run.anchor, "name": clean(run.name)}
    quantities: Sequence[tuple[str, Sequence[float | None], tuple[float, float] | None, int]] = (
        ("ratio", run.ratios, ratio_range(run), 4),
        ("loss", run.losses, loss_range(run), 3),
    )
    for name, values, ends, digits in quantities:
        if ends:
            inside = [in_range(value, ends) for value in values]
            fields[name] = {
                "ends": list(ends),
                "values": [None if v is None else float(f"{v:.{digits}g}") for v in inside],
            }
    return fields


# ---------------------------------------------------------------- provenance


_SHARED = (
    "hardware", "software", "method", "model revision", "hash of the dense weights", "calibration",
    "hash of the calibration tokens",
)  # fmt: skip
"""Facts that many results have in common: a result holds their places in `texts`."""


def _provenance(row: Row, result: Result, texts: dict[str, int]) -> list[Any]:
    """Return all that a reader needs to repeat a run, and to know that it is the same one."""
    software = result.software
    libraries = [f"torch {software.torch}", f"transformers {software.transformers}"]
    if software.lm_eval:
        libraries.append(f"lm-eval {software.lm_eval}")
    facts = {
        "hardware": machine_name(result),
        "software": f"prunebench {software.prunebench}, python {software.python}, "
        + ", ".join(libraries),
    }
    if result.method:
        facts["method"] = f"{result.method.implementation}, {result.method.version}"
    if result.model:
        facts["model revision"] = f"{result.model.commit} ({result.model.source})"
        facts["hash of the dense weights"] = result.model.dense_sha256
    if result.calibration:
        calibration = result.calibration
        facts["calibration"] = (
            f"{calibration.text} from {calibration.origin}, {calibration.samples} x "
            f"{calibration.seqlen} tokens, seed {calibration.seed}"
        )
        facts["hash of the calibration tokens"] = calibration.tokens_sha256
    places = [
        texts.setdefault(clean(facts[name]), len(texts)) if name in facts else None
        for name in _SHARED
    ]
    scores = {
        f"{score.metric} {score.protocol}": value_text(score.metric, score.value)
        for score in result.scores
    }
    # a list, without names: there may be thousands of them
    return [
        result.id,
        result.spec.seed,
        clean(result.command),
        int(result.id in row.counted),
        result.created_at,
        result.spec_id,
        result.model.evaluated_sha256 if result.model else None,
        [texts.setdefault(clean(column_title(column)), len(texts)) for column in scores],
        list(scores.values()),
        places,
    ]
