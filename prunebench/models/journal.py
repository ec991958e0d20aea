"""What a run has finished, kept on disk so that the same command can go on after a kill.

A folder holds one safetensors file a finished block, the calibration activations before the next
one, and a journal that names them with their SHA-256. Nothing in it is trusted: a file that is not
what the journal says is as good as not there, and so are the blocks behind it. Activations can
always be made again by running the finished blocks, bit for bit.

Nothing is flushed to the disk here. What a power cut takes away is found by its hash and done
again; waiting for the disk after every block would cost more than that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunebench.files import explain_os_error, sha256_file
from prunebench.models.safetensors_files import StoredTensor, stored_tensors
from prunebench.models.tensor_files import read_tensor, write_tensors

_JOURNAL = "journal.json"
_LOCK = "lock"


@dataclass(frozen=True)
class RunState:
    """What a run saves besides its blocks, so that a resumed run has it again.

    Attributes:
        command: The command line.
        title: What is run, for people.
        blocks: Number of blocks of the model.
        starts: How often the run was started.
        seconds: Time that the pruning has taken so far.
        dense: `sha256` of the dense weights and `zeros` by linear, once counted.
        allocation: The fields of `Allocation`, once chosen.
        scored: Outcomes as JSON has them, by evaluator.
        result: The result as JSON, once it is about to be filed.
    """

    command: str = ""
    title: str = "a run that left no journal"
    blocks: int = 0
    starts: int = 0
    seconds: float = 0.0
    dense: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    scored: dict[str, Any] = field(default_factory=dict)
    result: str | None = None

    @classmethod
    def of_journal(cls, journal: dict[str, Any] | None) -> RunState:
        """Read it from a journal; an empty state without one."""
        names = {field.name for field in fields(cls)}
        rows = (journal or {}).get("facts", {})
        return cls(**{name: value for name, value in rows.items() if name in names})


class RunJournal:
    """The folder of one run.

    Attributes:
        folder: Where it is.
        state: What else a resumed run needs.
        written_bytes: What this process has written.
        write_seconds: How long that took, hashing included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = RunState()
        self.written_bytes = 0
        self.write_seconds = 0.0
        self._blocks: list[dict[str, Any]] = []
        self._hidden: dict[str, Any] | None = None
        self._lock: int | None = None
        self._at_save: Callable[[], dict[str, Any]] = dict

    # ------------------------------------------------------------ opening and closing

    def lock(self) -> bool:
        """Make the folder and take it for this process; False if another one has it.

        Raises:
            SaveError: It cannot be made.
        """
        path = self.folder / _LOCK
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # a run that was finished has just removed the folder
            except OSError as error:
                raise explain_os_error(error, self.folder) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return False
            if _is_at(path, handle):
                self._lock = handle
                return True
            os.close(handle)  # it was removed between the opening and the lock

    def read(self) -> None:
        """Find out what is there and sound; what is not is removed."""
        journal = read_journal(self.folder) or {}
        self.state = RunState.of_journal(journal)
        self._blocks, self._hidden = [], journal.get("hidden")
        for row in journal.get("blocks", []):
            if not _is_sound(self.folder, row):
                break
            self._blocks.append(row)
        self._sweep()

    def discard_blocks(self) -> None:
        """Forget the finished blocks: the method cannot go on from them."""
        self._blocks, self._hidden = [], None
        self._sweep()

    def remove(self) -> None:
        """Remove the folder: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------ what is kept

    @property
    def blocks(self) -> Sequence[dict[str, Any]]:
        """The rows of the finished blocks: `file`, `sha256`, `bytes`, `notes`."""
        return self._blocks

    def tensors_of(self, index: int) -> dict[str, StoredTensor]:
        """Return where the tensors of a finished block lie, by their name in the model."""
        return stored_tensors([self.folder / self._blocks[index]["file"]])

    def save_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        *,
        notes: Sequence[Any] = (),
        hidden: Iterable[Tensor] | None = None,
    ) -> None:
        """Keep a finished block and the activations behind it.

        Raises:
            SaveError: The disk is full; what was kept before stays as it is.
        """
        self._blocks = self._blocks[:index]
        row = self._write(f"block-{index:05d}.safetensors", tensors)
        old = self._hidden
        if hidden is not None:
            states = {str(batch): state for batch, state in enumerate(hidden)}
            self._hidden = self._write(f"hidden-{index + 1:05d}.safetensors", states)
            self._hidden["index"] = index + 1
        self._blocks.append(row | {"notes": list(notes)})
        self.save()
        if old and self._hidden and old["file"] != self._hidden["file"]:
            (self.folder / old["file"]).unlink(missing_ok=True)

    def hidden_before(self, index: int) -> list[Tensor] | None:
        """Return the activations before a block, if they are there and sound."""
        row = self._hidden
        if not row or row["index"] != index or not _is_sound(self.folder, row):
            return None
        stored = stored_tensors([self.folder / row["file"]])
        return [
            read_tensor(stored[str(batch)], getattr(torch, stored[str(batch)].dtype))
            for batch in range(len(stored))
        ]

    def update(self, **changes: Any) -> None:
        """Change fields of the state, and save it.

        Raises:
            SaveError: The disk is full.
        """
        self.state = replace(self.state, **changes)
        self.save()

    @contextlib.contextmanager
    def on_save(self, changes: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Let the fields that `changes` returns be updated at every save."""
        self._at_save = changes
        try:
            yield
        finally:
            self._at_save = dict

    def save(self) -> None:
        """Write the journal.

        Raises:
            SaveError: The disk is full.
        """
        self.state = replace(self.state, **self._at_save())
        text = json.dumps(
            {"facts": asdict(self.state), "blocks": self._blocks, "hidden": self._hidden},
            sort_keys=True,
        )
        with self._renamed(_JOURNAL) as part:
            part.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n", "utf-8")

    # ------------------------------------------------------------ files

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        begun = time.perf_counter()
        with self._renamed(name) as part:
            digest = write_tensors(part, tensors)
            size = part.stat().st_size
        self.write_seconds += time.perf_counter() - begun
        self.written_bytes += size
        return {"file": name, "sha256": digest, "bytes": size}

    @contextlib.contextmanager
    def _renamed(self, name: str) -> Any:
        """Yield a temporary path that takes the name when it is whole; nothing is flushed."""
        part = self.folder / f".{name}.part"
        try:
            yield part
            part.replace(self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise explain_os_error(error, self.folder / name) from error

    def _sweep(self) -> None:
        """Remove files that belong to nothing."""
        known = {_JOURNAL, _LOCK, *(row["file"] for row in self._blocks)}
        if self._hidden:
            known.add(self._hidden["file"])
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in known and path.is_file():
                path.unlink(missing_ok=True)


def read_journal(folder: Path) -> dict[str, Any] | None:
    """Return the journal of a folder, or None if there is none that is whole."""
    try:
        digest, _, text = (folder / _JOURNAL).read_text("utf-8").partition("\n")
        text = text.removesuffix("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        journal = json.loads(text)
    except (OSError, ValueError):
        return None
    return journal if isinstance(journal, dict) else None


@dataclass(frozen=True)
class JournalInfo:
    """What an interrupted run has left, by its journal: nothing is hashed here.

    Attributes:
        title: What was run.
        done: Finished blocks.
        blocks: All blocks.
        size: Bytes on disk.
        age_seconds: Since something was written.
        running: Whether a process is at it now.
    """

    folder: Path
    title: str
    command: str
    done: int
    blocks: int
    size: int
    age_seconds: float
    running: bool


def journal_info(folder: Path) -> JournalInfo | None:
    """Return what is kept in a folder; None if there is no such folder."""
    if not folder.is_dir():
        return None
    journal = read_journal(folder) or {}
    state = RunState.of_journal(journal)
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    kept = RunJournal(folder)
    free = kept.lock()
    kept.release()
    return JournalInfo(
        folder=folder,
        title=state.title,
        command=state.command,
        done=len(journal.get("blocks", [])),
        blocks=state.blocks,
        size=sum(one.st_size for one in files),
        age_seconds=time.time() - max((one.st_mtime for one in files), default=time.time()),
        running=not free,
    )


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _is_sound(folder: Path, row: dict[str, Any]) -> bool:
    """Return whether a file is what the journal says, by size and SHA-256."""
    path = folder / str(row["file"])
    try:
        whole = path.stat().st_size == row["bytes"]
        return whole and sha256_file(path) == str(row["sha256"])
    except OSError:
        return False
