"""The engine of `prunebench sweep --executor`, and the progress lines of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunebench.cli.console import print_hanging
from prunebench.cli.exit_codes import say
from prunebench.errors import UsageError, nearest
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.engines import EXECUTORS, Engine
from prunebench.sweep.engines.job import SLURM_ONLY, Resources, read_resources
from prunebench.sweep.recipe import Recipe


class Voice:
    """Writes to stderr which cell a line is about.

    Args:
        cells: The cells of this sweep, in order.
        side_by_side: Whether lines of several cells come mixed, so that each needs its number.
        quiet: Print nothing.
    """

    def __init__(
        self, cells: Sequence[RecipeCell], *, side_by_side: bool = False, quiet: bool = False
    ) -> None:
        # position in this sweep: of a shard or a selection, numbers of the recipe would have gaps
        self._place = {cell.number: f"[{i}/{len(cells)}]" for i, cell in enumerate(cells, 1)}
        self._side_by_side, self._quiet = side_by_side, quiet

    def tell(self, cell: RecipeCell, text: str) -> None:
        """Print the outcome of a cell, or that it starts."""
        if not self._quiet:
            text = cell.name + (f": {text}" if text else "")
            print_hanging(f"{self._place[cell.number]} ", text, err=True)

    def show(self, number: int, line: str) -> None:
        """Print a line of a cell's process."""
        if not self._quiet:
            say(f"{self._place[number]} {line}" if self._side_by_side else line)

    def note(self, text: str) -> None:
        """Print a line that belongs to no cell."""
        if not self._quiet:
            say(text)


def check_engine(executor: str, words: Sequence[str]) -> dict[str, Any]:
    """Read `--resource` and check it against the executor.

    Raises:
        UsageError: An unknown executor or key, or a resource that the executor does not have.
    """
    if executor not in EXECUTORS:
        raise UsageError(f"unknown executor {executor!r}", fix=nearest(executor, EXECUTORS))
    asked = read_resources(words)
    # refused and not ignored: a user who asks for 40 GB should learn that nobody reserves them
    ignored = {"local": tuple(asked), "ray": SLURM_ONLY, "slurm": ()}[executor]
    wrong = [key for key in asked if key in ignored]
    if wrong:
        raise UsageError(
            f"--resource {wrong[0]} does not go with --executor {executor}",
            fix="use --executor slurm" + (" or ray" if wrong[0] not in SLURM_ONLY else ""),
        )
    return asked


def open_engine(
    executor: str, asked: dict[str, Any], recipe: Recipe, cells: Sequence[RecipeCell], *,
    jobs: int | None, device: str, voice: Voice,
) -> Engine:  # fmt: skip
    """Open the engine; `--resource` overrides the recipe's [resources].

    Raises:
        PrunebenchError: What is missing for it.
    """
    if executor == "local":
        from prunebench.sweep.engines.local import LocalEngine, slots_of_machine

        devices = {cell.values["device"] if device == "auto" else device for cell in cells}
        return LocalEngine(slots_of_machine(jobs or 1, devices), show=voice.show)
    from prunebench.files import cache_dir, require_writable
    from prunebench.sweep.requirements import needs_gpu

    options = {**recipe.resources, **asked}
    if needs_gpu(recipe, cells, device=device):
        options.setdefault("gpus", 1)
    resources = Resources.of(options)
    if executor == "ray":
        from prunebench.sweep.engines.ray import RayEngine

        return RayEngine(resources, at_once=jobs, note=voice.note)
    from prunebench.sweep.engines.slurm import SlurmEngine

    folder = cache_dir() / "slurm"
    require_writable(folder)
    return SlurmEngine(resources, folder=folder, at_once=jobs)
