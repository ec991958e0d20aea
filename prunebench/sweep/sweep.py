"""Run the cells of a recipe: one process per cell, finished cells skipped, failures recorded.

    sweep = Sweep(setup, engine=LocalEngine(slots, show=show))
    for outcome in sweep.run(recipe.cells): ...

A cell is finished when the shared table holds a result of the very same spec, resolved to content
(weights, texts, options, seed): the same command resumes a sweep that was stopped or killed. With a
process per cell, each starts with clean memory and has a peak of its own. Every cell is checked on
the machine that runs the sweep before it is submitted; the job checks again whether its cell is
finished, so that several sweeps of one recipe repeat little. A failed cell is retried once unless
its exit code says that it would fail the same way; then a `failed` record is saved.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from prunebench.errors import MissingResource, PrunebenchError, UsageError
from prunebench.models.source import fetch_model, find_model, local_path
from prunebench.progress import Silent
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore, read_result
from prunebench.run.dtype import choose_dtype
from prunebench.run.plan import load_inputs
from prunebench.run.resolve import ResolvedSpec, resolve
from prunebench.run.result import failed_result
from prunebench.run_options import RUN_OPTIONS
from prunebench.spec import AUTO, RunSpec, Setup
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.engines import Engine
from prunebench.sweep.engines.job import Job, JobEnd, Refused
from prunebench.sweep.engines.local import LocalEngine

_TRIES = 2  # a lost node or a GPU that others filled may be gone by the second
_INTERRUPTED = 130
_FINAL = (2, 4, 6, _INTERRUPTED)  # usage, damaged data, a check: the same again would not help
_ARRIVAL_SECONDS, _ARRIVAL_POLL_SECONDS = 60.0, 1.0  # a network file system hides new files a while
_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell.

    Attributes:
        state: `finished` before, `done` now, `failed`, or `to run` (of a dry run).
        result: The saved result, unless it failed.
        reason: Why it failed, in one line.
        exit_code: That of its process.
        tries: Number of starts.
    """

    cell: RecipeCell
    state: Literal["finished", "done", "failed", "to run"]
    result: Result | None = None
    reason: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    tries: int = 0


@dataclass(frozen=True)
class _Attempt:
    """A cell that waits or runs, and the ids of the failures saved before it."""

    cell: RecipeCell
    spec: RunSpec | None = None  # None until the first `_begin` has resolved it
    failed_before: frozenset[str] = frozenset()  # tells a record of this job from older ones
    tries: int = 0


def parse_shard(text: str) -> tuple[int, int]:
    """Read `2/8`: the second of eight equal parts.

    Raises:
        UsageError: It is not of that form, or there is no such part.
    """
    match = _SHARD.fullmatch(text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"--shard {text!r} is no part of a whole", fix="as in --shard 2/8")
    return part, parts


def shard(cells: Sequence[RecipeCell], part: int, parts: int) -> list[RecipeCell]:
    """Return every `parts`-th cell, from the `part`-th on."""
    # strided and not in runs: neighbors often share a model, and the large models are spread out
    return list(cells[part - 1 :: parts])


class Sweep:
    """Runs the cells of a recipe on an engine.

    Args:
        setup: What all cells share: results folder, device, batch size, task files, samples.
        engine: Where they run.
        tell: Called with a cell and one line: its job, a retry.
        here: Whether cells run on this machine; by default, whether the engine is local.
        on_gpu: Whether cells that run elsewhere have a GPU there.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        engine: Engine | None = None,
        tell: Callable[[RecipeCell, str], None] = lambda cell, line: None,
        here: bool | None = None,
        on_gpu: bool = False,
    ) -> None:
        self._setup = setup
        self._engine = engine or LocalEngine([{}], show=lambda number, line: None)
        # a dry run has no engine, and must still know where the cells would run
        self._here = isinstance(self._engine, LocalEngine) if here is None else here
        self._tell = tell
        self._on_gpu = on_gpu
        self._store = ResultStore(setup.results_dir)
        self._running: dict[int, _Attempt] = {}
        self._at_once = self._engine.at_once

    def with_dtype(self, cell: RecipeCell) -> RecipeCell:
        """Choose the dtype of a cell for another machine, which then is part of its command.

        `auto` may mean another dtype there, and the sweep must know which result to wait for.
        """
        # here the job resolves `auto` the same way as this process does
        if self._here or cell.values["dtype"] != AUTO:
            return cell
        # without a GPU there, nothing is known of that CPU: float32 works on any
        dtype = "float32"
        if self._on_gpu:
            source = find_model(cell.values["model"])
            # the choice needs the headers of the checkpoint, so the model is fetched here
            folder = local_path(source) or fetch_model(source, Silent()).path
            # only names the device type: this machine needs no GPU for it
            dtype = choose_dtype(AUTO, source, folder, torch.device("cuda")).dtype
        chosen = {"dtype": dtype}
        return replace(cell, given={**cell.given, **chosen}, values={**cell.values, **chosen})

    def resolve(self, cell: RecipeCell) -> ResolvedSpec:
        """Resolve a cell's names on this machine, and fetch its model.

        Raises:
            PrunebenchError: The cell cannot be run: what `prunebench run` would say.
        """
        device = cell.values["device"] if self._setup.device == "auto" else self._setup.device
        setup = replace(
            self._setup,
            # cells that run elsewhere are resolved on the CPU: the device is no part of the spec,
            # and this login node may have no GPU
            device=device if self._here else "cpu",
            command=shlex.join(self.command(cell)),
        )
        # both options are refused without tasks; other cells of the sweep may have some
        if not cell.values["tasks"]:
            setup = replace(setup, batch_size=None, include_path=None)
        return resolve(cell.spec, setup)

    def finished(self, cell: RecipeCell) -> Result | None:
        """Return the newest finished result of the same spec, if there is one.

        Raises:
            PrunebenchError: As for `resolve`.
        """
        return self._store.newest(self.resolve(cell).spec)

    def run(self, cells: Sequence[RecipeCell]) -> Generator[CellOutcome]:
        """Run the cells that are not finished, and yield the outcome of each as it ends.

        Closing the iterator, or an interrupt, ends all jobs.
        """
        waiting = deque(_Attempt(cell) for cell in cells)
        try:
            while waiting or self._running:
                # fill the free places first, then wait for one to become free
                full = self._at_once is not None and len(self._running) >= self._at_once
                if waiting and not full:
                    outcome = self._begin(waiting.popleft(), waiting)
                else:
                    outcome = self._end(*self._engine.wait(), waiting)
                if outcome:
                    yield outcome
        finally:
            # also reached by GeneratorExit and KeyboardInterrupt at the `yield` or in `wait`
            if self._running:
                self._engine.cancel()
            self._engine.close()

    def _begin(self, attempt: _Attempt, waiting: deque[_Attempt]) -> CellOutcome | None:
        """Submit a cell to the engine, unless it is finished or fails the checks."""
        cell = attempt.cell
        try:
            cell = self.with_dtype(cell)
            attempt = replace(attempt, cell=cell)
            resolved = self.resolve(cell)
            spec = resolved.spec
            result = self._store.newest(spec)
            if result:
                return CellOutcome(cell, "done" if attempt.tries else "finished", result)
            # the windows and texts are dropped again: the job cuts its own
            load_inputs(resolved)  # what `prunebench run` would refuse is refused here
        except PrunebenchError as error:
            reason = " / ".join(str(error).splitlines())
            return CellOutcome(cell, "failed", reason=reason, exit_code=error.exit_code)
        # once, at the first start: a failure that the first try saved must count as new at the
        # second
        if attempt.spec is None:
            attempt = replace(attempt, spec=spec, failed_before=self._failed(spec))
        try:
            name = self._engine.submit(self._job(cell))
        except Refused:
            # no job of ours is queued, so waiting would not help: the options are wrong
            if not self._running:
                raise
            # the queue is full: from now on keep as many as it took, and put the cell back
            self._at_once = len(self._running)
            waiting.appendleft(attempt)
            return None
        self._running[cell.number] = replace(attempt, tries=attempt.tries + 1)
        self._tell(cell, name)
        return None

    def _end(self, job: Job, end: JobEnd, waiting: deque[_Attempt]) -> CellOutcome | None:
        """Fetch the result of a job that ended, or retry it, or record its failure."""
        attempt = self._running.pop(job.number)
        cell, reason = attempt.cell, end.reason
        # success counts only when the result can be read: the job may have written to a folder of
        # the same name on another machine
        if end.code == 0:
            result = self._arrived(attempt, end.result_id)
            if result:
                return CellOutcome(cell, "done", result, seconds=end.seconds, tries=attempt.tries)
            reason = (
                f"its result {end.result_id} did not arrive in {self._store.root}: "
                "is the folder the same on all machines?"
            )
        # somebody interrupted the cell, not the sweep: the user wants both to stop. On a cluster
        # 130 is a preempted worker or a lost parent, and only that cell has failed
        if end.code == _INTERRUPTED and self._here:
            raise KeyboardInterrupt
        if end.code not in _FINAL and attempt.tries < _TRIES:
            self._tell(cell, f"failed: {reason}: retrying once")
            waiting.appendleft(attempt)
            return None
        self._record(attempt, end, reason)
        return CellOutcome(
            # None (lost) and 0 (its result did not arrive) count as 1
            cell, "failed", reason=reason, exit_code=end.code or 1, seconds=end.seconds,
            tries=attempt.tries,
        )  # fmt: skip

    def _arrived(self, attempt: _Attempt, result_id: str) -> Result | None:
        """Return the result that a job filed; a shared file system may show it a little later."""
        assert attempt.spec is not None
        deadline = time.monotonic() + _ARRIVAL_SECONDS
        while True:
            # without an id (its stdout was cut off) any result of the same spec will do
            result = self._filed(result_id) if result_id else self._store.newest(attempt.spec)
            if result or time.monotonic() > deadline:
                return result
            time.sleep(_ARRIVAL_POLL_SECONDS)

    def _filed(self, result_id: str) -> Result | None:
        try:
            result = read_result(self._store.find(result_id))
        # not there yet, or not yet visible through a network file system's cache
        except (UsageError, MissingResource):
            return None
        # a damaged file may still be arriving: look again
        return result if isinstance(result, Result) else None

    def _failed(self, spec: RunSpec) -> frozenset[str]:
        return frozenset(result.id for result in self._store.of(spec) if result.status == "failed")

    def _record(self, attempt: _Attempt, end: JobEnd, reason: str) -> None:
        """Save a `failed` record, unless the run saved one itself."""
        assert attempt.spec is not None
        # the run caught its own error and knows the true stage: one record is enough
        if self._failed(attempt.spec) - attempt.failed_before:
            return
        # None: killed with its node; a code: ended by a signal or at its import
        error = "WorkerLost" if end.code is None else "ProcessFailed"
        if not self._here:
            reason += " (the hardware here is that of the machine that ran the sweep)"
        try:
            resolved = self.resolve(attempt.cell)
            record = failed_result(
                resolved, error=error, stage=end.stage or "sweep", message=reason
            )
            self._store.publish(record)
        except PrunebenchError as unsaved:
            self._tell(attempt.cell, f"the failure could not be saved: {unsaved.what}")

    def _job(self, cell: RecipeCell) -> Job:
        return Job(
            number=cell.number,
            words=tuple(self.command(cell)[1:]),
            folder=str(Path.cwd()),  # relative paths of the recipe, on a shared file system
            settings=_settings(os.environ),
        )

    def command(self, cell: RecipeCell) -> list[str]:
        """Return the command that runs a cell, as one would type it."""
        setup = self._setup
        # the cell's options first: of an option given twice the last counts, so --device overrides
        words = ["prunebench", "run", *cell.arguments, "--results-dir", str(setup.results_dir)]
        if setup.device != "auto":
            words += ["--device", setup.device]
        if cell.values["tasks"] and setup.batch_size is not None:
            words += ["--batch-size", str(setup.batch_size)]
        if cell.values["tasks"] and setup.include_path is not None:
            words += ["--include-path", str(setup.include_path)]
        return [*words, *(["--log-samples"] if setup.log_samples else []), "--json"]


def _settings(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the changes to the environment of a job.

    Variables that would override the recipe are removed; a token is never sent.
    """
    # PRUNEBENCH_METHOD and the like: in the job they would silently fill in what a cell leaves out
    variables = [option.variable for option in RUN_OPTIONS.values() if option.variable]
    sent: dict[str, str | None] = {
        name: value
        for name, value in environment.items()
        # a cluster job does not inherit our environment; caches and mirrors must be the same. A
        # token would be pickled into the scheduler's files
        if name.startswith(("PRUNEBENCH_", "HF_")) and "TOKEN" not in name
    }
    # value None: removed in the job, also if its own environment sets it
    ours = dict.fromkeys([*variables, "PRUNEBENCH_RECIPE"])
    # once: if another sweep of this recipe has finished the cell meanwhile, the job shows that
    # result
    return sent | ours | {"PRUNEBENCH_ONCE": "1"}
