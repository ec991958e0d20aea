"""A registry: a table of facts about classes that are imported only when they are used.

`pruners` and `allocators` each hold one. A row is a name, a class, and what `prunebench list`
shows. Classes of other packages are found by an entry-point group or as a literal `module:Class`;
no file of this project has to change for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from prunebench import __version__
from prunebench.errors import PrunebenchError, UsageError, nearest

if TYPE_CHECKING:
    from prunebench.spec import OptionValue


LATER = {"later": True}
"""Metadata of an option that came after results were filed: at its default it is not recorded."""


@dataclass(frozen=True)
class Row:
    """One name of a registry.

    Attributes:
        target: `module:Class` of the implementation.
        about: One line for `prunebench list`.
        paper: An arXiv number, if published.
        data: Whether it reads calibration text.
        distribution: The package it comes from, with its version.
    """

    target: str
    about: str
    paper: str | None = None
    data: bool = False
    distribution: str = f"prunebench {__version__}"


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Registry(Generic[R]):
    """The classes of one kind, by name.

    Attributes:
        kind: What it holds, for messages: `method` or `allocator`.
        entry_points: The entry-point group of other packages.
        row: The class of the rows.
        builtin: Our own rows.
        required: Attributes that a class must have.
        option: How an option is given on the command line.
    """

    kind: str
    entry_points: str
    row: type[R]
    builtin: Mapping[str, R]
    required: tuple[str, ...]
    option: str

    def plugins(self) -> dict[str, R]:
        """Return what other packages declare as entry points, without importing it.

        Raises:
            UsageError: Two packages, or a package and prunebench, claim one name.
        """
        rows: dict[str, R] = {}
        # reads the metadata of installed packages; nothing is imported
        for point in metadata.entry_points(group=self.entry_points):
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
            # no silent winner: results are filed by name, and would mix two methods
            rival = self.builtin.get(point.name) or rows.get(point.name)
            if rival:
                raise UsageError(
                    f"two packages claim the {self.kind} name {point.name!r}",
                    where=f"{rival.distribution} and {package}",
                    fix="uninstall one of them, or use the literal module:Class",
                )
            rows[point.name] = self._outside(point.value, "plug-in", package)
        return rows

    def find(self, name: str) -> R:
        """Return the row of a name, without importing its class.

        Raises:
            UsageError: There is no such name; the nearest is suggested.
        """
        # before the plug-ins: looking through all installed packages takes longer
        if name in self.builtin:
            return self.builtin[name]
        if ":" in name:
            return self._outside(name, "literal", "outside prunebench")
        rows = {**self.builtin, **self.plugins()}
        if name in rows:
            return rows[name]
        raise UsageError(
            f"unknown {self.kind} {name!r}",
            where="it is neither built in, nor installed as a plug-in, nor module:Class",
            fix=nearest(name, rows),
        )

    def load(self, name: str) -> type[Any]:
        """Import the class of a name.

        Raises:
            UsageError: The module cannot be imported, or holds no such class.
        """
        target = self.find(name).target
        module_name, _, attribute = target.partition(":")
        # a console script has the folder of the script in sys.path, not the working directory
        if ":" in name and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # a literal may be a file of the working directory
        try:
            cls = getattr(importlib.import_module(module_name), attribute)
        # an error with a fix of its own is not wrapped
        except PrunebenchError:
            raise
        except Exception as error:  # a plug-in may raise anything while it is imported
            raise UsageError(
                f"the {self.kind} {name!r} cannot be imported",
                where=f"{target}: {type(error).__name__}: {error}",
                fix="fix or uninstall the plug-in; the others are not affected",
            ) from error
        # options are read from the fields of a dataclass
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise self._refused(target, "it is not a dataclass")
        for needed in self.required:
            if not hasattr(cls, needed):
                raise self._refused(target, f"it has no {needed!r}")
        return cls

    def resolve_options(
        self, name: str, given: Mapping[str, OptionValue], *, seed: int
    ) -> dict[str, OptionValue]:
        """Return every option of a name: the class's defaults and what was given.

        An option that came `LATER` is left out where it has its default.

        Values given as text (from `--set key=value`) are read as the type of the option. A class
        with an option `seed` gets the seed of the run unless one was given.

        Raises:
            UsageError: An option is unknown (the nearest is suggested) or has the wrong type.
        """
        cls = self.load(name)
        # field.type is a string under `from __future__ import annotations`; this evaluates it
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        for key in given:
            if key not in fields:
                hint = nearest(key, fields) if fields else "it has no options"
                raise UsageError(f"{name} has no option {key!r}", where="in --set", fix=hint)
        values: dict[str, OptionValue] = {}
        for key, declared in fields.items():
            if key in given:
                values[key] = _read_value(name, key, given[key], hints[key])
            # before the class's default: the seed of the run is recorded, so it must be used
            elif key == "seed":
                values[key] = seed
            elif declared.default is not dataclasses.MISSING:
                values[key] = declared.default
            else:
                raise UsageError(
                    f"{name} needs the option {key!r}", fix=f"give --set {self.option}{key}=VALUE"
                )
        # at its default, a later option does what older versions did: equal work, equal hash
        later = {key for key, declared in fields.items() if declared.metadata.get("later")}
        return {k: v for k, v in values.items() if k not in later or v != fields[k].default}

    def make(self, name: str, options: Mapping[str, OptionValue]) -> Any:
        """Build an instance from resolved options.

        Raises:
            UsageError: The class refuses a value.
        """
        cls = self.load(name)
        try:
            return cls(**options)
        # what __post_init__ raises for a value out of range
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} refuses its options", where=str(error)) from error

    def _outside(self, target: str, about: str, distribution: str) -> R:
        return self.row(target, about, distribution=distribution)

    def _refused(self, target: str, reason: str) -> UsageError:
        return UsageError(
            f"{target} is not a {self.kind}",
            where=reason,
            fix=f"it must be a frozen dataclass with {' and '.join(self.required)}",
        )


def _read_value(name: str, key: str, value: OptionValue, hint: Any) -> OptionValue:
    # `int | None` has the origin UnionType, Optional[int] has Union
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    for kind in kinds:
        if kind is NoneType and (value is None or value in ("none", "None", "")):
            return None
        if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return value
        # not isinstance: True is an int, and must not pass for one
        if isinstance(kind, type) and type(value) is kind:
            return value
        # TOML's `alpha = 1` for an option that is a float
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and kind in (bool, int, float, str):
            try:
                # bool("false") is True
                return _BOOLS[value.lower()] if kind is bool else typing.cast(Any, kind)(value)
            # the next kind of the union may fit
            except (KeyError, ValueError):
                continue
    choices = [str(c) for kind in kinds for c in typing.get_args(kind)]
    expected = ", ".join(choices) or getattr(hint, "__name__", str(hint)).replace("typing.", "")
    near = difflib.get_close_matches(str(value), choices, n=1)
    raise UsageError(
        f"{name}: {key}={value!r} is not valid",
        where=f"it should be {'one of ' if choices else ''}{expected}",
        fix=f"did you mean {near[0]}?" if near else "",
    )


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
