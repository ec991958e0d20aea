"""`prunebench inspect`: what a checkpoint holds, read from its files piece by piece."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.console import wide_console
from prunebench.errors import CheckFailed, MissingResource, PrunebenchError, UsageError
from prunebench.sparsity import Sparsity

if TYPE_CHECKING:
    from prunebench.checkpoints.inspect import TensorFacts, Totals

_NAMED = 3  # so many of the matrices that are left out are named


def inspect_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder of safetensors (shards too), one .safetensors file, or a model that was "
            "fetched before.",
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Option(
            help="N:M that every pruned matrix must keep: exit code 6 if one breaks it. "
            "(default: 2:4 is shown, and not asked for)",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every matrix, not only the pruned ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the sparsity of a checkpoint, matrix by matrix, and whether its N:M pattern holds.

    Nothing is loaded whole: the files are read in pieces of 16 MB. A matrix counts as pruned if
    more than 10% of it is zero. Every tensor that holds NaN or infinity is shown, whatever it is,
    and ends with exit code 6.
    """
    sparsity = Sparsity.parse(pattern or "2:4")
    if not sparsity.is_pattern:
        raise UsageError(f"--pattern {pattern} is not N:M", fix="as in --pattern 2:4")
    path = _find(checkpoint)
    from prunebench.checkpoints.inspect import (
        Totals,
        checkpoint_tensors,
        inspect_tensors,
        unreadable,
    )
    from prunebench.checkpoints.packed24 import dense_tensors, kind_of

    kind = kind_of(path)
    # packed formats are expanded piece by piece; the pattern is checked on the dense weights
    tensors = (checkpoint_tensors if kind == "dense" else dense_tensors)(path).values()
    rows, unread = inspect_tensors(tensors, sparsity), unreadable(tensors)
    matrices = [row for row in rows if len(row.shape) >= 2]
    shown = [row for row in matrices if every or row.is_pruned]
    # also of norms and biases, which no pattern concerns
    bad = [row for row in rows if row.non_finite]
    totals = Totals.of(shown)
    if as_json:
        document = {"pattern": str(sparsity), "stored": kind, **_document(rows), "unread": unread}
        typer.echo(json.dumps(document, indent=1))
    else:
        _print_rows([row for row in rows if row in shown or row in bad], sparsity)
        left_out = [row.name for row in matrices if row not in shown and row not in bad]
        for line in _summary(totals, sparsity, left_out):
            typer.echo(line)
        if kind != "dense":
            typer.echo(f"stored as {kind}; shown as the dense weights that it holds")
        for name, dtype in unread.items():
            typer.echo(f"not looked into: {name}, torch has no {dtype}")
    _require_finite(bad)
    if pattern is not None:
        _require_pattern(shown, sparsity)


def _document(rows: Sequence[TensorFacts]) -> dict[str, object]:
    """Return what is printed as JSON of the tensors."""
    from prunebench.checkpoints.inspect import Totals

    matrices = [row for row in rows if len(row.shape) >= 2]
    return {
        "pruned": dataclasses.asdict(Totals.of([row for row in matrices if row.is_pruned])),
        "all": dataclasses.asdict(Totals.of(matrices)),
        "non_finite": {row.name: row.non_finite for row in rows if row.non_finite},
        "tensors": [dataclasses.asdict(row) for row in rows],
    }


def _find(name: str) -> Path:
    """Return the folder or file of a checkpoint that is on this machine."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from prunebench.models.source import find_model, local_path

    try:
        local = local_path(find_model(name))
    except PrunebenchError:
        raise MissingResource(
            f"there is no folder or file {name}",
            where="it is no model of prunebench list models either",
            fix="check the path",
        ) from None
    if local is None:
        raise MissingResource(
            f"{name} is not on this machine", fix=f"run prunebench models fetch {name}"
        )
    return local


def _print_rows(rows: Sequence[TensorFacts], pattern: Sparsity) -> None:
    import rich.box
    from rich.table import Table

    if not rows:
        return
    grid = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for title in ("matrix", "shape", "dtype", "zeros", "-0.0", "not finite", f"{pattern} holds"):
        grid.add_column(title, justify="left" if title in ("matrix", "dtype") else "right")
    for row in rows:
        grid.add_row(
            row.name, " x ".join(map(str, row.shape)), row.dtype, f"{row.zeros / row.size:.2%}",
            f"{row.negative_zeros:,}", f"{row.non_finite:,}", _verdict(row),
        )  # fmt: skip
    wide_console().print(grid)


def _verdict(row: TensorFacts) -> str:
    if row.violations is None:
        return "-"
    if row.first_violation is not None:
        return f"no: {row.violations:,} groups, first {_place(row)}"
    # GPT-2's Conv1D stores [in, out]: there, groups run down the rows
    return "yes" if row.axis == -1 else "yes, stored as [in, out]"


def _place(row: TensorFacts) -> str:
    """Return the place of the first broken group: `row 3, column 8`, for experts `[1, 3, 8]`."""
    index = row.first_violation or ()
    if len(index) == 2:
        return f"at row {index[0]}, column {index[1]}"
    return f"at {list(index)}"


def _summary(totals: Totals, pattern: Sparsity, left_out: Sequence[str]) -> list[str]:
    if totals.tensors:
        lines = [
            f"{totals.zeros / totals.size:.2%} of {totals.size:,} weights in {totals.tensors} "
            f"matrices are zero, {totals.negative_zeros:,} of them -0.0",
            f"{pattern} holds in {totals.tensors - totals.broken} of {totals.tensors} matrices",
        ]
    else:
        lines = ["no matrix is pruned"]
    if left_out:
        names = ", ".join(left_out[:_NAMED]) + (", ..." if len(left_out) > _NAMED else "")
        lines.append(f"not shown (--all), under 10% zeros: {len(left_out)} matrices: {names}")
    return lines


def _require_finite(bad: Sequence[TensorFacts]) -> None:
    """Raise `CheckFailed` if a tensor holds NaN or infinity; `bad` are those that do."""
    if bad:
        names = ", ".join(f"{row.name} ({row.non_finite:,})" for row in bad[:_NAMED])
        raise CheckFailed(
            f"NaN or infinity in {len(bad)} tensors, {sum(row.non_finite for row in bad):,} in all"
            if len(bad) > 1
            else f"NaN or infinity in {bad[0].name}",
            where=names + (", ..." if len(bad) > _NAMED else ""),
            fix="copy or download the checkpoint again, or make it again",
        )


def _require_pattern(rows: Sequence[TensorFacts], pattern: Sparsity) -> None:
    """Raise `CheckFailed` unless there are pruned matrices and all keep the pattern."""
    if not rows:
        raise CheckFailed(f"{pattern} does not hold: no matrix is pruned")
    broken = [row for row in rows if not row.holds]
    if broken:
        first = broken[0]
        raise CheckFailed(
            f"{pattern} does not hold in {len(broken)} of {len(rows)} matrices",
            where=f"the first is {first.name}: "
            + (
                f"{first.violations:,} groups, the first {_place(first)}"
                if first.violations
                else f"its width {first.shape[-1]} is not divisible by {pattern.group}"
            ),
        )
