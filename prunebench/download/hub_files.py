"""Get files of the hub from the cache or download them, and verify each once.

The cache is that of huggingface_hub, in which a file is named by its hash: SHA-256 for large files
(LFS), Git's SHA-1 of a blob for small ones. A file with another hash is deleted and downloaded
again. A ledger records size and times of verified files, so that tens of gigabytes are hashed once
and not in every run.
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
class FilePatterns:
    """Files of a repository: names that match one of `allow` and none of `ignore`."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...] = ()

    def snapshot(self, repository: str, revision: str | None, *, cached: bool = False) -> Path:
        """Call `snapshot_download` and return the folder; with `cached`, no network access."""
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
    """Return the path of a file in the cache, or None; no network access."""
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
    """Return a verified file of the hub, from the cache or downloaded.

    Args:
        repository: `org/name`.
        name: Path of the file in the repository.
        revision: Branch, tag or commit; None is the main branch.
        kind: Of the repository.
        progress: Shows the download and the verification.
        fix: What the user can do without the hub.

    Raises:
        MissingResource: It is not in the cache, and cannot be downloaded; the reason is given.
        IncompatibleData: The download does not have the hash that the hub announces.
        SaveError: The cache cannot be written.
    """
    path = cached_file(repository, name, revision=revision, kind=kind)
    if path is None:
        path = _download_file(repository, name, revision, kind, progress, fix)
    # Without the lock: in most runs nothing is due. Under the lock it is asked again.
    if not _due([path]):
        return path
    with _lock():  # of two runs the second waits, and then the file is verified
        if _damaged([path], progress):
            progress.note(f"{repository} {name} is damaged in the cache: downloading it again")
            _delete(path)
            # snapshots/<commit>/<name>, where the name may hold folders.
            commit = path.parents[name.count("/")].name  # the branch may have moved on
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
        # Asked first: hf_hub_download reports every failure as "not in the cache".
        metadata = patiently(lambda: get_hf_file_metadata(url))
        path = Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
    _announce({path: metadata.etag})
    return path


def cached_snapshot(
    repository: str, patterns: FilePatterns, *, revision: str | None
) -> Path | None:
    """Return the folder of a model that is completely in the cache, or None; no network access."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return patterns.snapshot(repository, revision, cached=True)
    return None


def describe(repository: str, *, revision: str | None, fix: str) -> Any:
    """Return the `ModelInfo` of a model: its commit, and its files with their hashes.

    Raises:
        MissingResource: The hub cannot be reached, or refuses; the reason is given.
    """
    from huggingface_hub import HfApi

    with asking(repository, fix=fix, revision=revision):
        return patiently(
            lambda: HfApi().model_info(repository, revision=revision, files_metadata=True)
        )


def download_snapshot(
    repository: str, patterns: FilePatterns, *, revision: str | None, info: Any, fix: str
) -> Path:
    """Download the files of a model; an interrupted download leaves no file with its final name.

    Args:
        repository: `org/name`.
        patterns: Which files.
        revision: Branch, tag or commit; None is the main branch.
        info: From `describe`, for the hashes.
        fix: What the user can do without the hub.

    Raises:
        MissingResource: The hub cannot be reached, or refuses; the reason is given.
        SaveError: The cache cannot be written.
    """
    with asking(repository, fix=fix, revision=revision):
        folder = patterns.snapshot(repository, revision)
    hashes = {
        folder / file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
        for file in info.siblings or ()
    }
    _announce({path: digest for path, digest in hashes.items() if path.exists()})
    return folder


def verify_snapshot(
    folder: Path, repository: str, patterns: FilePatterns, *, progress: Progress, fix: str
) -> None:
    """Verify the files of a snapshot in the cache, and download damaged ones again.

    Args:
        folder: The snapshot; its name is the commit.
        repository: `org/name`.
        patterns: Which files.
        progress: Shows the verification and the download.
        fix: What the user can do without the hub.

    Raises:
        MissingResource: A file is damaged, and cannot be downloaded.
        IncompatibleData: The download does not have the hash that the hub announces.
    """
    from huggingface_hub import HfApi

    if not _due(_files(folder)):
        return
    with _lock():
        damaged = _damaged(_files(folder), progress)
        if not damaged:
            return
        names = ", ".join(path.name for path in damaged)
        progress.note(f"{repository}: damaged in the cache, downloading again: {names}")
        for path in damaged:
            _delete(path)
        commit = folder.name  # the branch may have moved on
        with (
            progress.stage("download", detail=f"{repository} {names}"),
            asking(repository, fix=fix, revision=commit),
        ):
            # Asked first: snapshot_download retries for half a minute, and then gives no reason.
            patiently(lambda: HfApi().model_info(repository, revision=commit))
            patterns.snapshot(repository, commit)
        _require_whole(_files(folder), repository, progress)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_whole(paths: Iterable[Path], repository: str, progress: Progress) -> None:
    """Raise `IncompatibleData` if files that were downloaded again are damaged, and delete them."""
    damaged = _damaged(paths, progress)
    if damaged:
        for path in damaged:
            _delete(path)
        names = ", ".join(path.name for path in damaged)
        raise IncompatibleData(
            f"{repository} is damaged after the download: {names}",
            where="twice its hash was not the one that the hub announces",
            fix="a proxy or a full disk may be at fault: try again, or use another network",
        )


# ---------------------------------------------------------------- verification


def _blob(path: Path) -> Path:
    """Return the blob, named by its hash, that an entry of a snapshot links to.

    Only one link is followed: the blob may be a link too, into a store with other names.
    """
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def _ledger_path() -> Path:
    return cache_dir() / "hub" / "verified.json"


def _read_ledger() -> dict[str, Any]:
    """Return hash and stamp of each verified file, by path; a damaged ledger counts as empty."""
    with contextlib.suppress(OSError, ValueError):
        ledger = json.loads(_ledger_path().read_text("utf-8"))
        if isinstance(ledger, dict):
            return ledger
    return {}


def _write_ledger(new: dict[str, Any]) -> None:
    """Add entries to the ledger, and drop those of deleted files.

    An entry that another process writes in between is lost, and its file verified once more.
    """
    entries = {**_read_ledger(), **new}
    entries = {path: entry for path, entry in entries.items() if Path(path).exists()}
    write_text(_ledger_path(), json.dumps(entries, indent=1, sort_keys=True) + "\n")


def _announce(hashes: dict[Path, str | None]) -> None:
    """Record the hashes that the hub announced for files that are not named by their hash.

    That is so in a cache without symbolic links (some file systems; HF_HUB_DISABLE_SYMLINKS).
    """
    new = {
        str(_blob(path)): [digest, None]
        for path, digest in hashes.items()
        if digest and _HASH.fullmatch(digest) and not _HASH.fullmatch(_blob(path).name)
    }
    if new:
        _write_ledger(new)


def _stamp(path: Path) -> list[int]:
    """Return size and times of a file: if they are unchanged, so is the file."""
    stat = path.stat()
    # cp -p and touch can restore the modification time, but not the change time (ctime).
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _lock() -> FileLock:
    path = _ledger_path().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _due(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return the files that are new or changed since they were verified, with their hashes."""
    ledger = _read_ledger()
    due: list[tuple[Path, str]] = []
    for path in paths:
        blob = _blob(path)
        entry = ledger.get(str(blob))
        digest, stamp = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if _HASH.fullmatch(blob.name):
            # The name of a blob is its hash; only other files need the announced one.
            digest = blob.name
        if digest and stamp != _stamp(blob):
            due.append((path, digest))
    return due


def _damaged(paths: Iterable[Path], progress: Progress) -> list[Path]:
    """Return the files whose hash is wrong; only new and changed files are read."""
    due = _due(paths)
    if not due:
        return []
    damaged, whole = [], {}
    total = sum(path.stat().st_size for path, _ in due)
    with progress.stage("verify", total=total, detail="files of the hub", unit="B") as advance:
        for path, digest in due:
            # Before the hash: a change while it is computed is noticed the next time.
            stamp = _stamp(_blob(path))
            if digest in _hashes(path, digest, advance):
                whole[str(_blob(path))] = [digest, stamp]
            else:
                damaged.append(path)
    if whole:
        _write_ledger(whole)
    return damaged


def _hashes(path: Path, like: str, advance: Any) -> Sequence[str]:
    """Return the possible hashes of a file: SHA-256 if `like` has 64 digits, else two SHA-1.

    The first is Git's hash of a blob, the second the plain SHA-1, which some mirrors announce.
    """
    if len(like) == 64:
        digests = [hashlib.sha256()]
    else:
        # Git hashes this header before the content.
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
    """Remove an entry of a snapshot with the files that it links to."""
    blob = _blob(path)
    # All are resolved before the first is removed.
    for file in {blob.resolve(), blob, path}:
        file.unlink(missing_ok=True)
