"""Save and restore the state of a training, with any number of processes.

`torch.distributed.checkpoint` writes the rows that each process owns; a training that resumes with
another number of processes reads the rows that it owns then. A state is written beside the last one
and replaces it when it is complete. It contains the hashes of its files; a state that does not
match them is never loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from prunebench.calibration.training import Training
from prunebench.errors import IncompatibleData, SaveError
from prunebench.files import explain_os_error, sha256_file
from prunebench.training.loop import TrainingLoop
from prunebench.training.shards import Shards
from prunebench.training.state_folder import (
    FACTS,
    complete_state,
    locked,
    read_facts,
    write_facts,
)


@dataclasses.dataclass(frozen=True)
class CheckpointStore:
    """Saves the state of a training to a folder and restores it.

    Attributes:
        folder: Of this run alone; its name identifies the specification.
        shards: This process among others.
        code: Hash of the code that trains.
        title: What is trained.
    """

    folder: Path
    shards: Shards
    code: str = ""
    title: str = ""

    def save(self, loop: TrainingLoop[Any]) -> None:
        """Write the state; the previous one stays until this one is complete.

        Raises:
            SaveError: The folder cannot be written; every process raises it.
        """
        # Written as `part`, renamed to `state`: rename is atomic within one file system.
        part, state, old = (self.folder / name for name in ("part", "state", "old"))

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

        def end() -> None:
            write_facts(part, self._facts(loop, hashes))
            shutil.rmtree(old, ignore_errors=True)
            if state.exists():  # moved, not removed: a complete state exists at any time
                state.rename(old)
            part.rename(state)
            shutil.rmtree(old, ignore_errors=True)

        self._in_first_process(begin)
        try:
            with _in_one_process_if_alone():
                save(self._tensors(loop), checkpoint_id=part, no_dist=self.shards.world == 1)
        except CheckpointException as error:
            raise SaveError(
                f"cannot write {self.folder}",
                where=_first_line(error),
                fix="free space there, or use --set save_every=0",
            ) from error
        # Hashes are of the files as they are on disk, so that `restore` compares like with like.
        hashes = self._hashes(part)
        self._in_first_process(end)

    def restore(self, loop: TrainingLoop[Any]) -> str:
        """Load the state, if there is a complete one.

        Returns:
            Why the state on disk cannot be used; empty if it was loaded or there is none.

        Raises:
            IncompatibleData: It belongs to another run, or was written by an incompatible torch.
        """
        state = complete_state(self.folder)
        if not state.exists():
            return ""
        facts = read_facts(state)
        sound = facts is not None and facts["files"] == self._hashes(state)
        # A file that any process finds damaged makes all of them start again.
        if facts is None or self.shards.sum(float(not sound))[0]:
            return f"the saved state in {self.folder} is damaged"
        if facts["run"] != self.folder.name:
            raise IncompatibleData(
                f"the saved state in {self.folder} is not of this run",
                where=f"it was saved by the run {facts['run']}",
                fix="move that folder back to where it was",
            )
        # No process goes on alone: the next saved state is written by all of them.
        if self.shards.sum(float(facts.get("code") != self.code))[0]:
            return (
                f"the saved state in {self.folder} is of other code, versions, hardware or weights"
            )
        # `load` writes in place, and `best` is at first the start's own tensors: they must not
        # change.
        loop.progress.best = {
            name: torch.empty_like(best) for name, best in loop.progress.best.items()
        }
        try:
            with _in_one_process_if_alone():
                load(self._tensors(loop), checkpoint_id=state, no_dist=self.shards.world == 1)
        except (CheckpointException, OSError, ValueError, KeyError) as error:
            raise IncompatibleData(
                f"the saved state in {self.folder} cannot be read",
                where=_first_line(error),
                fix="remove that folder: training then restarts from step 0",
            ) from error
        loop.done, loop.progress.best_step = facts["done"], facts["best_step"]
        loop.progress.curve = [loop.read_point(point) for point in facts["curve"]]
        return ""

    def _facts(self, loop: TrainingLoop[Any], hashes: dict[str, str]) -> dict[str, Any]:
        return {
            "run": self.folder.name,
            "code": self.code,
            "title": self.title,
            "steps": loop.steps,
            "done": loop.done,
            "best_step": loop.progress.best_step,
            "curve": [dataclasses.asdict(point) for point in loop.progress.curve],
            "files": hashes,
        }

    def _in_first_process(self, action: Callable[[], None]) -> None:
        """Run `action` in the first process; if it fails, every process raises the error."""
        failed: OSError | None = None
        if self.shards.rank == 0:
            try:
                action()
            except OSError as error:
                failed = error
        # Also a barrier: no process continues before the first one has finished.
        if self.shards.sum(float(failed is not None))[0]:
            raise explain_os_error(failed or OSError("the first process failed"), self.folder)

    def _hashes(self, state: Path) -> dict[str, str]:
        """Return the hash of every file; the files are divided among the processes."""
        names = sorted(path.name for path in state.iterdir() if path.name != FACTS)
        hashes = {
            name: sha256_file(state / name) for name in names[self.shards.rank :: self.shards.world]
        }
        if self.shards.world == 1:
            return hashes
        shares: list[Any] = [None] * self.shards.world
        dist.all_gather_object(shares, hashes)
        return {name: digest for share in shares for name, digest in share.items()}

    def _tensors(self, loop: TrainingLoop[Any]) -> dict[str, Any]:
        """Return every tensor of the state by name, sharded by rows of its layer."""
        return {name: self._sharded(rows, total) for name, rows, total in loop.saved_tensors()}

    def _sharded(self, rows: Tensor, total: int) -> Any:
        """Return the owned rows [k, rows, width] as a DTensor of all `total` rows.

        With `total` 0 every process has the same tensor, and it is saved once.
        """
        if self.shards.world == 1 or not total:
            return rows
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh(rows.device.type, (self.shards.world,))
        shape = torch.Size((rows.shape[0], total, rows.shape[2]))
        return DTensor.from_local(
            rows, mesh, [Shard(1)], run_check=False, shape=shape,
            stride=(total * rows.shape[2], rows.shape[2], 1),
        )  # fmt: skip


def train_saved(
    loop: TrainingLoop[Any],
    data: Training,
    *,
    eval_every: int,
    save_every: int,
) -> int:
    """Train from the state that an earlier start has saved, if any, and save the state meanwhile.

    Args:
        loop: The training.
        data: The windows, the folder of the states, and whom to call.
        eval_every: Steps between two evaluations on the held-out windows.
        save_every: Steps between two saved states; 0 for never.

    Returns:
        The step that the training resumed from; 0 if it did not.

    Raises:
        IncompatibleData: The loss or a gradient is not finite; the state before that is saved.
    """
    with locked(data, loop.shards, creates=save_every > 0) as folder:
        store = None
        if folder is not None:
            store = CheckpointStore(folder, loop.shards, data.code, data.title)
        return _train_in(store, loop, data, eval_every=eval_every, save_every=save_every)


def _train_in(
    store: CheckpointStore | None,
    loop: TrainingLoop[Any],
    data: Training,
    *,
    eval_every: int,
    save_every: int,
) -> int:
    """See `train_saved`; without a store nothing is saved."""
    resumed = _resume(store, loop, data) if store is not None else 0

    def after_step(point: Any) -> None:
        data.on_point(point)
        if store is None or not (save_every and point.step):
            return
        if point.step == loop.steps or point.step % save_every == 0:
            _save(store, loop, data)

    try:
        loop.learn(data.train, data.held_out, eval_every=eval_every, after_step=after_step)
    except IncompatibleData as error:
        if store is not None and save_every:
            _save(store, loop, data)
            error.where += f", saved in {store.folder}"
        raise
    return resumed


def _resume(store: CheckpointStore, loop: TrainingLoop[Any], data: Training) -> int:
    """Load the saved state of this run, if any; return the step it is from."""
    reason = store.restore(loop)
    if reason:
        data.note(f"  {reason}: training restarts from step 0")
    if loop.done:
        data.note(f"  training resumed after step {loop.done}, saved in {store.folder}")
        for point in loop.progress.curve:
            data.on_point(point)
    return loop.done


def _save(store: CheckpointStore, loop: TrainingLoop[Any], data: Training) -> None:
    """Save the state; a full disk does not stop the training."""
    try:
        store.save(loop)
    except SaveError as error:
        data.note(f"  step {loop.done} could not be saved: {error.what} ({error.where})")


@contextlib.contextmanager
def _in_one_process_if_alone() -> Iterator[None]:
    """Silence the warning that torch.distributed is not initialized in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
