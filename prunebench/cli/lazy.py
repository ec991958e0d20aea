"""Commands whose module is imported when they are called, helped or completed, not before."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from prunebench.cli.exit_codes import guarded


class LazyCommand(TyperCommand):
    """The name and summary of a command, as the list of commands shows them.

    Args:
        name: The command's name.
        target: `module:attribute` below `prunebench.cli`: a function, or the Typer app of a group.
        summary: The first paragraph of the command's help.
    """

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name=name, help=summary)
        self._target = target

    @functools.cached_property
    def command(self) -> Any:
        """The command itself: a `TyperCommand`, or the `TyperGroup` of a group."""
        module, _, attribute = self._target.partition(":")
        target = getattr(importlib.import_module(f"prunebench.cli.{module}"), attribute)
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(self.name)(guarded(target))
            target = app
        command = get_command(target)
        # the name of the function, or of the app's group, would stand in the usage line
        command.name = self.name
        return command


class LazyGroup(TyperGroup):
    """A group that holds `LazyCommand`s, and resolves only the one that is used."""

    commands_by_name: Mapping[str, tuple[str, str]] = {}
    """Target and summary of each command, in the order of `--help`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (target, summary) in self.commands_by_name.items():
            # all commands are listed from these stand-ins, so that --help imports none
            self.commands[name] = LazyCommand(name, target, summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and remaining arguments; here the module is imported."""
        # click completes and prints help from what this returns: the real command with its options
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.command if isinstance(command, LazyCommand) else command, rest
