"""Push a folder to the Hugging Face hub, after finding out that it can be pushed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from prunebench.download.hub import (
    failure_reason,
    first_line,
    hub_endpoint,
    hub_errors,
    hub_problem,
    limit_times,
    patiently,
)
from prunebench.errors import MissingResource, SaveError, UsageError

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub, existing or to be created."""

    name: str
    exists: bool
    private: bool

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"{hub_endpoint()}/{self.name}"


def find_repository(name: str) -> Repository:
    """Check, before pruning, that the user can push to a repository.

    Args:
        name: `org/name`.

    Raises:
        UsageError: It is not the name of a repository.
        MissingResource: The hub cannot be reached, or the user is not logged in.
    """
    from huggingface_hub import HfApi, errors

    if not _REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r} is not a repository name", fix="give org/name or user/name")
    fix = "leave --push out: the folder can be pushed later with hf upload"
    problem = hub_problem()
    if problem:
        raise MissingResource(f"cannot push to {name}", where=problem, fix=f"connect, or {fix}")
    try:
        patiently(lambda: HfApi().whoami())
        info = patiently(lambda: HfApi().repo_info(name))
        return Repository(name, True, bool(info.private))
    except errors.RepositoryNotFoundError:
        return Repository(name, False, True)
    except errors.LocalTokenNotFoundError as error:
        raise MissingResource(
            f"cannot push to {name}",
            where="you are not logged in",
            fix=f"run hf auth login, or {fix}",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is not a repository name", where=first_line(error)) from None
    except hub_errors() as error:
        where, advice = failure_reason(error, name, None)
        raise MissingResource(f"cannot push to {name}", where=where, fix=advice or fix) from error


def push_folder(folder: Path, repository: Repository, *, private: bool, message: str) -> None:
    """Upload a folder as one commit, creating the repository if it does not exist.

    Args:
        folder: The folder to upload.
        repository: From `find_repository`.
        private: Visibility of a new repository; that of an existing one is not changed.
        message: Of the commit.

    Raises:
        SaveError: The hub refused it, or the network failed.
    """
    from huggingface_hub import HfApi

    limit_times()
    failures: tuple[type[Exception], ...] = (
        *hub_errors(),
        ValueError,
    )  # ValueError: of a bad model card or file
    try:
        # Created only now: a run that failed leaves no empty repository behind.
        if not repository.exists:
            HfApi().create_repo(repository.name, private=private)
        HfApi().upload_folder(repo_id=repository.name, folder_path=folder, commit_message=message)
    except failures as error:
        where = failure_reason(error, repository.name, None)[0]
        raise SaveError(
            f"cannot push to {repository.name}",
            where=where,
            fix=f"{folder} is whole: hf upload {repository.name} {folder}",
        ) from error
