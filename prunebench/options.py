"""Metadata of run options, declared on their fields.

    seqlen: Annotated[int | None, Field(ge=2), Option("Tokens in a window.", role="data")] = 512

The command line, the environment, recipes, selectors, tables and the documentation read
`options_of(RunSpec, Setup)`; an option is described in one place.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prunebench.errors import UsageError, nearest

REQUIRED = dataclasses.MISSING
"""The default of an option that has none."""

Role = Literal["method", "data", "evaluation", "output", "placement"]


@dataclass(frozen=True)
class Option:
    """Metadata of a run option besides its name, type and default.

    Attributes:
        help: For `run --help`, without the default.
        role: What it belongs to: the method, the data it reads (null where it reads none), the
            evaluation, the output, or the placement of the work (which changes no number).
        default: The default in words, where it is not the field's.
        given: Whether users set it; False for content that a name resolved to.
        cell: Whether results that differ in it are different rows of a table.
        shown: Whether a table shows it as a setting of a row.
        since: Version of the hash it came with. Later ones are left out of the hash at their
            default, so that old hashes stay true.
        flags: Further names on the command line.
        metavar: What the command line calls the value.
        env: Whether PRUNEBENCH_<NAME> sets it.
        recipe: Whether a recipe may hold it.
        also: Further types that a recipe may give.
        repeated: Whether the command line takes it several times.
        requires: The option that it depends on.
    """

    help: str = ""
    role: Role = "method"
    default: str = ""
    given: bool = True
    cell: bool = False
    shown: bool = False
    since: int = 1
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    env: bool = True
    recipe: bool = True
    also: tuple[type, ...] = ()
    repeated: bool = False
    requires: str | None = None


@dataclass(frozen=True)
class FieldOption:
    """An option as its field declares it.

    Attributes:
        name: Of the field.
        about: Its metadata.
        kind: `str`, `int`, `float`, `bool`, `Path`, `tuple` (of names) or `dict`.
        value: The default; `REQUIRED` where there is none.
        nullable: Whether it may be None.
        choices: The values of a `Literal`.
        least: The smallest value.
    """

    name: str
    about: Option
    kind: type
    value: Any
    nullable: bool
    choices: tuple[str, ...]
    least: int | None

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str | None:
        """Its name in the environment, if it has one."""
        return f"PRUNEBENCH_{self.name.upper()}" if self.about.env else None

    @property
    def recipe_types(self) -> tuple[type, ...]:
        """The types that a recipe may hold, TOML numbers included where text is parsed as one."""
        types: tuple[type, ...] = (str, list) if self.kind is tuple else (self.kind,)
        return (*types, *self.about.also)

    @property
    def default_text(self) -> str:
        """The default in words; empty where there is nothing to say."""
        if self.about.default:
            return self.about.default
        if self.value in (None, REQUIRED, (), "") or self.kind is bool:
            return ""
        return ",".join(self.value) if self.kind is tuple else str(self.value)

    @property
    def help_text(self) -> str:
        """What it is, and its default."""
        default = self.default_text
        return f"{self.about.help} (default: {default})" if default else self.about.help

    def require(self, value: object) -> None:
        """Raise `UsageError` unless a value is one of the choices, where there are choices."""
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{self.flag} {value!r} is not known", fix=nearest(str(value), self.choices)
            )


@functools.cache
def options_of(*classes: type) -> dict[str, FieldOption]:
    """Return the options that the fields of pydantic models or dataclasses declare, in order."""
    return {
        name: _field_option(name, hint, _default(cls, name))
        for cls in classes
        # include_extras keeps Annotated, where the Option is
        for name, hint in get_type_hints(cls, include_extras=True).items()
        if get_origin(hint) is Annotated
        and any(isinstance(extra, Option) for extra in hint.__metadata__)
    }


def _default(cls: type, name: str) -> Any:
    if issubclass(cls, BaseModel):
        info = cls.model_fields[name]
        return REQUIRED if info.is_required() else info.default
    rows: Any = dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass, by contract
    return next(row.default for row in rows if row.name == name)


def _field_option(name: str, hint: Any, default: Any) -> FieldOption:
    about = next(extra for extra in hint.__metadata__ if isinstance(extra, Option))
    # pydantic's Field(ge=2) keeps the bound in its own metadata, as annotated_types.Ge
    limits = [extra for extra in hint.__metadata__ if isinstance(extra, FieldInfo)]
    least = next(
        (limit.ge for info in limits for limit in info.metadata if hasattr(limit, "ge")), None
    )
    inner, nullable = hint.__origin__, False
    if get_origin(inner) in (Union, UnionType):  # X | None
        nullable = True
        (inner,) = (part for part in get_args(inner) if part is not NoneType)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    # tuple[str, ...] becomes tuple, dict[...] becomes dict
    kind = str if choices else (get_origin(inner) or inner)
    if kind not in (str, int, float, bool, Path, tuple, dict):
        raise TypeError(f"the option {name} has the type {inner}, which nothing here can read")
    return FieldOption(name, about, kind, default, nullable, choices, least)
