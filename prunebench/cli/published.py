"""`prunebench compare --published`: what papers print, beside what was measured here."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import typer

from prunebench.cli.console import print_fitted, terminal_width
from prunebench.cli.fitting import wrapped
from prunebench.errors import MissingResource
from prunebench.results.compare import Table
from prunebench.results.published import PublishedValue, Twin, find_twins, published_values
from prunebench.results.render import MISSING, metric_name, value_text
from prunebench.results.sizes import quantization_name

_LEGEND = (
    "difference: ours minus theirs; agrees: within {ppl:.0%} of a perplexity, {acc:.0f} point of "
    "an accuracy, or two deviations over seeds. Papers' rows are no part of any ranking"
)


def compare_published(tables: Sequence[Table], *, as_json: bool) -> None:
    """Print every published value that one of our cells can stand beside.

    Raises:
        MissingResource: There is none; what papers have for these models is named.
    """
    twins = find_twins(tables)
    if not twins:
        raise _none(tables)
    if as_json:
        typer.echo(json.dumps([twin_record(twin) for twin in twins], indent=1))
    else:
        print_twins(twins, legend=_LEGEND.format(ppl=0.02, acc=1))


def twin_record(twin: Twin) -> dict[str, object]:
    """Return a pair as JSON holds it."""
    return {
        **dataclasses.asdict(twin.published),
        "ours": twin.mean,
        "ours_std": twin.error,
        "result_ids": list(twin.cell.result_ids),
        "difference": twin.difference,
        "tolerance": twin.tolerance,
        "verdict": twin.verdict,
    }


def print_twins(twins: Sequence[Twin], *, legend: str, title: str = "published") -> None:
    """Print pairs of values, a table for every model, score and calibration of ours.

    Args:
        twins: The pairs.
        legend: What the difference and the verdict mean.
        title: What stands against ours.
    """
    width = terminal_width()
    numbers = ("ours", "theirs", "difference")
    for head, of_head in itertools.groupby(sorted(twins, key=_head), key=_head):
        for line in wrapped([*head, title], width, indent="  "):
            typer.secho(line, bold=True)
        rows = [
            [
                _method(twin.published),
                _target(twin.published),
                _with_error(twin.published.metric, twin.mean, twin.error),
                _with_error(twin.published.metric, twin.published.value, twin.published.std),
                difference_text(twin), twin.verdict, _source(twin.published),
            ]
            for twin in of_head
        ]  # fmt: skip
        print_fitted(
            ["method", "sparsity", *numbers, "verdict", "source"], rows, right=numbers,
            unbroken=("method", "sparsity", *numbers, "verdict"),
            colors={"agrees": "green", "better": "cyan", "worse": "red"},
        )  # fmt: skip
        typer.echo("")
    for line in wrapped([legend], width):
        typer.secho(line, dim=True)


def _head(twin: Twin) -> tuple[str, ...]:
    """Return what the rows of one table share."""
    value = twin.published
    calibration = _calibration(twin)
    return (
        value.model,
        f"{metric_name(value.metric)} on {value.protocol}",
        *([f"ours calibrated on {calibration}"] if calibration != MISSING else []),
    )


def _source(value: PublishedValue) -> str:
    return value.source + (f" ({value.note})" if value.note else "")


def difference_text(twin: Twin) -> str:
    """Return `+1.2%` of a perplexity, `-0.4 points` of an accuracy."""
    if twin.published.metric == "token_ppl":
        return f"{twin.difference:+.1%}"
    return f"{100 * twin.difference:+.1f} points"


def _method(value: PublishedValue) -> str:
    return value.method if value.allocation == "uniform" else f"{value.method}, {value.allocation}"


def _target(value: PublishedValue) -> str:
    """Return `2:4`, `INT4` or `2:4 + INT4`; nothing is asked of the dense model."""
    sparsity = value.sparsity if value.sparsity != "0" else ""
    codes = quantization_name(value.bits) if value.bits else ""
    return " + ".join(filter(None, (sparsity, codes))) or MISSING


def _with_error(metric: str, value: float, error: float | None) -> str:
    text = value_text(metric, value)
    return text if error is None else f"{text} ± {value_text(metric, error).removesuffix('%')}"


def _calibration(twin: Twin) -> str:
    settings = twin.cell.settings
    if settings["calibration"] is None:
        return MISSING
    samples, seqlen = settings["calibration_samples"], settings["seqlen"]
    return f"{samples} x {seqlen} of {settings['calibration']}"


def _none(tables: Sequence[Table]) -> MissingResource:
    models = [table.model for table in tables]
    published = {value.model for value in published_values()}
    covered = [model for model in models if model in published]
    if not covered:
        return MissingResource(
            f"no paper has a value for {', '.join(models)}",
            where=f"papers have values for {', '.join(sorted(published))}",
            fix="run one of these, for example prunebench sweep recipes/wanda.toml model=opt-125m",
        )
    protocols = sorted({v.protocol for v in published_values() if v.model in covered})
    return MissingResource(
        f"no result of {', '.join(covered)} has the protocol of a paper, its method and sparsity",
        where=f"papers use {', '.join(protocols)}",
        fix="score with --ppl wikitext2 --ppl-seqlen 2048, or --tasks wanda7 without --limit",
    )
