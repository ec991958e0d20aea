"""Token windows for calibration: sampled as the papers do, or read from a file.

The papers draw a random document longer than `seqlen`, then a random start in it (SparseGPT, Wanda
and GBLM, with Python's `random` seeded by the run's seed: the same draws in the same order, so the
same windows where text and tokenizer are the same). If long documents are too rare, sampling stops
after a bounded number of rejections, and documents are packed instead.
"""

from __future__ import annotations

import array
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from prunebench.calibration.bos import begin_windows, text_tokens, tokenize
from prunebench.calibration.texts import Text
from prunebench.calibration.vocabulary import require_known
from prunebench.errors import IncompatibleData
from prunebench.files import atomic_file
from prunebench.spec import Bos

TOKENS_KEY = "token_ids"
_MAX_REJECTIONS = 1000  # in a row
_SCAN_CHARACTERS = 64  # a text with fewer characters per needed token is counted before sampling


@dataclass(frozen=True)
class Windows:
    """Token windows, int64 [samples, seqlen]; `packed` if documents were joined to fill them."""

    token_ids: Int[Tensor, "samples seqlen"]
    packed: bool

    @property
    def sha256(self) -> str:
        """Hash of the tokens."""
        return hash_tokens(self.token_ids)


def hash_tokens(token_ids: Tensor) -> str:
    """Return the SHA-256 of int64 tokens, little endian, row-major."""
    array = token_ids.to(torch.int64).contiguous().cpu().numpy().astype("<i8")
    return hashlib.sha256(array.tobytes()).hexdigest()


def sample_windows(
    text: Text, tokenizer: Any, *, samples: int, seqlen: int, seed: int, bos: Bos = "text"
) -> Windows:
    """Sample windows as the papers do; with `bos="window"`, each begins with BOS.

    Args:
        text: Where the windows come from.
        tokenizer: Of the model.
        samples: Number of windows.
        seqlen: Tokens in a window, BOS included.
        seed: Of the random draws.
        bos: Whether every window begins with BOS.

    Raises:
        IncompatibleData: The text has too few tokens.
        UsageError: `bos` is `window`, and the tokenizer has no BOS.
    """
    seqlen = text_tokens(seqlen, bos)
    rng = random.Random(seed)
    documents = text.documents
    cache: dict[int, list[int]] = {}

    def tokens_of(index: int) -> list[int]:
        if index not in cache:
            cache[index] = tokenize(tokenizer, documents[index], bos)
        return cache[index]

    if isinstance(documents, list):  # a memory-mapped shard of C4 is large enough
        _require_enough(documents, tokens_of, text, samples=samples, seqlen=seqlen)
    # The papers' loop: one randint for the document, one for the start; a rejected document costs
    # only the first. Any other call of `rng` would change every later window.
    rows: list[list[int]] = []
    rejected = 0
    while len(rows) < samples:
        index = rng.randint(0, len(documents) - 1)
        ids = tokens_of(index)
        # A document of exactly `seqlen` tokens too: the range of its start below would be empty.
        if len(ids) <= seqlen:
            rejected += 1
            if rejected > _MAX_REJECTIONS:
                packed = _pack(documents, tokenizer, rng, samples=samples, seqlen=seqlen, bos=bos)
                if len(packed) < samples:
                    raise IncompatibleData(
                        f"the text is too short: {packed.numel():,} tokens, {samples} x {seqlen} "
                        "are needed",
                        fix="use fewer samples, shorter ones, or another text",
                    )
                return Windows(begin_windows(packed, tokenizer, bos), packed=True)
            continue
        # The limit is on rejections in a row: a text with few long documents is still sampled.
        rejected = 0
        start = rng.randint(
            0, len(ids) - seqlen - 1
        )  # as the papers: the last start is never drawn
        rows.append(ids[start : start + seqlen])
    pieces = torch.tensor(rows, dtype=torch.int64)  # [samples, seqlen without BOS]
    return Windows(begin_windows(pieces, tokenizer, bos), packed=False)


def pack_windows(
    text: Text, tokenizer: Any, *, samples: int, seqlen: int, seed: int, bos: Bos = "text"
) -> Windows:
    """Join documents in random order and cut them into at most `samples` windows."""
    pieces = _pack(
        text.documents, tokenizer, random.Random(seed), samples=samples,
        seqlen=text_tokens(seqlen, bos), bos=bos,
    )  # fmt: skip
    return Windows(begin_windows(pieces, tokenizer, bos), packed=True)


def _require_enough(
    documents: list[str], tokens_of: Any, text: Text, *, samples: int, seqlen: int
) -> None:
    """Raise `IncompatibleData` if a text that may be too short is; long ones are not counted."""
    need = samples * seqlen
    if sum(map(len, documents)) > need * _SCAN_CHARACTERS:
        return
    # Joined, all documents together; whether one of them is long enough is seen when sampling.
    have = sum(len(tokens_of(i)) for i in range(len(documents)))
    if have < need:
        raise IncompatibleData(
            f"{text.dataset} is too short: {have:,} tokens, "
            f"{samples} x {seqlen} = {need:,} are needed",
            where=f"text from {text.origin}",
            fix=f"use --calibration-samples {have // seqlen} or fewer, a shorter --seqlen, "
            "or another text"
            if have >= seqlen
            else "use a shorter --seqlen, or another text",
        )


def _pack(
    documents: Sequence[str],
    tokenizer: Any,
    rng: random.Random,
    *,
    samples: int,
    seqlen: int,
    bos: Bos,
) -> Tensor:
    """Join documents in random order until the windows are full or none is left, and cut."""
    order = list(range(len(documents)))
    rng.shuffle(order)
    ids = array.array("q")  # 8 bytes a token, where a list takes 36
    for index in order:
        ids.extend(tokenize(tokenizer, documents[index] + "\n\n", bos))
        if len(ids) >= samples * seqlen:
            break
    count = min(samples, len(ids) // seqlen)
    # [windows, seqlen]; what is left at the end is dropped
    return torch.from_numpy(np.array(ids[: count * seqlen], dtype=np.int64)).view(count, seqlen)


def load_windows(path: Path, *, vocabulary: int | None = None) -> Windows:
    """Read a token file: safetensors with `token_ids`, int64 [samples, seqlen].

    Args:
        path: The file.
        vocabulary: Of the model, to check the ids; None checks nothing.

    Raises:
        IncompatibleData: It is no such file, or a token is outside the model's vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IncompatibleData(
            f"{path} is not a safetensors file", where=str(error), fix=_TOKENS_FIX
        ) from None
    token_ids = tensors.get(TOKENS_KEY)
    if token_ids is None or token_ids.ndim != 2 or token_ids.dtype != torch.int64:
        contents = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
        raise IncompatibleData(
            f"{path} holds no {TOKENS_KEY}, int64 [samples, seqlen]",
            where=f"it holds {contents}",
            fix=_TOKENS_FIX,
        )
    if token_ids.shape[1] < 2:
        raise IncompatibleData(
            f"{path} has windows of {token_ids.shape[1]} token",
            where="the first token of a window is never predicted",
            fix="make windows of 2 tokens or more",
        )
    if vocabulary is not None:
        require_known(token_ids, vocabulary=vocabulary, source=str(path))
    return Windows(token_ids, packed=False)


def save_windows(path: Path, windows: Windows) -> None:
    """Write a token file for `load_windows`.

    Raises:
        SaveError: It could not be written.
    """
    from safetensors.torch import save_file

    with atomic_file(path) as part:
        save_file({TOKENS_KEY: windows.token_ids.contiguous()}, part)


_TOKENS_FIX = "make one with prunebench run --save-calibration PATH"
