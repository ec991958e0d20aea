"""The state of a training on disk, for any number of processes, and back.

`torch.distributed.checkpoint` writes what each process owns of a layer; a training that goes on
with another number of processes reads the rows that are then its own. A state is written beside the
last one, and takes its place and name when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from prunebench.errors import IncompatibleData, SaveError
from prunebench.files import explain_os_error
from prunebench.pruners.layer import Point
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.shards import Shards

_FACTS = "progress.json"


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Saves a training into a folder and finds it again.

    Attributes:
        folder: Of this very run: what lies there was made by the same specification.
        shards: This process among others.
    """

    folder: Path
    shards: Shards

    def save(self, learner: Learner) -> None:
        """Write the state; the one before it stays until this one is whole.

        Raises:
            SaveError: The folder cannot be written.
        """
        part = self.folder.with_name(f"{self.folder.name}.part")
        try:
            if self.shards.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            self._meet()
            save(self._tensors(learner), checkpoint_id=part, no_dist=self.shards.world == 1)
            if self.shards.rank == 0:
                facts = {
                    "done": learner.done,
                    "best_step": learner.progress.best_step,
                    "curve": [dataclasses.asdict(point) for point in learner.progress.curve],
                }
                (part / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
                self.clear()
                part.rename(self.folder)
            self._meet()
        except OSError as error:
            raise explain_os_error(error, self.folder) from error
        except CheckpointException as error:
            raise SaveError(
                f"cannot write {self.folder}",
                where=str(error).splitlines()[0][:200],
                fix="free space there, or use --set save_every=0",
            ) from error

    def restore(self, learner: Learner) -> bool:
        """Take up the state, if there is a whole one.

        Raises:
            IncompatibleData: It is damaged.
        """
        facts_file = self.folder / _FACTS
        if not facts_file.is_file():
            return False
        try:
            facts = json.loads(facts_file.read_text("utf-8"))
            tensors = self._tensors(learner)
            load(tensors, checkpoint_id=self.folder, no_dist=self.shards.world == 1)
            curve = [Point(**point) for point in facts["curve"]]
            done, best_step = int(facts["done"]), int(facts["best_step"])
        except (CheckpointException, OSError, ValueError, KeyError, TypeError) as error:
            raise IncompatibleData(
                f"the kept state in {self.folder} is damaged",
                where=str(error).splitlines()[0][:200],
                fix="remove that folder: the training then begins anew",
            ) from error
        learner.done, learner.progress.best_step = done, best_step
        learner.progress.curve = curve
        return True

    def clear(self) -> None:
        """Remove the state."""
        if self.shards.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _meet(self) -> None:
        if self.shards.world > 1:
            dist.barrier()

    def _tensors(self, learner: Learner) -> dict[str, Any]:
        """Return every tensor of the state, described so that any process finds its rows."""
        found: dict[str, Any] = {}
        for linear, layer in learner.layers.items():
            named = {"logits": layer.logits, "best": learner.progress.best[linear.name][None]}
            for name, packed in layer.state.items():
                named[name] = packed.values
                if packed.scales.numel():
                    named[f"{name}.scales"] = packed.scales
            for name, tensor in named.items():
                rows = tensor.view(len(tensor), layer.rows, -1)  # (choices, rows, in a row)
                found[f"{linear.name}.{name}"] = self._described(rows, linear.out_features)
        return found

    def _described(self, rows: Tensor, total: int) -> Any:
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
