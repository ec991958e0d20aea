"""Atomic file writes, exclusive publication, and the cache folder.

Every file that the program leaves behind is written here, so that `kill -9`, a full disk or fifty
writers at once can lose a file but never leave half of one under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import platformdirs

from prunebench.errors import MissingResource, SaveError

_CHUNK_BYTES = 4 << 20
_PROBE_BYTES = 1 << 20  # random bytes: a compressing file system must really store them

_probed: set[tuple[int, int]] = set()  # device and inode of the folders that could be written to


def cache_dir() -> Path:
    """Return the cache folder: `$PRUNEBENCH_CACHE`, or the platform's place for caches."""
    named = os.environ.get("PRUNEBENCH_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("prunebench"))


def sha256_file(path: Path, *, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hex; `advance` is called with the bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
            if advance:
                advance(len(block))
    return digest.hexdigest()


def sha256_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's files, hidden ones left out.

    Raises:
        MissingResource: A file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if hidden or not path.is_file():
            continue
        try:
            digest.update(f"{name.as_posix()}\0{sha256_file(path)}\0".encode())
        except OSError as error:
            raise MissingResource(f"{path} cannot be read", where=str(error.strerror)) from error
    return digest.hexdigest()


def explain_os_error(error: OSError, path: Path) -> SaveError:
    """Convert an operating system error into one with a fix."""
    fixes = {
        errno.ENOSPC: "free space there, or name another folder",
        errno.EDQUOT: "your quota there is used up: free space, or name another folder",
        errno.EROFS: "the file system is read-only: name another folder",
        errno.EACCES: "you may not write there: change the permissions, or name another folder",
        errno.ENOTDIR: "a file stands where a folder should be: move it, or name another folder",
        # mkdir(exist_ok=True) raises it when the path is a file
        errno.EEXIST: "a file stands where a folder should be: move it, or name another folder",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = fixes.get(error.errno or 0, "look at the folder, or name another one")
    return SaveError(f"cannot write {path}", where=reason, fix=fix)


def _raise_explained(error: Exception, path: Path) -> NoReturn:
    """Raise `explain_os_error` of a failed write of `path`; any other error as it is.

    Libraries in Rust (safetensors, tokenizers) wrap the system's error in the text of their own.
    """
    if isinstance(error, OSError):
        raise explain_os_error(error, path) from error
    # Rust's io::Error prints "No space left on device (os error 28)"
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match is None:
        raise error
    number = int(match[1])
    raise explain_os_error(OSError(number, os.strerror(number)), path) from error


def require_writable(folder: Path, *, need_bytes: int = 1 << 20) -> None:
    """Make sure, before any work, that `need_bytes` can be written into `folder`.

    A small file is really written and flushed (permission bits say little to root or on a network
    file system), once per folder and process; larger needs are compared with the free space.

    Raises:
        SaveError: The folder cannot be made, written to, or has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise explain_os_error(error, folder) from error
    if free < need_bytes:
        raise SaveError(
            f"cannot write {folder}",
            where=f"{need_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free",
            fix="free space there, or name another folder",
        )


def _probe(folder: Path) -> None:
    """Write and flush a small file, unless this process has done so in this very folder.

    A flush takes 0.1 s on a busy disk, and a sweep asks for each of its cells.
    """
    # by device and inode: the same path may be another file system after a mount
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in _probed:
        return
    # has no name on Linux, so a kill leaves nothing behind
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(_PROBE_BYTES))
        file.flush()
        # quota and space on a network file system are often reported only when data is flushed
        os.fsync(file.fileno())
    _probed.add(identity)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, whether it is there yet or not."""
    # the nearest ancestor that exists is on the disk that the folder will be on
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and takes its place.

    Raises:
        SaveError: The file could not be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder: a rename is atomic only within a file system. The dot hides it from
        # globs
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise explain_os_error(error, path) from error
    # some libraries (safetensors) open the file by its name themselves
    os.close(handle)
    part = Path(name)
    try:
        yield part
        # before the rename: after a crash the new name must not point to data that was never
        # written
        _flush(part)
        # mkstemp creates 0600; the file should be as readable as any other
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    # not KeyboardInterrupt: it passes as it is, and `finally` cleans up all the same
    except Exception as error:
        _raise_explained(error, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as part:
        # newline: the same bytes on every platform, as files are hashed and compared
        part.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`.

    Args:
        path: The final name. An empty folder there is replaced.
        replace: Whether an existing folder is replaced, once the new one is complete.
        exclusive: Whether it is an error if another process has made the folder meanwhile. Else
            that folder stays and this one is dropped: both hold the same content.

    Raises:
        SaveError: It could not be written; what was there before is there again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise explain_os_error(error, path) from error
    old = part.with_suffix(".old")
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # mkdtemp creates 0700
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
                _flush(file)
        if replace and path.exists():  # the old one moves aside first: one is always whole
            path.rename(old)
        try:
            # a folder can be renamed onto an empty one only: of several processes one succeeds
            part.rename(path)
        except OSError as error:
            taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
            if taken and exclusive:
                raise SaveError(
                    f"{path} exists already",
                    where="it was made while this program was at work",
                    fix="name another place, or add --force to replace it",
                ) from error
            # taken and not exclusive: a cache entry that another process has made is as good as
            # ours
            if replace or not taken:
                raise
    except Exception as error:
        _raise_explained(error, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where that cannot be; returns whether it was linked.

    Only weights are linked: they are large, and are not edited in place. A file with
    permissions of its own is copied, as a link would share them.
    """
    # a hard link is the same inode: permissions changed at one name change at the other
    ordinary = source.stat().st_mode & 0o777 == 0o666 & ~_umask()
    # files of the hub's cache are symlinks into its blobs: a link to the link would break with the
    # cache
    if source.suffix == ".safetensors" and ordinary and not source.is_symlink():
        try:
            os.link(source, target)
        # another file system, or one without hard links (FAT, some network mounts): copy
        except OSError:
            pass
        else:
            return True
    shutil.copyfile(source, target)
    return False


def publish_text(path: Path, text: str) -> None:
    """Write a new text file; an existing one is never replaced.

    The text is written to a temporary file, flushed, and hard-linked to its name, which fails if
    the name exists, also between machines on a shared file system.

    Raises:
        SaveError: The name exists, or the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
    except OSError as error:
        raise explain_os_error(error, path) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.chmod(0o666 & ~_umask())
        # a rename would replace an existing file; link fails if the name is taken, in one step
        os.link(part, path)
    except FileExistsError as error:
        raise SaveError(
            f"{path} exists already",
            where="results are never overwritten",
            fix="run again: every run gets a new name",
        ) from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    # fsync works on any descriptor of the file, also one that was opened for reading
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    # the mask can be read only by setting it: set it back at once
    mask = os.umask(0)
    os.umask(mask)
    return mask
