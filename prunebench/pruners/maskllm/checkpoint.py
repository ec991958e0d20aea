"""Save and restore the state of a training, with any number of processes.

`torch.distributed.checkpoint` writes the rows that each process owns; a training that resumes with
another number of processes reads the rows that it owns then. A state is written beside the last one
and replaces it when it is complete. It contains the hashes of its files; a state that does not
match them is never loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
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

from prunebench.errors import IncompatibleData, SaveError
from prunebench.files import explain_os_error, sha256_file
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.shards import Shards
from prunebench.pruners.training import CurvePoint

_FACTS = "progress.json"


@dataclasses.dataclass(frozen=True)
class CheckpointStore:
    """Saves the state of a training to a folder and restores it.

    Attributes:
        folder: Of this run alone; its name identifies the specification.
        shards: This process among others.
    """

    folder: Path
    shards: Shards

    def save(self, learner: Learner) -> None:
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
            _write_facts(part / _FACTS, self._facts(learner, hashes))
            shutil.rmtree(old, ignore_errors=True)
            if state.exists():  # moved, not removed: a complete state exists at any time
                state.rename(old)
            part.rename(state)
            shutil.rmtree(old, ignore_errors=True)

        self._in_first_process(begin)
        try:
            with _in_one_process_if_alone():
                save(self._tensors(learner), checkpoint_id=part, no_dist=self.shards.world == 1)
        except CheckpointException as error:
            raise SaveError(
                f"cannot write {self.folder}",
                where=_first_line(error),
                fix="free space there, or use --set save_every=0",
            ) from error
        # Hashes are of the files as they are on disk, so that `restore` compares like with like.
        hashes = self._hashes(part)
        self._in_first_process(end)

    def restore(self, learner: Learner) -> str:
        """Load the state, if there is a complete one.

        Returns:
            Why the state on disk cannot be used; empty if it was loaded or there is none.

        Raises:
            IncompatibleData: It belongs to another run, or was written by an incompatible torch.
        """
        # An interruption between the two renames of `save` leaves the previous state in `old`.
        state = self.folder / ("state" if (self.folder / "state").exists() else "old")
        if not state.exists():
            return ""
        facts = _read_facts(state / _FACTS)
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
        # `load` writes in place, and `best` is at first the prior's own tensors: they must not
        # change.
        learner.progress.best = {
            name: torch.empty_like(best) for name, best in learner.progress.best.items()
        }
        try:
            with _in_one_process_if_alone():
                load(self._tensors(learner), checkpoint_id=state, no_dist=self.shards.world == 1)
        except (CheckpointException, OSError, ValueError, KeyError) as error:
            raise IncompatibleData(
                f"the saved state in {self.folder} cannot be read",
                where=_first_line(error),
                fix="remove that folder: training then restarts from step 0",
            ) from error
        learner.done, learner.progress.best_step = facts["done"], facts["best_step"]
        learner.progress.curve = [CurvePoint(**point) for point in facts["curve"]]
        return ""

    def _facts(self, learner: Learner, hashes: dict[str, str]) -> dict[str, Any]:
        return {
            "run": self.folder.name,
            "done": learner.done,
            "best_step": learner.progress.best_step,
            "curve": [dataclasses.asdict(point) for point in learner.progress.curve],
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
        names = sorted(path.name for path in state.iterdir() if path.name != _FACTS)
        hashes = {
            name: sha256_file(state / name) for name in names[self.shards.rank :: self.shards.world]
        }
        if self.shards.world == 1:
            return hashes
        shares: list[Any] = [None] * self.shards.world
        dist.all_gather_object(shares, hashes)
        return {name: digest for share in shares for name, digest in share.items()}

    def _tensors(self, learner: Learner) -> dict[str, Any]:
        """Return every tensor of the state by name, sharded by rows of its layer."""
        tensors: dict[str, Any] = {}
        for linear, layer in learner.layers.items():
            best = learner.progress.best[linear.name][None]  # [1, groups]
            named = {"logits": layer.logits, "best": best}  # logits: [choices, groups]
            named |= {name: packed.values for name, packed in layer.state.items()}
            for name, tensor in named.items():
                rows = tensor.view(len(tensor), layer.rows, layer.width)  # [choices, rows, width]
                tensors[f"{linear.name}.{name}"] = self._sharded(rows, linear.out_features)
            for name, packed in layer.state.items():
                if packed.scales.shape[1]:
                    rows = packed.scales[..., None]  # [choices, rows, 1]
                    tensors[f"{linear.name}.{name}.scales"] = self._sharded(
                        rows, linear.out_features
                    )
        return tensors

    def _sharded(self, rows: Tensor, total: int) -> Any:
        """Return the owned rows [choices, rows, width] as a DTensor of all `total` rows."""
        if self.shards.world == 1:
            return rows
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh(rows.device.type, (self.shards.world,))
        shape = torch.Size((rows.shape[0], total, rows.shape[2]))
        return DTensor.from_local(
            rows, mesh, [Shard(1)], run_check=False, shape=shape,
            stride=(total * rows.shape[2], rows.shape[2], 1),
        )  # fmt: skip


@contextlib.contextmanager
def _in_one_process_if_alone() -> Iterator[None]:
    """Silence the warning that torch.distributed is not initialized in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    # The digest is of the exact text, stored as a string: no second serialization has to match it.
    text = json.dumps(facts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({"facts": text, "sha256": digest}), encoding="utf-8")


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Return the facts, or None if the file is missing or damaged."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        text = str(stored["facts"])
        sound = hashlib.sha256(text.encode()).hexdigest() == stored["sha256"]
        return dict(json.loads(text)) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
