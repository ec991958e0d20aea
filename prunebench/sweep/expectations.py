"""The values that a recipe should reproduce: cells of a paper's table, or measured before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prunebench.errors import UsageError, nearest
from prunebench.results.published import PublishedValue, published_values
from prunebench.spec import NO_RECOVERY
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.toml_source import Kinds, RecipeSource

_NUMBER = (int, float)
_EXPECT: dict[str, Kinds] = {
    "paper": str, "table": (str, list), "tolerance": _NUMBER, "metric": str, "model": str,
    "method": str, "sparsity": (str, float, int), "allocation": str, "recover": str,
    "protocol": str, "value": _NUMBER, "source": str, "bits": int,
}  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """A value that a recipe should reproduce, and how far off it may be."""

    value: PublishedValue
    tolerance: float


def read_expectations(
    source: RecipeSource, entries: Any, cells: Sequence[RecipeCell]
) -> Iterator[Expectation]:
    """Yield the values of the `[[expect]]` tables that a cell of the recipe can meet.

    Raises:
        UsageError: A table names no known value, or no cell can meet it.
    """
    for nth, entry in enumerate(entries):
        source.check(entry, _EXPECT, "[[expect]]", nth)
        where = source.at("", "[[expect]]", nth)
        if "tolerance" not in entry:
            raise UsageError("an expectation has no tolerance", where=where, fix="tolerance = 0.02")
        values = _of_paper(entry, where) if "paper" in entry else [_measured(entry, cells, where)]
        # a paper's table is larger than most recipes: values without a cell are passed over, but
        # not all
        met = [value for value in values if any(cell.scores(value) for cell in cells)]
        if not met:
            raise UsageError(
                "an expectation that no cell of the recipe can meet",
                where=where,
                fix="check paper, table, model, method, sparsity, and the texts or tasks",
            )
        for value in met:
            yield Expectation(value, float(entry["tolerance"]))


def _of_paper(entry: dict[str, Any], where: str) -> list[PublishedValue]:
    # a published table has its own values and protocols: two sources could disagree
    wrong = set(entry) & {"value", "protocol", "allocation", "recover", "bits"}
    if wrong:
        raise UsageError(
            f"{min(wrong)!r} does not go with paper", where=where, fix="the table has the values"
        )
    values = [value for value in published_values() if value.paper == entry["paper"]]
    if not values:
        papers = {value.paper for value in published_values()}
        raise UsageError(
            f"no published value of arXiv {entry['paper']}", where=where,
            fix=nearest(entry["paper"], papers),
        )  # fmt: skip
    if "table" in entry:
        tables = [entry["table"]] if isinstance(entry["table"], str) else entry["table"]
        for name in tables:
            # beside a correct name, a mistyped one would leave its values unchecked
            if name not in {value.table for value in values}:
                raise UsageError(
                    f"arXiv {entry['paper']} has no {name!r}", where=where,
                    fix=nearest(str(name), {value.table for value in values}),
                )  # fmt: skip
        values = [value for value in values if value.table in tables]
    for key in ("method", "model", "metric", "sparsity"):
        if key in entry:
            # TOML gives sparsity = 0.5 as a number
            values = [value for value in values if getattr(value, key) == str(entry[key])]
    return values


def _measured(entry: dict[str, Any], cells: Sequence[RecipeCell], where: str) -> PublishedValue:
    missing = [key for key in ("method", "sparsity", "protocol", "value") if key not in entry]
    if missing:
        raise UsageError(
            f"an expectation has no {missing[0]!r}", where=where,
            fix="give paper (and table), or method, sparsity, protocol and value",
        )  # fmt: skip
    return PublishedValue(
        method=entry["method"],
        model=entry.get("model", cells[0].values["model"]),
        sparsity=str(entry["sparsity"]),
        allocation=entry.get("allocation", "uniform"),
        recover=entry.get("recover", NO_RECOVERY),
        bits=entry.get("bits"),
        metric=entry.get("metric", "token_ppl"),
        protocol=entry["protocol"],
        value=float(entry["value"]),
        source=entry.get("source", "this recipe"),
    )
