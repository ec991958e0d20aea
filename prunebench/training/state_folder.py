"""The folder of a training's saved states: its lock, its facts, and what is saved there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunebench.calibration.training import Training
from prunebench.training.shards import Shards

FACTS = "progress.json"
"""The file in a state that says what it is of; the others are named in it, with their hashes."""

_LOCK = "lock"


@contextlib.contextmanager
def locked(data: Training, shards: Shards, *, creates: bool) -> Iterator[Path | None]:
    """Lock the folder of the states for this run; None if another one trains in it.

    Two runs of one command would replace each other's files. Of several processes the first locks.

    Args:
        data: What is trained on, and the folder.
        shards: This process among others.
        creates: Whether to create the folder.
    """
    if data.folder is None or not (creates or data.folder.exists()):
        yield None
        return
    lock, taken = FileLock(data.folder / _LOCK), False
    if shards.rank == 0:
        with contextlib.suppress(OSError):  # a full or read-only disk: saving a state says so
            data.folder.mkdir(parents=True, exist_ok=True)
        taken = not _acquired(lock)
    try:
        if taken := bool(shards.sum(float(taken))[0]):
            data.note(
                f"  another process trains this very command ({data.folder}): "
                "no state of this training is saved"
            )
        yield None if taken else data.folder
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    """Return False if another process holds a lock; without waiting."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError:
        pass  # a full or read-only disk: nobody else can lock it either
    return True


def complete_state(folder: Path) -> Path:
    """Return where the complete state of a folder is, if it has one."""
    # An interruption between the two renames of `CheckpointStore.save` leaves the previous one.
    return folder / ("state" if (folder / "state").exists() else "old")


def write_facts(state: Path, facts: dict[str, Any]) -> None:
    """Write what a state is of, and the hashes of its files."""
    # The digest is of the exact text, stored as a string: no second serialization has to match it.
    text = json.dumps(facts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (state / FACTS).write_text(json.dumps({"facts": text, "sha256": digest}), encoding="utf-8")


def read_facts(state: Path) -> dict[str, Any] | None:
    """Return the facts, or None if the file is missing or damaged."""
    try:
        stored = json.loads((state / FACTS).read_text("utf-8"))
        text = str(stored["facts"])
        sound = hashlib.sha256(text.encode()).hexdigest() == stored["sha256"]
        return dict(json.loads(text)) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class TrainingInfo:
    """What is saved of a training; no file is hashed.

    Attributes:
        folder: Folder of the states.
        title: What is trained; empty if nothing is saved yet.
        done: Number of steps saved.
        steps: Number of steps in all.
        size: Bytes on disk.
        age_seconds: Time since the last write.
        running: Whether a process trains in it now.
    """

    folder: Path
    title: str
    done: int
    steps: int
    size: int
    age_seconds: float
    running: bool

    def remove(self) -> None:
        """Remove the folder, unless a process trains in it now."""
        lock = FileLock(self.folder / _LOCK)
        if _acquired(lock):
            shutil.rmtree(self.folder, ignore_errors=True)
            lock.release()


def training_info(folder: Path) -> TrainingInfo | None:
    """Return what is saved in a folder; None if there is no such folder."""
    if not folder.is_dir():
        return None
    facts = read_facts(complete_state(folder)) or {}
    files = [path.stat() for path in folder.glob("*/*")]
    lock = FileLock(folder / _LOCK)
    running = not _acquired(lock)
    lock.release()
    return TrainingInfo(
        folder=folder,
        title=facts.get("title", ""),
        done=facts.get("done", 0),
        steps=facts.get("steps", 0),
        size=sum(file.st_size for file in files),
        age_seconds=time.time() - max((file.st_mtime for file in files), default=time.time()),
        running=running,
    )
