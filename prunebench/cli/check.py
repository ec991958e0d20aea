"""`prunebench check`: does a pruning method or a recoverer keep its contract?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunebench.errors import CheckFailed


def check_command(
    method: Annotated[
        str, typer.Argument(help="A method's name, module:Class, or recover:NAME for a recoverer.")
    ],
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
    """Run the public contract of a pruner or recoverer on tiny random models."""
    from prunebench.run_options import read_options
    from prunebench.testing import ARCHITECTURES

    scope: dict[str, Any] = {"architectures": ARCHITECTURES} if all_architectures else {}
    if sparsity:
        scope["sparsities"] = tuple(sparsity)
    outcomes = _outcomes(method, read_options(set_ or []), scope)
    for outcome in outcomes:
        mark = "ok    " if outcome.passed else "FAILED"
        typer.echo(f"{mark}  {outcome.model:<10}  {outcome.check}")
        if outcome.failure:
            typer.echo(f"        {outcome.failure}")
    failed = sum(not outcome.passed for outcome in outcomes)
    if failed:
        raise CheckFailed(
            f"{method} fails {failed} of {len(outcomes)} checks",
            fix="see prunebench.plugin for what it must keep",
        )
    typer.echo(f"{method} passes all {len(outcomes)} checks")


def _outcomes(name: str, given: dict[str, Any], scope: dict[str, Any]) -> list[Any]:
    """Return the outcomes of the checks of a method, or of a recoverer (`recover:NAME`)."""
    from prunebench.pruners import METHODS
    from prunebench.recovery import RECOVERERS
    from prunebench.testing import check_pruner, check_recoverer

    kind, _, recoverer = name.partition(":")
    if kind != "recover":
        return check_pruner(
            METHODS.make(name, METHODS.resolve_options(name, given, seed=0)), **scope
        )
    # as in `run`, its options may be written with their prefix
    options = {key.removeprefix("recover."): value for key, value in given.items()}
    resolved = RECOVERERS.resolve_options(recoverer, options, seed=0)
    return check_recoverer(RECOVERERS.make(recoverer, resolved), **scope)
