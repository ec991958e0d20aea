"""Files of the hub: out of the cache where they are there, else fetched; and verified, once.

The cache is that of huggingface_hub, in which a file is named by its hash: SHA-256 where it is
large (LFS), Git's SHA-1 of a blob where it is small. A file that is not what its name says is
deleted and fetched again. What has been verified is remembered by size and times, so that tens of
gigabytes are read for it once and not at every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from prunebench.download.hub import asking, patiently
from prunebench.errors import IncompatibleData
from prunebench.files import cache_dir, write_text
from prunebench.progress import Progress

Kind = Literal["model", "dataset"]

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Wanted:
    """Which files of a repository: names that match one of `allow` and none of `ignore`."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...] = ()

    def snapshot(self, repository: str, revision: str | None, *, cached: bool = False) -> Path:
        """Call huggingface_hub's snapshot_download; `cached` touches no network."""
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(self.allow),
                ignore_patterns=list(self.ignore),
                local_files_only=cached,
            )
        )


def cached_file(
    repository: str, name: str, *, revision: str | None, kind: Kind = "model"
) -> Path | None:
    """Return where a file lies in the cache, or None; no network is touched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return Path(
            hf_hub_download(
                repository, name, revision=revision, repo_type=kind, local_files_only=True
            )
        )
    return None


def fetch_file(
    repository: str,
    name: str,
    *,
    revision: str | None,
    kind: Kind = "model",
    progress: Progress,
    fix: str,
) -> Path:
    """Return a file of the hub, whole: out of the cache, else downloaded.

    Args:
        repository: `org/name`.
        name: Path of the file in it.
        revision: Branch, tag or commit; None is the main branch.
        kind: Of the repository.
        progress: Hears of a download and of a verification.
        fix: What the user can do instead, where the hub fails.

    Raises:
        MissingResource: It is not here, and cannot be downloaded; the reason is said.
        IncompatibleData: What arrives is not what the hub announces.
        SaveError: The cache cannot be written.
    """
    path = cached_file(repository, name, revision=revision, kind=kind)
    if path is None:
        path = _download_file(repository, name, revision, kind, progress, fix)
    if not _due([path]):
        return path
    with _lock():  # of two runs the second waits, and finds it verified
        if _damaged([path], progress):
            progress.note(f"{repository} {name} is damaged in the cache: it is fetched again")
            _delete(path)
            commit = path.parents[name.count("/")].name  # not the branch: it may have moved on
            path = _download_file(repository, name, commit, kind, progress, fix)
            _require_whole([path], repository, progress)
    return path


def _download_file(
    repository: str, name: str, revision: str | None, kind: Kind, progress: Progress, fix: str
) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    with (
        progress.stage("download", detail=f"{repository} {name}"),
        asking(f"{repository} {name}", fix=fix, revision=revision),
    ):
        url = hf_hub_url(repository, name, repo_type=kind, revision=revision)
        # Asked first: hf_hub_download says of every failure that the file is not in the cache.
        facts = patiently(lambda: get_hf_file_metadata(url))
        path = Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
    _announce({path: facts.etag})
    return path


def cached_snapshot(repository: str, wanted: Wanted, *, revision: str | None) -> Path | None:
    """Return the folder of a model that is all in the cache, or None; no network is touched."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return wanted.snapshot(repository, revision, cached=True)
    return None


def describe(repository: str, *, revision: str | None, fix: str) -> Any:
    """Ask the hub for a model's commit and files with their hashes (`ModelInfo`).

    Raises:
        MissingResource: The hub fails, or refuses; the reason is said.
    """
    from huggingface_hub import HfApi

    with asking(repository, fix=fix, revision=revision):
        return patiently(
            lambda: HfApi().model_info(repository, revision=revision, files_metadata=True)
        )


def download_snapshot(
    repository: str, wanted: Wanted, *, revision: str | None, info: Any, fix: str
) -> Path:
    """Download a model that `info` describes; huggingface_hub names a file when it is whole.

    Raises:
        MissingResource: The hub fails, or refuses; the reason is said.
        SaveError: The cache cannot be written.
    """
    with asking(repository, fix=fix, revision=revision):
        folder = wanted.snapshot(repository, revision)
    hashes = {
        folder / file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
        for file in info.siblings or ()
    }
    _announce({path: digest for path, digest in hashes.items() if path.exists()})
    return folder


def verify_snapshot(
    folder: Path, repository: str, wanted: Wanted, *, progress: Progress, fix: str
) -> None:
    """Verify the files of a snapshot in the cache, and fetch again what is damaged.

    Raises:
        MissingResource: A file is damaged, and cannot be downloaded.
        IncompatibleData: What arrives is not what the hub announces.
    """
    from huggingface_hub import HfApi

    if not _due(_files(folder)):
        return
    with _lock():
        damaged = _damaged(_files(folder), progress)
        if not damaged:
            return
        names = ", ".join(path.name for path in damaged)
        progress.note(f"{repository}: damaged in the cache, and fetched again: {names}")
        for path in damaged:
            _delete(path)
        commit = folder.name  # not the branch: it may have moved on
        with (
            progress.stage("download", detail=f"{repository} {names}"),
            asking(repository, fix=fix, revision=commit),
        ):
            # Asked first: snapshot_download tries for half a minute, and then says less.
            patiently(lambda: HfApi().model_info(repository, revision=commit))
            wanted.snapshot(repository, commit)
        _require_whole(_files(folder), repository, progress)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_whole(paths: Iterable[Path], repository: str, progress: Progress) -> None:
    damaged = _damaged(paths, progress)
    if damaged:
        for path in damaged:
            _delete(path)
        raise IncompatibleData(
            f"{repository} arrives damaged: {', '.join(path.name for path in damaged)}",
            where="it has not the hash that the hub announces, twice",
            fix="a proxy or a full disk may be at fault: try again, or use another network",
        )


# ---------------------------------------------------------------- verification


def _blob(path: Path) -> Path:
    """Return the file named by its hash that an entry of a snapshot points to.

    One link is followed, not all: behind it there may be a store with names of its own.
    """
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def _ledger_path() -> Path:
    return cache_dir() / "hub" / "verified.json"


def _read_ledger() -> dict[str, Any]:
    """Return hash and stamp by path of what was verified; a damaged ledger is an empty one."""
    with contextlib.suppress(OSError, ValueError):
        ledger = json.loads(_ledger_path().read_text("utf-8"))
        if isinstance(ledger, dict):
            return ledger
    return {}


def _write_ledger(new: dict[str, Any]) -> None:
    """Add to the ledger; what another process wrote in between is verified once more."""
    entries = {**_read_ledger(), **new}
    entries = {path: entry for path, entry in entries.items() if Path(path).exists()}
    write_text(_ledger_path(), json.dumps(entries, indent=1, sort_keys=True) + "\n")


def _announce(hashes: dict[Path, str | None]) -> None:
    """Remember the hashes that the hub announced of files whose names do not say them.

    So it is where the cache has no symbolic links (some file systems; HF_HUB_DISABLE_SYMLINKS).
    """
    new = {
        str(_blob(path)): [digest, None]
        for path, digest in hashes.items()
        if digest and _HASH.fullmatch(digest) and not _HASH.fullmatch(_blob(path).name)
    }
    if new:
        _write_ledger(new)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _lock() -> FileLock:
    path = _ledger_path().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _due(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return the files with a hash that are new or changed since they were verified."""
    ledger = _read_ledger()
    due: list[tuple[Path, str]] = []
    for path in paths:
        blob = _blob(path)
        entry = ledger.get(str(blob))
        digest, stamp = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if _HASH.fullmatch(blob.name):
            digest = blob.name
        if digest and stamp != _stamp(blob):
            due.append((path, digest))
    return due


def _damaged(paths: Iterable[Path], progress: Progress) -> list[Path]:
    """Return the files that are not what their hash says; read only if new or changed since."""
    due = _due(paths)
    if not due:
        return []
    damaged, whole = [], {}
    total = sum(path.stat().st_size for path, _ in due)
    with progress.stage("verify", total=total, detail="files of the hub", unit="B") as advance:
        for path, digest in due:
            stamp = _stamp(_blob(path))
            if digest in _hashes(path, digest, advance):
                whole[str(_blob(path))] = [digest, stamp]
            else:
                damaged.append(path)
    if whole:
        _write_ledger(whole)
    return damaged


def _hashes(path: Path, like: str, advance: Any) -> Sequence[str]:
    """Return the hashes of a file that may stand for it, of the length of `like`.

    Of 40 digits that is Git's, or the plain SHA-1, which some mirrors give instead.
    """
    if len(like) == 64:
        digests = [hashlib.sha256()]
    else:
        header = b"blob %d\0" % path.stat().st_size
        digests = [hashlib.sha1(header, usedforsecurity=False)]
        digests.append(hashlib.sha1(usedforsecurity=False))
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            for digest in digests:
                digest.update(block)
            advance(len(block))
    return [digest.hexdigest() for digest in digests]


def _delete(path: Path) -> None:
    """Remove an entry of a snapshot with all that it points to."""
    blob = _blob(path)
    for file in {blob.resolve(), blob, path}:
        file.unlink(missing_ok=True)
