"""`prunebench list`: what there is to choose from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunebench.cli.console import print_columns
from prunebench.errors import PrunebenchError, UsageError, nearest

if TYPE_CHECKING:
    from prunebench.models.source import CatalogEntry
    from prunebench.registry import Registry

_Row = dict[str, object]
_COLUMNS = ("name", "paper", "data", "updates", "size", "dtype", "for", "source")
_ANY = "any ratio, any N:M"
_KINDS = ("methods", "allocators", "recoverers", "models", "texts")


def list_command(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(_KINDS)}.")] = "methods",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List methods, allocators, recoverers, models or texts."""
    if kind not in _KINDS:
        raise UsageError(f"there is no list of {kind!r}", fix=nearest(kind, _KINDS))
    listings = (_methods, _allocators, _recoverers, _models, _texts)
    rows = dict(zip(_KINDS, listings, strict=True))[kind]()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    shown = [_shown(row) for row in rows]
    texts = [[_text(value) for value in row.values()] for row in shown]
    print_columns(list(shown[0]), texts)


def _shown(row: _Row) -> _Row:
    """Return the columns of a table of 80 columns, the longest text last; --json has all."""
    columns = {name: row[name] for name in _COLUMNS if name in row}
    if columns.get("for") == "calibration, evaluation":
        columns["for"] = "both"
    notes = [row["license"], row["about"]] if "size" in row else [row["about"], row.get("license")]
    if row.get("terms"):
        notes.append(f"fetching it accepts the terms at {row['terms']}")
    if row.get("patterns") not in (None, _ANY):
        notes.append(f"sparsity: {row['patterns']}")
    if row.get("bos") == "window":
        notes.append("BOS in every window")
    # our own methods need no package name in each row
    if "from" in row and not str(row["from"]).startswith("prunebench "):
        notes.append(f"from {row['from']}")
    return {**columns, "about": "; ".join(str(note) for note in notes if note)}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def _methods() -> list[_Row]:
    from prunebench.pruners import BUILTIN, METHODS, Method

    try:
        outside = METHODS.plugins()
    except UsageError as error:  # two packages with one name: say so, and list what is certain
        outside = {error.what: Method("", error.where, distribution="conflict")}
    rows: list[_Row] = []
    # a plug-in is imported to see that it works; a name conflict has no target
    for name, row in {**BUILTIN, **outside}.items():
        about = row.about
        if name in outside and row.target:
            about = _about_plugin(name, METHODS)
        rows.append(
            {
                "name": name,
                "about": about,
                "paper": row.paper,
                "data": row.data,
                "updates": row.updates,
                "patterns": row.patterns,
                "from": row.distribution,
            }
        )
    return rows


def _allocators() -> list[_Row]:
    from prunebench.allocators import ALLOCATORS

    return _registered(ALLOCATORS)


def _recoverers() -> list[_Row]:
    from prunebench.recovery import RECOVERERS

    return _registered(RECOVERERS)


def _registered(registry: Registry[Any]) -> list[_Row]:
    outside = registry.plugins()
    return [
        {
            "name": name,
            "about": _about_plugin(name, registry) if name in outside else row.about,
            "paper": row.paper,
            "data": row.data,
            "from": row.distribution,
        }
        for name, row in {**registry.builtin, **outside}.items()
    ]


def _about_plugin(name: str, registry: Registry[Any]) -> str:
    """Import a plug-in to see whether it works; what is wrong with it is its description."""
    try:
        doc = registry.load(name).__doc__ or ""
    except PrunebenchError as error:
        return f"BROKEN: {error.where or error.what}"
    return doc.strip().splitlines()[0] if doc.strip() else "plug-in"


def _models() -> list[_Row]:
    from prunebench.models.source import catalog

    return [model_facts(name, entry) for name, entry in catalog().items()]


def model_facts(name: str, entry: CatalogEntry) -> _Row:
    """Return what the catalog says of an alias."""
    return {
        "name": name,
        "size": entry.size,
        "dtype": entry.dtype,
        "bos": entry.bos,
        "license": entry.license + (" (gated)" if entry.gated else ""),
        "terms": entry.terms,
        "source": entry.hub or entry.wheel,
        "about": entry.about,
    }


def _texts() -> list[_Row]:
    from prunebench.calibration.texts import texts

    return [
        {
            "name": name,
            "for": ", ".join(entry.uses),
            "about": entry.about,
            "license": entry.license,
            "source": ", ".join(
                filter(None, (entry.hub, "wheel" if entry.file else "", entry.url and "download"))
            ),
        }
        for name, entry in texts().items()
    ]
