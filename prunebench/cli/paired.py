"""`prunebench compare --paired A B`: two runs item by item, and whether they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import typer

from prunebench.cli.console import print_fitted
from prunebench.cli.exit_codes import say
from prunebench.errors import IncompatibleData, UsageError, nearest
from prunebench.results.names import short_names, short_protocol
from prunebench.results.paired import LEVEL, RESAMPLES, Comparison, Pairing, pair, read_sides
from prunebench.results.render import MISSING, metric_name, number
from prunebench.results.schema import Result
from prunebench.results.selection import Selection
from prunebench.results.sizes import target_of
from prunebench.results.store import Damaged, ResultStore, read_result
from prunebench.spec import NO_RECOVERY

_KEYS = ("metric", "protocol")
_USE = "as in prunebench compare --paired 4981b998 ccb34dfc metric=acc"


def compare_paired(words: Sequence[str], *, results_dir: Path, as_json: bool) -> None:
    """Compare two results, or one with its dense model, and print which differences are noise.

    Raises:
        UsageError: Not one or two results are named, or a name is unknown or ambiguous.
        MissingResource: A run logged no samples, or nothing is selected.
        IncompatibleData: The samples are damaged, or share no item.
    """
    # a path may hold "="; only what is no file is a filter
    names = [word for word in words if "=" not in word or Path(word).is_file()]
    selection = Selection.parse([word for word in words if word not in names])
    for key in selection.filters:
        if key not in _KEYS:
            raise UsageError(f"--paired does not select by {key!r}", fix=nearest(key, _KEYS))
    if len(names) not in (1, 2):
        raise UsageError(
            f"--paired compares one or two results, {len(names)} are named",
            where="with one, it is compared with its own dense model",
            fix=_USE,
        )
    store = ResultStore(results_dir)
    paths = [store.find(name) for name in names]
    results = [_finished(path) for path in paths]
    first, dense = read_sides(paths[0])
    # the samples of a result hold both sides, its own and its dense model's
    second = read_sides(paths[1])[0] if len(paths) == 2 else dense
    # the samples do not say which direction is better; the results do
    lower = frozenset(s.metric for r in results for s in r.scores if not s.higher_is_better)
    pairing = pair(
        first,
        second,
        lower_is_better=lower,
        metrics=selection.filters.get("metric", ("*",)),
        protocols=selection.filters.get("protocol", ("*",)),
    )
    if as_json:
        _print_json(pairing, {"a": first.name, "b": second.name})
    else:
        titles = {"A": _title(results[0])}
        titles["B"] = _title(results[1]) if len(results) == 2 else "the dense model of A"
        _print_table(pairing, titles)


def _finished(path: Path) -> Result:
    result = read_result(path)
    if isinstance(result, Damaged):
        raise IncompatibleData(f"{path} is damaged", where=result.reason)
    if result.status != "ok":
        raise IncompatibleData(f"{path.stem} is a failed run: it has no scores")
    return result


def _title(result: Result) -> str:
    spec = result.spec
    name = spec.method
    if name != "dense":
        recovery = [spec.recover] if spec.recover != NO_RECOVERY else []
        allocation = [spec.allocation] if spec.allocation != "uniform" else []
        name = f"{' + '.join([name, *recovery])} {', '.join([target_of(result), *allocation])}"
    return f"{name} on {spec.model}, seed {spec.seed}, {result.id}"


def _print_json(pairing: Pairing, ids: dict[str, str]) -> None:
    rows = [dataclasses.asdict(row) for row in pairing.comparisons]
    document = {**ids, "level": LEVEL, "resamples": RESAMPLES, "comparisons": rows}
    document |= {
        "pooled": [dataclasses.asdict(row) for row in pairing.pooled],
        "unmatched": pairing.unmatched, "uncompared": pairing.uncompared,
    }  # fmt: skip
    typer.echo(json.dumps(document, indent=1))


def _print_table(pairing: Pairing, titles: dict[str, str]) -> None:
    for letter, title in titles.items():
        typer.echo(f"{letter}  {title}")
    names = short_names((row.protocol for row in pairing.comparisons), short_protocol)
    several = len(pairing.comparisons) > 1
    numbers = ["items", "A", "B", "A against B", "only A / only B right", "p"]
    numbers += ["p (Holm)"] if several else []
    rows = []
    for row in (*pairing.comparisons, *pairing.pooled):
        ps = [_p(row.p), *([_p(row.p_holm)] if several else [])]
        title = f"{metric_name(row.metric)} {names.get(row.protocol, row.protocol)}"
        rows.append([title, f"{row.items:,}", *_values(row), *ps, row.verdict])
    if rows:
        typer.echo("")
        print_fitted(
            ["score", *numbers, "verdict"], rows, right=numbers,
            unbroken=("score", "A", "B", "A against B", "verdict"),
            colors={"A better": "green", "B better": "green"},
        )  # fmt: skip
        typer.echo("")
    for line in [*_notes(pairing), *(f"{s} = {p}" for p, s in names.items() if s != p)]:
        say(line)


def _values(row: Comparison) -> tuple[str, str, str, str]:
    """Return the texts of A, B, their difference, and the items that tell them apart."""
    if row.ratio is None:
        error = "" if row.stderr is None else f" ± {100 * row.stderr:.1f}"
        points = f"{100 * row.difference:+.1f}{error} points"
        return f"{row.a:.1%}", f"{row.b:.1%}", points, f"{row.a_alone} / {row.b_alone}"
    ratio = f"{_ratio(row.ratio)}x"
    if row.ratio_low is not None and row.ratio_high is not None:
        ratio += f" [{_ratio(row.ratio_low)}, {_ratio(row.ratio_high)}]"
    return number(row.a), number(row.b), ratio, MISSING


def _ratio(value: float) -> str:
    # ratios near 1 differ in the third digit, which `number` would round away
    return f"{value:.4f}" if 0.9 < value < 1.1 else number(value)


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    # a p-value is never 0
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _notes(pairing: Pairing) -> list[str]:
    """Return what a reader should know: how it was tested, and what was left out."""
    tests = {row.test for row in pairing.comparisons}
    lines = []
    if "exact McNemar" in tests:
        lines.append("acc: difference ± its paired standard error; exact McNemar test")
    if "paired bootstrap" in tests:
        lines.append(
            f"ppl: ratio [95% interval]; paired bootstrap over windows, {RESAMPLES:,} resamples"
        )
    several = len(pairing.comparisons) > 1
    corrected = ", corrected by Holm's method for all rows shown" if several else ""
    if pairing.pooled:
        together = " and ".join(dict.fromkeys(row.protocol for row in pairing.pooled))
        lines.append(f"{together}: all questions together, each counts alike, corrected apart")
    lines.append(f"verdict at 5%{corrected}: noise of the items, not of seeds")
    for row in pairing.comparisons:
        if row.only_a or row.only_b:
            lines.append(
                f"{row.protocol}: {row.items:,} items match, {row.only_a:,} are only in A, "
                f"{row.only_b:,} only in B"
            )
    for protocol, (a, b) in pairing.unmatched.items():
        lines.append(f"{protocol}: no item matches ({a:,} in A, {b:,} in B)")
    lines += [
        f"{column}: not compared: neither 0 or 1 nor a loss, or not finite"
        for column in pairing.uncompared
    ]
    # metrics of one protocol repeat its note; dict keeps the order
    return list(dict.fromkeys(lines))
