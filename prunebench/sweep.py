"""From a recipe to results: one process a cell, finished cells skipped, failures kept apart.

A cell is finished when the shared table holds a result of the very same spec, resolved to content
(weights, texts, options, seed): a sweep that was stopped, killed or interrupted is started again
with the same command, and goes on. A process a cell: whatever one does to memory, the next starts
clean, and its peak is its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prunebench.errors import MissingResource, PrunebenchError, UsageError
from prunebench.hub import hub_reachable
from prunebench.models.source import ModelSource, find_model, local_path
from prunebench.options import RUN_KEYS
from prunebench.prepare import Setup, prepare
from prunebench.recipe import Recipe, RecipeCell
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore

_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell.

    Attributes:
        state: `finished` before, `done` now, `failed`, or `to run` (of a dry run).
        result: What was filed, unless it failed.
        reason: Why it failed, in one line.
        exit_code: That of its process.
    """

    cell: RecipeCell
    state: Literal["finished", "done", "failed", "to run"]
    result: Result | None = None
    reason: str = ""
    exit_code: int = 0
    seconds: float = 0.0


def parse_shard(text: str) -> tuple[int, int]:
    """Read `2/8`: the second of eight equal parts.

    Raises:
        UsageError: It is not of that form, or there is no such part.
    """
    found = _SHARD.fullmatch(text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"--shard {text!r} is no part of a whole", fix="as in --shard 2/8")
    return part, parts


def shard(cells: Sequence[RecipeCell], part: int, parts: int) -> list[RecipeCell]:
    """Return every `parts`-th cell, from the `part`-th on."""
    return list(cells[part - 1 :: parts])


def require_resources(recipe: Recipe, cells: Sequence[RecipeCell], *, device: str) -> None:
    """Say before the first cell what is missing for any: a GPU, the hub, a login.

    Raises:
        MissingResource: What is missing, and for which models.
    """
    models = {cell.values["model"]: find_model(cell.values["model"]) for cell in cells}
    big = {name: recipe.gpu_memory_gb[name] for name in models if name in recipe.gpu_memory_gb}
    if big and device == "auto" and not _has_gpu():
        name, size = max(big.items(), key=lambda item: item[1])
        raise MissingResource(
            f"{recipe.path} needs a CUDA device, and there is none here",
            where=f"{name} needs about {size:g} GB of its memory (computed, not measured)",
            fix="run it on a machine with such a GPU, or add --device cpu and much patience",
        )
    missing = [name for name, source in models.items() if _must_download(source)]
    if missing and not hub_reachable():
        raise MissingResource(
            f"{recipe.path} needs {', '.join(missing)}, and the hub cannot be reached",
            fix="connect to the network, or fetch them first: prunebench models fetch "
            f"{missing[0]}",
        )
    gated = [name for name in missing if (entry := models[name].entry) and entry.gated]
    if gated and not _logged_in():
        raise MissingResource(
            f"{', '.join(gated)} {'are' if len(gated) > 1 else 'is'} gated, and nobody is logged "
            "in to the hub",
            fix="accept the licence on the hub, then run hf auth login",
        )


def _must_download(source: ModelSource) -> bool:
    return source.kind == "hub" and local_path(source) is None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


class Sweep:
    """The cells of a recipe, run one after the other.

    Args:
        setup: What all cells share: results folder, device, batch size, task files, samples.
        show: Gets every line that a cell's process writes to stderr, as it comes.
    """

    def __init__(self, setup: Setup, *, show: Callable[[str], None]) -> None:
        self._setup = setup
        self._show = show
        self._store = ResultStore(setup.results_dir)

    def finished(self, cell: RecipeCell) -> Result | None:
        """Return the newest finished result of the same spec, if there is one.

        Raises:
            PrunebenchError: The cell cannot be run: what `prunebench run` would say.
        """
        device = cell.values["device"] if self._setup.device == "auto" else self._setup.device
        plan = prepare(cell.spec, replace(self._setup, device=device))
        return self._store.newest(plan.spec)

    def run(self, cell: RecipeCell) -> CellOutcome:
        """Run a cell in a process of its own, unless it is finished."""
        started = time.monotonic()
        try:
            known = self.finished(cell)
        except PrunebenchError as error:
            reason = " / ".join(str(error).splitlines())
            return CellOutcome(cell, "failed", reason=reason, exit_code=error.exit_code)
        if known:
            return CellOutcome(cell, "finished", known)
        process = subprocess.Popen(
            [sys.executable, "-m", "prunebench", *self.command(cell)[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not _is_option(k)},
            text=True,
            errors="replace",
        )
        assert process.stderr is not None and process.stdout is not None
        reasons: list[str] = []
        try:
            for line in process.stderr:
                self._show(line.rstrip("\n"))
                if reasons or line.startswith("error: "):
                    reasons.append(line.strip())
            output = process.stdout.read()
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too: a Ctrl-C goes to the whole group
            raise
        seconds = time.monotonic() - started
        if code == 0:
            return CellOutcome(cell, "done", Result.model_validate_json(output), seconds=seconds)
        if code == 130:
            raise KeyboardInterrupt
        died = f"its process was ended by signal {-code}" if code < 0 else f"exit code {code}"
        reason = " / ".join(reasons).removeprefix("error: ") or died
        return CellOutcome(cell, "failed", reason=reason, exit_code=code, seconds=seconds)

    def command(self, cell: RecipeCell) -> list[str]:
        """Return the command that runs a cell, as one would type it."""
        setup = self._setup
        words = ["prunebench", "run", *cell.arguments, "--results-dir", str(setup.results_dir)]
        if setup.device != "auto":
            words += ["--device", setup.device]
        if cell.values["tasks"] and setup.batch_size is not None:
            words += ["--batch-size", str(setup.batch_size)]
        if cell.values["tasks"] and setup.include_path is not None:
            words += ["--include-path", str(setup.include_path)]
        return [*words, *(["--log-samples"] if setup.log_samples else []), "--json"]


def _is_option(name: str) -> bool:
    """Whether a variable of the environment would change a cell behind the recipe's back."""
    return name in {f"PRUNEBENCH_{key.upper()}" for key in (*RUN_KEYS, "recipe")}
