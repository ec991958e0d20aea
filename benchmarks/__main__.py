"""`make bench`: measure every figure that the project promises, and say whether it holds.

    python -m benchmarks                  all figures, table on stdout, benchmarks/latest.json
    python -m benchmarks --only wanda     those whose name contains "wanda"

Ratios are taken inside one run, the two sides measured next to each other, because the machines
are noisy. `limit` is what the project promises, `goal` says in which direction.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import benchmarks.commands
import benchmarks.cpu
import benchmarks.disk
import benchmarks.maskllm
import benchmarks.packed
import benchmarks.pruning
import benchmarks.recovery
import benchmarks.scoring
import benchmarks.sweep
import benchmarks.tasks  # noqa: F401  (they register their figures)
from benchmarks.figures import FIGURES, Figure, machine

LATEST = Path(__file__).parent / "latest.json"


def main() -> int:
    """Run the chosen figures; returns 1 if one misses its limit."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the figures to measure")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    options = parser.parse_args()
    chosen = {name: measure for name, measure in FIGURES.items() if options.only in name}
    if options.list or not chosen:
        print("\n".join(FIGURES))
        return 0 if chosen else 2
    rows: list[Figure] = []
    for name, measure in chosen.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures = measure()
        rows += figures
        for figure in figures:
            print(f"  {line(figure)}", file=sys.stderr, flush=True)
    here = machine()
    document = [asdict(row) | {"machine": here} for row in rows]
    LATEST.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(line, rows)))
    return 0 if all(row.holds is not False for row in rows) else 1


def line(figure: Figure) -> str:
    """Return one row of the table."""
    promise = "" if figure.limit is None else f"{figure.goal} {figure.limit:g}"
    verdict = {True: "holds", False: "MISSED", None: ""}[figure.holds]
    spread = ""
    if len(figure.runs) > 1:
        spread = f"({min(figure.runs):.3g}-{max(figure.runs):.3g}, n={len(figure.runs)})"
    value = f"{figure.name:<24} {figure.value:>9.3f} {figure.unit:<28}"
    return f"{value} {promise:<14} {verdict:<7} {spread}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
