"""`prunebench check`: does a pruning method keep its contract?"""

from __future__ import annotations

from typing import Annotated

import typer

from prunebench.cli.console import print_hanging
from prunebench.errors import CheckFailed


def check_command(
    method: Annotated[str, typer.Argument(help="A method's name, or module:Class.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method."),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help="A sparsity that it should reach; may be repeated."),
    ] = None,
    all_architectures: Annotated[
        bool, typer.Option("--all", help="On every architecture, not only three.")
    ] = False,
) -> None:
    """Run the public contract of a pruner on tiny random models."""
    from prunebench.pruners import METHODS
    from prunebench.run_options import read_options
    from prunebench.testing import ARCHITECTURES, check_pruner

    options = METHODS.resolve_options(method, read_options(set_ or []), seed=0)
    pruner = METHODS.make(method, options)
    scope = {"architectures": ARCHITECTURES} if all_architectures else {}
    if sparsity:
        scope["sparsities"] = tuple(sparsity)
    outcomes = check_pruner(pruner, **scope)
    for outcome in outcomes:
        mark = "ok    " if outcome.passed else "FAILED"
        typer.echo(f"{mark}  {outcome.model:<10}  {outcome.check}")
        if outcome.failure:
            print_hanging("        ", outcome.failure)
    failed = sum(not outcome.passed for outcome in outcomes)
    if failed:
        raise CheckFailed(
            f"{method} fails {failed} of {len(outcomes)} checks",
            fix="see prunebench.pruners.layer.Pruner for what a method must keep",
        )
    typer.echo(f"{method} passes all {len(outcomes)} checks")
