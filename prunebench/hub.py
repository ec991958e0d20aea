"""Whether the Hugging Face hub can be reached, what to say if not, and pushing a folder to it.

Asked once before a download: huggingface_hub would try five times, for half a minute.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from prunebench.errors import MissingResource, SaveError, UsageError

_TIMEOUT_SECONDS = 3.0
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@functools.cache
def hub_reachable() -> bool:
    """Return whether the hub answers within three seconds (asked once a process)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where the network or the hub fails.

    Its own errors descend from those of its HTTP library, whose name changes with its version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def require_hub(what: str, *, fix: str) -> None:
    """Raise `MissingResource` unless the hub answers."""
    if not hub_reachable():
        raise unreachable(what, None, fix=fix)


def unreachable(what: str, error: Exception | None, *, fix: str) -> MissingResource:
    """Return the error for something that cannot be downloaded."""
    reason = f": {str(error).splitlines()[0][:160]}" if error and str(error) else ""
    return MissingResource(
        f"{what} cannot be downloaded", where=f"the hub cannot be reached{reason}", fix=fix
    )


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub that may or may not be there yet."""

    name: str
    exists: bool
    private: bool

    @property
    def url(self) -> str:
        """Its page."""
        return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{self.name}"


def find_repository(name: str) -> Repository:
    """Find out, before any work, whether something can be pushed to `org/name`.

    Raises:
        UsageError: It is no name of a repository.
        MissingResource: The hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi, errors

    if not _REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r} is no repository", fix="give org/name or user/name")
    fix = "leave --push out: the folder can be pushed later with hf upload"
    if not hub_reachable():
        raise MissingResource(
            f"cannot push to {name}", where="the hub cannot be reached", fix=f"connect, or {fix}"
        )
    try:
        HfApi().whoami()
        return Repository(name, True, bool(HfApi().repo_info(name).private))
    except errors.RepositoryNotFoundError:
        return Repository(name, False, True)
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is no repository", where=str(error).splitlines()[0]) from None
    except hub_errors() as error:
        raise MissingResource(
            f"cannot push to {name}",
            where=(str(error) or type(error).__name__).splitlines()[0][:160],
            fix=f"run hf auth login, or {fix}",
        ) from error


def push_folder(folder: Path, repository: Repository, *, private: bool, message: str) -> None:
    """Upload a folder as one commit, making the repository if it is not there.

    Args:
        folder: What to upload.
        repository: Where to.
        private: Visibility of a new one; that of an old one stays.
        message: Of the commit.

    Raises:
        SaveError: The hub refused it, or the network failed.
    """
    from huggingface_hub import HfApi

    try:
        if not repository.exists:
            HfApi().create_repo(repository.name, private=private)
        HfApi().upload_folder(repo_id=repository.name, folder_path=folder, commit_message=message)
    except hub_errors() as error:
        raise SaveError(
            f"cannot push to {repository.name}",
            where=(str(error) or type(error).__name__).splitlines()[0][:160],
            fix=f"{folder} is whole: hf upload {repository.name} {folder}",
        ) from error
