"""Which options a row of a table shows: those that someone who repeats it has to give.

The defaults are in `option_defaults.json` beside this file (`make docs` writes it): the classes
that declare them import torch, and a table must not wait for that.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the defaults by kind and name: `maskllm`, and with a preset `maskllm/paper`."""
    file = resources.files("prunebench.results").joinpath("option_defaults.json")
    return dict(json.loads(file.read_text("utf-8")))


def default_options(kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a part; empty where it is not one of prunebench.

    Args:
        kind: `method`, `allocation` or `recover`.
        name: Of the part, or of several: `block+distill`.
        options: Those of a row. A preset among them has defaults of its own.
    """
    table, parts = _table()[kind], name.split("+")
    defaults: dict[str, Any] = {}
    for part in parts:
        start = f"{part}." if len(parts) > 1 else ""
        preset = f"{part}/{options.get(f'{start}preset')}"
        of_part = table.get(preset, table.get(part, {}))
        defaults |= {f"{start}{key}": value for key, value in of_part.items()}
    return defaults


def shown_options(
    kind: str, name: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[str | None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what each row shows of its options, and what the others are in which rows differ.

    Shown is what is not the default. Of an option whose default is not known, shown are the rarer
    of several values.

    Args:
        kind: `method`, `allocation` or `recover`.
        name: Of the part that all rows have.
        rows: Its options in each row.
        texts: The calibration text of each row, the default of a text that is trained on.
    """
    defaults = [default_options(kind, name, row) for row in rows]
    varying, usual = _varying(rows)
    for key in varying:
        known = {json.dumps(of_row[key]) for of_row in defaults if key in of_row}
        if known:
            usual.pop(key, None)
            value = json.loads(known.pop())
            # where presets differ, or the run chooses, no single value is left unsaid
            if not known and value is not None:
                usual[key] = value

    def is_shown(key: str, value: Any, default: Mapping[str, Any], text: str | None) -> bool:
        if key not in default:
            return key in varying and (key, value) not in usual.items()
        unset = text if value is not None else None  # what the run fills in for None
        return bool(value != (unset if default[key] is None else default[key]))

    shown = [
        {key: value for key, value in row.items() if is_shown(key, value, default, text)}
        for row, default, text in zip(rows, defaults, texts, strict=True)
    ]
    return shown, usual


def _varying(rows: Sequence[Mapping[str, Any]]) -> tuple[set[str], dict[str, Any]]:
    """Return the options in which some rows differ, and those values that most of them have."""
    varying, usual = set(), {}
    for key in sorted(set().union(*rows)):
        values = [row[key] for row in rows if key in row]
        # as text: True, 1 and 1.0 are one and the same key of a Counter
        counts = Counter(map(json.dumps, values))
        if len(counts) > 1:
            varying.add(key)
            word, count = counts.most_common(1)[0]
            if len(rows) > 2 and 2 * count > len(rows):
                usual[key] = json.loads(word)
    return varying, usual
