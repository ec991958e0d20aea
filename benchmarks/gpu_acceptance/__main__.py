"""`make gpu-acceptance`: measure everything that is promised on a GPU, in at most nine minutes.

    python3 -m benchmarks.gpu_acceptance OUT.json              on a machine with a GPU
    python3 -m benchmarks.gpu_acceptance OUT.json --dry        tiny sizes, no speed; CPU or GPU
    python3 -m benchmarks.gpu_acceptance.report OUT.json       the table, against what is promised

It needs torch, triton, transformers and what docs/gpu.md names; no pip, no make, no network.
Exit status: 0 measured, 1 a promise is not kept or a part failed, 2 usage, 3 no GPU that can be
used, 5 not saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_acceptance import report
from benchmarks.gpu_acceptance.plan import BUDGET, PARTS
from benchmarks.gpu_acceptance.promises import failures
from benchmarks.gpu_acceptance.runner import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print the report."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_acceptance", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes, no speed; without a GPU on the CPU"
    )
    parser.add_argument("--only", default="", metavar="PART", help="parts, separated by commas")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; " + ", ".join(p.name for p in PARTS))
    # The first part says what the machine is and what it lacks: it always runs.
    parts = [part for part in PARTS if not names or part.name in (*names, PARTS[0].name)]
    try:
        document = Run(options.out, dry=options.dry, budget=options.budget).parts(parts)
    except OSError as error:
        print(f"{options.out} cannot be written: {error}", file=sys.stderr)
        return 5
    print("\n".join(report.lines(document)))
    print(f"\nwritten to {options.out}")
    if fatal := report.fatal(document):
        print(f"nothing was measured: {fatal}", file=sys.stderr)
        return 3
    return 0 if report.is_whole(document) and not failures(document) else 1


if __name__ == "__main__":
    sys.exit(main())
