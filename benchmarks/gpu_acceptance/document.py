"""The JSON of a run: its schema, the check of a file that is to be committed, and the policy.

    python3 -m benchmarks.gpu_acceptance.document check benchmarks/gpu/*.json
    python3 -m benchmarks.gpu_acceptance.document policy benchmarks/gpu/nvidia-h200-2026-12-01.json

`policy` writes the speedups that a run has measured into `prunebench/sparse24/measured.json`, from
which the policy of packed layers chooses on such a machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.gpu_acceptance.plan import PARTS
from benchmarks.gpu_acceptance.promises import environment_of, rows_of
from benchmarks.gpu_acceptance.record import smaller_speedups
from prunebench.spec import slug

FOLDER = Path(__file__).parents[1] / "gpu"
MEASURED = Path(__file__).parents[2] / "prunebench" / "sparse24" / "measured.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(BaseModel):
    """A row: its kind, and values that belong to the kind."""

    model_config = ConfigDict(extra="allow")
    row: str


class PartResult(_Strict):
    """How a part ended, and what it measured."""

    name: str
    title: str
    limit: float
    state: Literal["done", "crashed", "out of time", "context lost", "not run"]
    why: str
    seconds: float = Field(ge=0)
    rows: list[Row]


class Document(_Strict):
    """A whole run."""

    format: Literal[1]
    created_at: datetime
    dry: bool
    budget: float
    seconds: float = Field(ge=0)
    parts: list[PartResult] = Field(min_length=1)


def why_not(path: Path) -> str:
    """Return why a file may not be committed; "" if it may."""
    try:
        text = path.read_text("utf-8")
        run = Document.model_validate_json(text)
        document = json.loads(text)
    except OSError as error:
        return f"it cannot be read: {error}"
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    if run.dry:
        return "it is a dry run: nothing was measured"
    unknown = {part.name for part in run.parts} - {part.name for part in PARTS}
    if unknown:
        return f"unknown parts: {', '.join(sorted(unknown))}"
    if not all(map(math.isfinite, _numbers(document))):
        return "a number is NaN or infinite"
    if not environment_of(document).get("gpu"):
        return "it does not say on which GPU it was measured"
    name = file_name(document)
    return "" if path.name == name else f"its name should be {name}"


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)


def file_name(document: dict[str, Any]) -> str:
    """Return the name of a committed run: the chip and the day."""
    return f"{slug(environment_of(document)['gpu']).lower()}-{document['created_at'][:10]}.json"


def with_policy(measured: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Return the table of known devices with the speedups of a run."""
    devices = {name: dict(rows) for name, rows in measured["devices"].items()}
    rows = [row for part in ("decode", "prefill") for row in rows_of(document, part, "speedups")]
    fresh = smaller_speedups(rows)
    for (device, key), ratios in fresh.items():
        devices.setdefault(device, {})[key] = dict(sorted(ratios.items()))
    ordered = {name: dict(sorted(each.items())) for name, each in sorted(devices.items())}
    return measured | {"devices": ordered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check files, or write the policy of one; returns 1 if a file is not right."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_acceptance.document", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["check", "policy"])
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    wrong = {path: reason for path in options.files if (reason := why_not(path))}
    for path, reason in wrong.items():
        print(f"{path}: {reason}", file=sys.stderr)
    if wrong:
        return 1
    if options.what == "check":
        print(f"{len(options.files)} checked")
        return 0
    measured = json.loads(MEASURED.read_text("utf-8"))
    for path in options.files:
        measured = with_policy(measured, json.loads(path.read_text("utf-8")))
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(f"written to {MEASURED}: {', '.join(measured['devices']) or 'no device'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
