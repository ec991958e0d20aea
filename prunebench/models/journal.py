"""The journal of a run: save finished blocks, so that the same command can resume after a kill.

A run's folder has a safetensors file for each finished block, the calibration activations before
the next block, and a journal with their names and SHA-256. Nothing in it is trusted: a file that
differs from the journal counts as missing, and so do the blocks after it. Activations can always be
recomputed by running the finished blocks, bit for bit.

Nothing is flushed to disk (no fsync). What a power cut destroys is detected by its hash and
recomputed; an fsync after every block would cost more than that.
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
    """What a run saves besides its blocks.

    Attributes:
        command: The command line.
        title: Description of the run for messages.
        blocks: Number of blocks of the model.
        starts: How often the run was started.
        seconds: Pruning time so far.
        dense: `sha256` of the dense weights and `zeros` by linear, once counted.
        allocation: The fields of `Allocation`, once chosen.
        scored: Outcomes (JSON-serializable) by evaluator, with a hash of its key.
        result: The result as JSON, once it is ready to be saved.
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
        """Return the state in a journal; an empty state without a journal."""
        names = {field.name for field in fields(cls)}
        values = (journal or {}).get("facts", {})
        return cls(**{name: value for name, value in values.items() if name in names})


class RunJournal:
    """The saved blocks and state of one run, in a folder.

    Attributes:
        folder: The folder.
        state: What is saved besides the blocks.
        written_bytes: Bytes written by this process.
        write_seconds: Time that the writing took, including hashing.
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
        """Create and lock the folder for this process; return False if another one has locked it.

        Raises:
            SaveError: The folder cannot be created.
        """
        path = self.folder / _LOCK
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # a run that has just finished removed the folder
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
            os.close(handle)  # the file was removed between `open` and `flock`: try again

    def read(self) -> None:
        """Load the state and the blocks up to the first damaged one; remove all other files."""
        journal = read_journal(self.folder) or {}
        self.state = RunState.of_journal(journal)
        self._blocks, self._hidden = [], journal.get("hidden")
        for row in journal.get("blocks", []):
            if not _is_intact(self.folder, row):
                break  # the blocks after it would be resumed with a gap
            self._blocks.append(row)
        self._remove_unlisted()

    def discard_blocks(self) -> None:
        """Remove the finished blocks, for methods that cannot resume from them."""
        self._blocks, self._hidden = [], None
        self._remove_unlisted()

    def remove(self) -> None:
        """Remove the folder: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------ saving and loading

    @property
    def blocks(self) -> Sequence[dict[str, Any]]:
        """The rows of the finished blocks: `file`, `sha256`, `bytes`, `notes`."""
        return self._blocks

    def tensors_of(self, index: int) -> dict[str, StoredTensor]:
        """Return the stored tensors of a finished block, by their name in the model."""
        return stored_tensors([self.folder / self._blocks[index]["file"]])

    def save_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        *,
        notes: Sequence[Any] = (),
        hidden: Iterable[Tensor] | None = None,
    ) -> None:
        """Save a finished block and the activations after it.

        Args:
            index: Index of the block; later blocks are discarded.
            tensors: Its tensors, by their name in the model.
            notes: Events and losses of the pruning method (JSON-serializable).
            hidden: Inputs of the next block by batch, (samples, seqlen, hidden) each.

        Raises:
            SaveError: The disk is full; the blocks saved before remain.
        """
        self._blocks = self._blocks[:index]  # blocks after it saw other inputs
        row = self._write(f"block-{index:05d}.safetensors", tensors)
        old = self._hidden
        if hidden is not None:
            states = {str(batch): state for batch, state in enumerate(hidden)}
            self._hidden = self._write(f"hidden-{index + 1:05d}.safetensors", states)
            self._hidden["index"] = index + 1
        self._blocks.append(row | {"notes": list(notes)})
        self.save()
        # only now: a kill before `save` leaves the old journal, which names the old activations
        if old and self._hidden and old["file"] != self._hidden["file"]:
            (self.folder / old["file"]).unlink(missing_ok=True)

    def hidden_before(self, index: int) -> list[Tensor] | None:
        """Return the saved activations before a block, if they exist and are intact."""
        row = self._hidden
        if not row or row["index"] != index or not _is_intact(self.folder, row):
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
        """Update the state with the fields that `changes` returns at every save."""
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
        start_time = time.perf_counter()
        with self._renamed(name) as part:
            digest = write_tensors(part, tensors)
            size = part.stat().st_size
        self.write_seconds += time.perf_counter() - start_time
        self.written_bytes += size
        return {"file": name, "sha256": digest, "bytes": size}

    @contextlib.contextmanager
    def _renamed(self, name: str) -> Any:
        """Yield a temporary path; rename it to `name` if no error occurs. Nothing is flushed."""
        part = self.folder / f".{name}.part"
        try:
            yield part
            part.replace(self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise explain_os_error(error, self.folder / name) from error

    def _remove_unlisted(self) -> None:
        """Remove files that the journal does not list."""
        listed = {_JOURNAL, _LOCK, *(row["file"] for row in self._blocks)}
        if self._hidden:
            listed.add(self._hidden["file"])
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in listed and path.is_file():
                path.unlink(missing_ok=True)


def read_journal(folder: Path) -> dict[str, Any] | None:
    """Return the journal of a folder, or None if it is missing or damaged."""
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
    """What an interrupted run has saved, according to its journal; no file is hashed.

    Attributes:
        folder: Folder of the run.
        title: Description of the run.
        command: Its command line.
        done: Number of finished blocks.
        blocks: Number of blocks of the model.
        size: Bytes on disk.
        age_seconds: Time since the last write.
        running: Whether a process is working on it now.
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
    """Return what is saved in a folder; None if there is no such folder."""
    if not folder.is_dir():
        return None
    journal = read_journal(folder) or {}
    state = RunState.of_journal(journal)
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    run = RunJournal(folder)
    idle = run.lock()
    run.release()
    return JournalInfo(
        folder=folder,
        title=state.title,
        command=state.command,
        done=len(journal.get("blocks", [])),
        blocks=state.blocks,
        size=sum(file.st_size for file in files),
        age_seconds=time.time() - max((file.st_mtime for file in files), default=time.time()),
        running=not idle,
    )


def _is_at(path: Path, handle: int) -> bool:
    """Return whether a path still names the open file `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _is_intact(folder: Path, row: dict[str, Any]) -> bool:
    """Return whether a file has the size and SHA-256 in the journal."""
    path = folder / str(row["file"])
    try:
        complete = path.stat().st_size == row["bytes"]
        return complete and sha256_file(path) == str(row["sha256"])
    except OSError:
        return False
