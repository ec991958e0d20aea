"""Models of the hub: the safetensors of a repository, or of its converted pull request.

Old repositories hold only pickles, and a pickle can run any program, so none is opened. For many of
them the hub's converter has opened a pull request with the same weights as safetensors. It is used
if it exists and the user named no revision, and the result names it. Nothing is requested in the
user's name: no conversion is started, no pull request opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunebench.download.hub import asking, patiently
from prunebench.download.hub_files import (
    FilePatterns,
    cached_snapshot,
    describe,
    download_snapshot,
    fetch_file,
    verify_snapshot,
)
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import cache_dir, write_text
from prunebench.models.safetensors_files import weight_files
from prunebench.models.stored_config import FP8, PACKED24, require_unquantized
from prunebench.progress import Progress

_PATTERNS = FilePatterns(
    allow=("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"),
    # Second copies of the weights; `*` in a pattern of the hub also matches `/`.
    ignore=("original/*", "onnx/*"),
)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip
_CONVERTER = "SFconvertbot"
_TITLE = "Adding `safetensors` variant of this model"
_FIX = "connect to the network, or give a local folder or .gguf file to --model"


@dataclass(frozen=True)
class HubModel:
    """A model in the cache of the hub.

    Attributes:
        path: The folder of the snapshot; its name is the commit.
        pull_request: `refs/pr/N` if the weights are those of the converter's pull request.
    """

    path: Path
    pull_request: str | None = None


def cached_model(repository: str, revision: str | None) -> HubModel | None:
    """Return a model that is completely in the cache, or None; no network access."""
    # The repository's own safetensors come before those of the pull request.
    candidates: list[tuple[str | None, str | None]] = [(revision, None)]
    conversion = _read_conversions().get(repository)
    if revision is None and conversion:
        candidates.append((conversion, conversion))
    for candidate, pull_request in candidates:
        path = cached_snapshot(repository, _PATTERNS, revision=candidate)
        if path and _is_complete(path):
            return HubModel(path, pull_request)
    return None


def _is_complete(folder: Path) -> bool:
    """Return whether no file is missing: other programs download only some of them.

    Damaged files count as present; `verify_snapshot` downloads them again.
    """
    try:
        weights = weight_files(folder)
    except IncompatibleData:  # a damaged index, which is downloaded again like any file
        return True
    tokenizer = any((folder / name).exists() for name in _TOKENIZER_FILES)
    config = (folder / "config.json").is_file()
    return config and tokenizer and bool(weights) and all(file.is_file() for file in weights)


def fetch_hub_model(repository: str, revision: str | None, progress: Progress) -> HubModel:
    """Return a verified model of the hub, from the cache or downloaded.

    Args:
        repository: `org/name`.
        revision: Branch, tag or commit; None is the main branch.
        progress: Shows the download and the verification.

    Raises:
        MissingResource: It cannot be downloaded, or has only pickles; the reason is given.
        IncompatibleData: A downloaded file does not have the hash that the hub announces.
        SaveError: The cache cannot be written.
    """
    model = cached_model(repository, revision)
    if model is None:
        with progress.stage("download", detail=f"{repository} from the hub"):
            model = _download(repository, revision, progress)
    verify_snapshot(model.path, repository, _PATTERNS, progress=progress, fix=_FIX)
    if model.pull_request:
        progress.note(
            f"  {repository} has pickles only: the safetensors are those of its pull request "
            f"{model.pull_request}, by {_CONVERTER}"
        )
    return model


def _download(repository: str, revision: str | None, progress: Progress) -> HubModel:
    """Download a model, or its conversion if it has only pickles and no revision was named."""
    info = describe(repository, revision=revision, fix=_FIX)
    pull_request = None
    names = [file.rfilename for file in info.siblings or ()]
    # Only files of the root count: transformers reads no others.
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        if revision is not None:
            raise _only_pickles(
                f"{repository}@{revision}", "a revision was named, and no other is used"
            )
        pull_request, info = _find_conversion(repository, info)
        revision = pull_request
    if "config.json" in names:  # before the weights, which may be hundreds of gigabytes
        config = fetch_file(
            repository, "config.json", revision=info.sha, progress=progress, fix=_FIX
        )
        require_unquantized(config.parent, name=repository, reads=(FP8, PACKED24))
    path = download_snapshot(repository, _PATTERNS, revision=revision, info=info, fix=_FIX)
    if pull_request:
        _remember_conversion(repository, pull_request)
    return HubModel(path, pull_request)


def _find_conversion(repository: str, main: Any) -> tuple[str, Any]:
    """Return the open pull request that converts the weights of `main`, and its `ModelInfo`.

    The pull request still holds the pickles that it converted: their hashes must be those of main.

    Raises:
        MissingResource: There is none, or it was made from other weights.
    """
    stale = ""
    for reference in _conversions(repository):
        info = describe(repository, revision=reference, fix=_FIX)
        # Only large files (LFS) have a SHA-256; Git stores the small ones itself.
        hashes = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings or ()}
        # Every pickle of main is in it, with the same hash: it was made from these weights.
        if _pickles(main).items() <= hashes.items():
            return reference, info
        stale = f"its conversion {reference} was made from other weights"
    raise _only_pickles(repository, stale or "it has not been converted there")


def _conversions(repository: str) -> Iterator[str]:
    """Yield the references (`refs/pr/N`) of open pull requests by the hub's converter."""
    from huggingface_hub import HfApi

    with asking(repository, fix=_FIX):
        discussions = patiently(
            lambda: list(
                HfApi().get_repo_discussions(
                    repository,
                    author=_CONVERTER,
                    discussion_type="pull_request",
                    discussion_status="open",
                )
            )
        )
    for discussion in discussions:  # checked again: a mirror may ignore the filters
        facts = (discussion.author, discussion.title, discussion.status)
        if facts == (_CONVERTER, _TITLE, "open") and discussion.is_pull_request:
            yield f"refs/pr/{discussion.num}"


def _pickles(info: Any) -> dict[str, str | None]:
    """Return the hash of every pickle of a `ModelInfo`, by name."""
    return {
        file.rfilename: file.lfs and file.lfs.sha256
        for file in info.siblings or ()
        if file.rfilename.endswith(".bin")
    }


def _only_pickles(name: str, why: str) -> MissingResource:
    return MissingResource(
        f"{name} has no safetensors, only pickled weights",
        where=f"a pickle can run any program when it is opened, so none is opened here; {why}",
        fix="convert it (https://huggingface.co/spaces/safetensors/convert), "
        "then give the folder or the pull request's revision",
    )


def _memo() -> Path:
    return cache_dir() / "hub" / "conversions.json"


def _read_conversions() -> dict[str, str]:
    """Return the pull request used for each repository, so that the cache works offline."""
    with contextlib.suppress(OSError, ValueError):
        memo = json.loads(_memo().read_text("utf-8"))
        if isinstance(memo, dict):
            return memo
    return {}


def _remember_conversion(repository: str, reference: str) -> None:
    memo = {**_read_conversions(), repository: reference}
    write_text(_memo(), json.dumps(memo, indent=1, sort_keys=True) + "\n")
