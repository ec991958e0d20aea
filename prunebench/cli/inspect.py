"""`prunebench inspect`: what a checkpoint holds, read from its files tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.console import wide_console
from prunebench.errors import MissingResource


def inspect_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of safetensors.")],
    sparsity: Annotated[
        str | None,
        typer.Option(help="N:M to check every group against. (default: 2:4 where it divides)"),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every matrix, not only the pruned.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the sparsity of a checkpoint, layer by layer, and whether its N:M pattern holds."""
    if not checkpoint.is_dir():
        raise MissingResource(f"there is no folder {checkpoint}", fix="check the path")
    from prunebench.models.inspect import inspect_checkpoint
    from prunebench.sparsity import Sparsity

    pattern = Sparsity.parse(sparsity or "2:4")
    rows = inspect_checkpoint(checkpoint, pattern)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("matrix", "shape", "dtype", "zeros", "-0.0", f"{pattern} holds"):
        grid.add_column(title, justify="left" if title in ("matrix", "dtype") else "right")
    shown = [row for row in rows if every or row.zeros > 0.01 * row.size]
    for row in shown:
        holds = (
            "-"
            if row.violations is None
            else "yes"
            if not row.violations
            else (
                f"no: {row.violations:,} groups, first row {row.first_violation[0]} "
                f"column {row.first_violation[1]}"
                if row.first_violation
                else "no"
            )
        )
        grid.add_row(
            row.name, " x ".join(map(str, row.shape)), row.dtype,
            f"{row.zeros / row.size:.2%}", str(row.negative_zeros), holds,
        )  # fmt: skip
    if shown:
        wide_console().print(grid)
    zeros, size = sum(row.zeros for row in shown), sum(row.size for row in shown)
    hidden = len(rows) - len(shown)
    typer.echo(
        (f"{zeros / size:.2%} of {size:,} weights in {len(shown)} matrices are zero" if shown else
         "no matrix has zeros")
        + (f"; {hidden} dense matrices are not shown (--all)" if hidden and not every else "")
    )  # fmt: skip
