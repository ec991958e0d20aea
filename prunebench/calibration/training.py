"""Training data of learning methods: windows to train on, and held-out windows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prunebench.calibration.bos import require_begun
from prunebench.calibration.texts import Text
from prunebench.calibration.windows import Windows, hash_tokens, load_windows, pack_windows
from prunebench.errors import IncompatibleData, UsageError
from prunebench.spec import Bos


@dataclass(frozen=True)
class Training:
    """Training data, and the callbacks and folder of a training run.

    Attributes:
        train: Windows to train on.
        held_out: Windows to choose the mask by, never trained on.
        folder: Where the training state of this run is saved, or None to save none.
        on_point: Called with the measurements of each step.
        note: Called with messages for the user.
        score_prior: Returns the scores of the model with the mask of the prior applied.
        code: Hash of the code that trains: a state of other code is not resumed.
        title: What is trained, for `prunebench clean`.
    """

    train: Int[Tensor, "windows seqlen"]
    held_out: Int[Tensor, "held seqlen"]
    folder: Path | None = None
    on_point: Callable[[Any], None] = lambda point: None
    note: Callable[[str], None] = lambda text: None
    score_prior: Callable[[], tuple[Any, ...]] = lambda: ()
    code: str = ""
    title: str = ""

    def forget(self) -> None:
        """Delete the saved state, once the result is saved elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def sha256(self) -> str:
        """Hash of all tokens, the held-out windows first."""
        # [held + windows, seqlen]
        return hash_tokens(torch.cat([self.held_out, self.train]))


def training_windows(
    source: Text | Path,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    held_out: int,
    least: int,
    seed: int,
    vocabulary: int,
    bos: Bos = "text",
    text_option: str = "train_data",
    seqlen_option: str = "train_seqlen",
) -> Training:
    """Cut a text into windows, or read them from a token file, and split off the held-out ones.

    Documents are shuffled, joined and cut into at most `samples + held_out` windows; the first
    `held_out` of them are held out.

    Args:
        source: A text, or the path of a token file.
        tokenizer: Of the model.
        samples: Number of windows to train on, at most.
        seqlen: Tokens in a window.
        held_out: Number of windows to hold out.
        least: Number of windows to train on, at least: the batch size.
        seed: Of the shuffling.
        vocabulary: Of the model, see `vocabulary_size`.
        bos: Whether every window begins with BOS.
        text_option: How the text is named in --set, for messages.
        seqlen_option: How the length is named in --set, for messages.

    Raises:
        IncompatibleData: The text is too short for both, or the windows of a token file do not
            begin with BOS as `bos` demands.
        UsageError: The windows of a token file have another length.
    """
    count = samples + held_out
    if isinstance(source, Path):
        windows = load_windows(source, vocabulary=vocabulary).token_ids
        if windows.shape[1] != seqlen:
            raise UsageError(
                f"{source} has windows of {windows.shape[1]} tokens",
                where=f"the training uses windows of {seqlen}",
                fix=f"use --set {seqlen_option}={windows.shape[1]}",
            )
        require_begun(windows, tokenizer, bos, path=source)
        # A token file is not shuffled: its first windows are held out.
        rows = Windows(windows[:count], packed=False)
    else:
        rows = pack_windows(source, tokenizer, samples=count, seqlen=seqlen, seed=seed, bos=bos)
    if (have := len(rows.token_ids)) < held_out + least:
        raise IncompatibleData(
            f"the training text has {have} windows of {seqlen} tokens",
            where=f"{held_out} are held out, and a step takes {least}",
            fix=f"use a longer text (--set {text_option}=NAME), or smaller --set {seqlen_option}, "
            "batch or held_out",
        )
    # [windows, seqlen] and [held, seqlen]; slices would both keep the whole tensor in memory
    return Training(rows.token_ids[held_out:].clone(), rows.token_ids[:held_out].clone())
