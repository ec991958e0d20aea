"""`prunebench compare --published`: what papers print, beside what was measured here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import typer

from prunebench.cli.console import wide_console
from prunebench.errors import MissingResource
from prunebench.results.compare import Table
from prunebench.results.published import PublishedValue, Twin, find_twins, published_values
from prunebench.results.render import MISSING, value_text

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
    """Print pairs of values as a table a model; `title` is what stands against ours."""
    import rich.box
    import rich.table
    from rich.text import Text

    console = wide_console()
    colors = {"agrees": "green", "better": "cyan", "worse": "red"}
    for model in dict.fromkeys(twin.published.model for twin in twins):
        grid = rich.table.Table(
            title=f"{model}, {title}",
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, column in enumerate(
            ("method", "sparsity", "score", "ours", "theirs", "difference", "verdict", "source")
        ):
            grid.add_column(column, justify="right" if 3 <= i <= 5 else "left", overflow="fold")
        grid.add_column("our calibration", overflow="fold")
        for twin in (t for t in twins if t.published.model == model):
            value = twin.published
            grid.add_row(
                _method(value),
                value.sparsity if value.method != "dense" else MISSING,
                f"{'ppl' if value.metric == 'token_ppl' else value.metric} {value.protocol}",
                _with_error(value.metric, twin.mean, twin.error),
                _with_error(value.metric, value.value, value.std),
                difference_text(twin),
                Text(twin.verdict, colors[twin.verdict]),
                value.source + (f" ({value.note})" if value.note else ""),
                _calibration(twin),
            )
        console.print(grid)
    console.print(Text(legend, style="dim"))


def difference_text(twin: Twin) -> str:
    """Return `+1.2%` of a perplexity, `-0.4 points` of an accuracy."""
    if twin.published.metric == "token_ppl":
        return f"{twin.difference:+.1%}"
    return f"{100 * twin.difference:+.1f} points"


def _method(value: PublishedValue) -> str:
    return value.method if value.allocation == "uniform" else f"{value.method}, {value.allocation}"


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
