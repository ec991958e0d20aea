"""From the options that fields declare to parameters of a Typer command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from prunebench.options import FieldOption

RUN, KEEP, PLACE = "What is run", "What is kept", "How it is run"
_PANELS = {"method": RUN, "data": RUN, "evaluation": RUN, "output": KEEP, "placement": PLACE}
Command = TypeVar("Command", bound=Callable[..., None])


def takes_options(options: Iterable[FieldOption]) -> Callable[[Command], Command]:
    """Give a command a parameter for each option, after its context; they arrive as keywords.

    The command declares its own flags as usual, and ends with `**values`.
    """

    def decorate(command: Command) -> Command:
        # annotations are strings under `from __future__ import annotations`; Typer reads them from
        # the signature
        signature = inspect.signature(command, eval_str=True)
        context, *declared = signature.parameters.values()
        declared = [
            parameter
            for parameter in declared
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        derived = [parameter_of(option) for option in options]
        parameters = [
            # a parameter without default may follow one with a default only if both are keywords
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*derived, *declared)
        ]
        # `inspect.signature`, and so Typer, prefers __signature__ to the function's code
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[context, *parameters]
        )
        return command

    return decorate


def parameter_of(option: FieldOption) -> inspect.Parameter:
    """Return the parameter of an option; it is None (or False) where it is not given."""
    several = option.kind is tuple or option.about.repeated
    kind: Any = list[str] if several else option.kind
    info = typer.Option(
        option.flag,
        *option.about.flags,
        help=option.help_text,
        metavar=option.about.metavar,
        envvar=option.variable,
        show_envvar=False,
        show_default=False,
        min=option.least,
        rich_help_panel=_PANELS[option.about.role],
    )
    # None where a recipe may set it: its source (flag, recipe, default) decides in `collect`
    default = option.value if option.kind is Path else None
    if option.kind is bool and not option.about.recipe:
        default = option.value
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if default is None else kind, info],
    )
