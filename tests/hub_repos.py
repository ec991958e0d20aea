"""Repositories on the loopback hub: their commits and files as its listing describes them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".npz", ".bin", ".gz", ".parquet")  # kept in LFS, whatever their size


@dataclass
class Commit:
    """The files of a repository at one commit."""

    files: dict[str, bytes]
    sha: str = ""

    def __post_init__(self) -> None:
        content = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        self.sha = self.sha or hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    """A repository: its commits by SHA, and branches, tags and pull requests by name."""

    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    accepted: bool = False  # the license, by who owns TOKEN
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], *, sha: str = "", ref: str = "main") -> str:
        """Add a commit; returns its SHA."""
        commit = Commit(files, sha)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def pull_request(self, number: int, files: dict[str, bytes], **facts: Any) -> str:
        """Add a pull request, by default an open one of the converter; returns its commit."""
        row = {
            "num": number,
            "title": "Adding `safetensors` variant of this model",
            "author": {"name": "SFconvertbot"},
            "status": "open",
            "isPullRequest": True,
            "createdAt": "2023-03-15T12:00:00.000Z",
        }
        self.discussions.append(row | facts)
        return self.commit(files, ref=f"refs/pr/{number}")


@dataclass
class Failure:
    """What goes wrong, for requests whose method and path match."""

    where: re.Pattern[str]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # after half of the body, or before any answer
    page: bytes = b""  # answered to everything, as a network does that wants a login first
    silent: bool = False
    seconds: float = 0.0  # before the answer
    times: int = -1  # how often; -1 is always


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def git_hash(data: bytes) -> str:
    """Return the name that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def facts_of(name: str, data: bytes) -> dict[str, Any]:
    """Describe a file as the hub's listing does."""
    facts: dict[str, Any] = {"path": name, "size": len(data), "oid": git_hash(data)}
    if name.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        facts["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
    return facts
