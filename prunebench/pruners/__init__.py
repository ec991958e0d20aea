"""The registry of pruning methods: a table of facts, resolved only when a method is used.

A method name is a row: a class, default options, and what a user wants to know before running it.
Methods of other packages come by the entry-point group `prunebench.pruners`, or as a literal
`module:Class`; they need nothing from this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any

from prunebench import __version__
from prunebench.errors import PrunebenchError, UsageError, nearest
from prunebench.spec import OptionValue

if TYPE_CHECKING:
    from prunebench.pruners.layer import Pruner

ENTRY_POINTS = "prunebench.pruners"


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Attributes:
        target: `module:Class` of the implementation.
        about: One line for `prunebench list methods`.
        paper: An arXiv number, if published.
        data: Whether it reads calibration text.
        updates: Whether it changes the weights that it keeps.
        patterns: The sparsities it takes.
        sparsity: The sparsity of a run that names none.
        options: Options of this row that differ from the class's defaults.
        distribution: The package it comes from, with its version.
    """

    target: str
    about: str
    paper: str | None = None
    data: bool = False
    updates: bool = False
    patterns: str = "any ratio, any N:M"
    sparsity: str = "0.5"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    distribution: str = f"prunebench {__version__}"


BUILTIN: dict[str, Method] = {
    "dense": Method(
        "prunebench.pruners.dense:Dense",
        "no pruning: the baseline",
        patterns="0",
        sparsity="0",
    ),
    "random": Method("prunebench.pruners.random:Random", "seeded control, per output row"),
    "magnitude": Method(
        "prunebench.pruners.magnitude:Magnitude", "|W|, per matrix", paper="1506.02626"
    ),
    "wanda": Method(
        "prunebench.pruners.wanda:Wanda",
        "|W| times input norm, per output row",
        paper="2306.11695",
        data=True,
    ),
}


def plugins() -> dict[str, Method]:
    """Return the methods that other packages declare as entry points, without importing them.

    Raises:
        UsageError: Two packages, or a package and prunebench, claim one name.
    """
    found: dict[str, Method] = {}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
        rival = BUILTIN.get(point.name) or found.get(point.name)
        if rival:
            raise UsageError(
                f"two packages claim the method name {point.name!r}",
                where=f"{rival.distribution} and {package}",
                fix="uninstall one of them, or use the literal module:Class",
            )
        found[point.name] = Method(point.value, "plug-in", patterns="", distribution=package)
    return found


def find_method(name: str) -> Method:
    """Return the row of a method name, without importing the method.

    Raises:
        UsageError: There is no such method; the nearest name is suggested.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if ":" in name:
        return Method(name, "literal", patterns="", distribution="outside prunebench")
    known = {**BUILTIN, **plugins()}
    if name in known:
        return known[name]
    raise UsageError(
        f"unknown method {name!r}",
        where="it is neither built in, nor installed as a plug-in, nor module:Class",
        fix=nearest(name, known),
    )


def method_class(name: str) -> type[Pruner]:
    """Import the class of a method.

    Raises:
        UsageError: The module cannot be imported, or holds no such pruner.
    """
    target = find_method(name).target
    module_name, _, attribute = target.partition(":")
    if ":" in name and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a literal module:Class may lie where the user stands
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except PrunebenchError:
        raise
    except Exception as error:  # a plug-in may raise anything while it is imported
        raise UsageError(
            f"the method {name!r} cannot be imported",
            where=f"{target}: {type(error).__name__}: {error}",
            fix="fix or uninstall the plug-in; the other methods are not affected",
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise _not_a_pruner(target, "it is not a dataclass")
    for needed in ("prune", "needs"):
        if not hasattr(found, needed):
            raise _not_a_pruner(target, f"it has no {needed!r}")
    return typing.cast("type[Pruner]", found)


def resolve_options(
    name: str, given: Mapping[str, OptionValue], *, seed: int
) -> dict[str, OptionValue]:
    """Return every option of a method: the class's defaults, the row's, and what was given.

    Values given as text (from `--set key=value`) are read as the type of the option. A method with
    an option `seed` gets the seed of the run unless one was given.

    Raises:
        UsageError: An option is unknown (the nearest is suggested) or has the wrong type.
    """
    cls = method_class(name)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in given:
        if key not in fields:
            known = nearest(key, fields) if fields else "it has no options"
            raise UsageError(f"{name} has no option {key!r}", where="in --set", fix=known)
    values: dict[str, OptionValue] = {}
    for key, one in fields.items():
        if key in given:
            values[key] = _read_value(name, key, given[key], hints[key])
        elif key in find_method(name).options:
            values[key] = find_method(name).options[key]
        elif key == "seed":
            values[key] = seed
        elif one.default is not dataclasses.MISSING:
            values[key] = one.default
        else:
            raise UsageError(f"{name} needs the option {key!r}", fix=f"give --set {key}=VALUE")
    return values


def make_pruner(name: str, options: Mapping[str, OptionValue]) -> Pruner:
    """Build a pruner from resolved options.

    Raises:
        UsageError: The method refuses a value.
    """
    cls = method_class(name)
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} refuses its options", where=str(error)) from error


def implementation_version(name: str) -> str:
    """Return the package and version that a method's class comes from."""
    return find_method(name).distribution


def _read_value(method: str, key: str, value: OptionValue, hint: Any) -> OptionValue:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if kind is NoneType and (value is None or value in ("none", "None", "")):
            return None
        if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return value
        if isinstance(kind, type) and type(value) is kind:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and kind in (bool, int, float, str):
            try:
                return _BOOLS[value.lower()] if kind is bool else typing.cast(Any, kind)(value)
            except (KeyError, ValueError):
                continue
    wanted = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    choices = [str(c) for kind in kinds for c in typing.get_args(kind)]
    near = difflib.get_close_matches(str(value), choices, n=1)
    raise UsageError(
        f"{method}: {key}={value!r} is not valid",
        where=f"it should be {wanted}",
        fix=f"did you mean {near[0]}?" if near else "",
    )


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _not_a_pruner(target: str, reason: str) -> UsageError:
    return UsageError(
        f"{target} is not a pruner",
        where=reason,
        fix="see prunebench.pruners.layer.Pruner: a frozen dataclass with needs and prune",
    )
