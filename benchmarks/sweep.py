"""How long a sweep takes to find out that there is nothing left to do."""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
from pathlib import Path

from benchmarks.figures import Figure, at_most, figure, noted, run_cli

ROOT = Path(__file__).parent.parent
RECIPE = """about = "100 cells on the default model"

[[grid]]
method = ["random", "wanda"]
sparsity = ["0.3", "0.4", "0.5", "0.6", "0.7"]
seed = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
"""
BEFORE = "PRUNEBENCH_BENCH_BEFORE"  # names a checkout of another commit to measure beside this one


def fill(folder: Path) -> None:
    """Write the recipe, and a finished result of each of its cells: copies of a real one.

    The copies have the keys of the file that they are made of, which is an old one: a checkout of
    an older commit can read them too.
    """
    from prunebench.results.store import ResultStore, new_run_id
    from prunebench.spec import Setup
    from prunebench.sweep.recipe import read_recipe
    from prunebench.sweep.sweep import Sweep

    path = folder / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    files = sorted(ROOT.glob("results/*/wanda-*/*.json"), key=lambda file: file.stem.split("-")[1])
    row = json.loads(files[0].read_text("utf-8"))
    sweep = Sweep(Setup(results_dir=folder / "results", device="cpu"))
    for cell in read_recipe(path, complete=True).cells:
        spec = sweep.resolve(cell).spec
        document = spec.model_dump(mode="json")
        row |= {"id": new_run_id(spec), "spec_id": spec.spec_id}
        row["spec"] = {key: document[key] for key in row["spec"]}
        file = ResultStore(folder / "results").root / spec.model_slug / spec.cell / row["id"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps(row), encoding="utf-8")


@figure("sweep-finished-100")
def sweep_finished_100() -> list[Figure]:
    """`prunebench sweep` of 100 cells that are finished, as a process, imports included.

    Where `PRUNEBENCH_BENCH_BEFORE` names another checkout, the same folder is swept once with that
    one in between, and the ratio is a figure too.
    """
    before = os.environ.get(BEFORE)
    runs: list[float] = []
    cpu: list[float] = []
    others: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder)
        arguments = ["sweep", "recipe.toml", "--results-dir", "results", "--device", "cpu"]
        for _ in range(3):
            earlier = _cpu_seconds()
            runs.append(_sweep(arguments, folder, ROOT))
            cpu.append(_cpu_seconds() - earlier)
            if before and not others:
                others.append(_sweep(arguments, folder, Path(before)))
    figures = [
        at_most("sweep-finished-100", 3, "s", runs),
        noted("sweep-finished-100-cpu", "s of CPU", cpu),
    ]
    if others:
        ratio = statistics.median(others) / statistics.median(runs)
        figures.append(noted("sweep-finished-100-before", "s", others))
        figures.append(noted("sweep-finished-100-ratio", "times faster", [ratio]))
    return figures


def _cpu_seconds() -> float:
    """Return the CPU seconds of all child processes so far: a busy machine changes them little."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _sweep(arguments: list[str], folder: Path, checkout: Path) -> float:
    """Return the seconds of one sweep with the code of a checkout.

    Raises:
        RuntimeError: A cell was not found finished.
    """
    ours = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(checkout)
    try:
        seconds, output = run_cli(arguments, folder=folder)
    finally:
        os.environ.pop("PYTHONPATH")
        if ours is not None:
            os.environ["PYTHONPATH"] = ours
    if "100 finished" not in output:
        raise RuntimeError(output[-500:])
    return seconds
