"""Figures of whole commands: memory and time of a run, start-up, the demo, many results."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from benchmarks.figures import (
    Figure,
    at_most,
    figure,
    run_cli,
)


@figure("peak-rss")
def peak_rss() -> list[Figure]:
    """Peak resident memory of a whole run, dense baseline included, in both orders."""
    figures = []
    for order in ("joint", "sequential"):
        with tempfile.TemporaryDirectory() as folder:
            run = ["run", "-m", "wanda", "--sparsity", "2:4", "--within-block", order]
            arguments = [*run, "--calibration", "c4@wheel", "--json", "-q", "--ppl-tokens", "2048"]
            _, out = run_cli(arguments, folder=Path(folder))
        gigabytes = json.loads(out)["cost"]["peak_rss_bytes"] / 1e9
        figures.append(at_most(f"peak-rss-{order}", 2.2, "GB", [gigabytes]))
    return figures


@figure("startup")
def startup() -> list[Figure]:
    """How long the light commands take."""
    results = str(Path(__file__).parent.parent / "results")
    figures = []
    for name, limit, arguments in (
        ("help", 0.5, ["--help"]),
        ("list", 0.5, ["list", "methods"]),
        ("compare", 1.0, ["compare", "--results-dir", results]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            runs = [run_cli(arguments, folder=Path(folder))[0] for _ in range(7)]
        figures.append(at_most(f"startup-{name}", limit, "s", runs[1:]))
    return figures


@figure("demo")
def demo() -> list[Figure]:
    """What `make demo` does after its downloads, into a folder of its own, without a baseline."""
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for method, sparsity in (
            ("dense", "0"),
            ("magnitude", "0.5"),
            ("magnitude", "2:4"),
            ("wanda", "0.5"),
            ("wanda", "2:4"),
        ):
            run = ["run", "-m", method, "--sparsity", sparsity, "--calibration", "c4@wheel", "-q"]
            run += ["--within-block", "sequential"]
            run_cli(run, folder=Path(folder))
        run_cli(["compare"], folder=Path(folder))
    return [at_most("demo", 300, "s", [time.perf_counter() - start_time])]


@figure("compare-2000")
def compare_2000() -> list[Figure]:
    """The table of 2,000 results with 420,000 layers: read, checked, folded, printed."""
    return [_with_2000_results("compare-2000", 2, ["compare"])]


@figure("report-2000")
def report_2000() -> list[Figure]:
    """The page of the same results."""
    return [_with_2000_results("report-2000", 6, ["report", "--force", "-o", "report.html"])]


def _with_2000_results(name: str, limit: float, arguments: list[str]) -> Figure:
    from benchmarks.fixtures.generated import publish_results

    with tempfile.TemporaryDirectory() as folder:
        publish_results(Path(folder) / "results", 2000)
        runs = [run_cli(arguments, folder=Path(folder), threads=1)[0] for _ in range(4)]
    return at_most(name, limit, "s", runs[1:])
