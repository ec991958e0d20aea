"""What a method learns from: windows of a text, and others that only decide what is kept."""

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
    """Windows and where a training keeps its state.

    Attributes:
        train: Windows to learn from.
        held_out: Windows that are not learned from.
        folder: For the state of this very run, or None to keep none.
        hear: Is told what each step measured.
        note: Is told what the user should know.
        score_prior: Returns what the model gets as it is; called with the prior's mask applied.
    """

    train: Int[Tensor, "windows seqlen"]
    held_out: Int[Tensor, "held seqlen"]
    folder: Path | None = None
    hear: Callable[[Any], None] = lambda point: None
    note: Callable[[str], None] = lambda text: None
    score_prior: Callable[[], tuple[Any, ...]] = lambda: ()

    def forget(self) -> None:
        """Remove the state: what was learned is safe elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def sha256(self) -> str:
        """The hash that identifies all tokens, those held out first."""
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
) -> Training:
    """Cut a text, or read a token file, into windows to learn from and windows to hold out.

    Documents are shuffled, joined and cut; at most `samples` windows are kept, and the first
    `held_out` of a file of tokens, or of the shuffled text, are those that decide.

    Raises:
        IncompatibleData: The text is too short for both, or the windows of a token file do not
            begin with BOS as they should.
        UsageError: The windows of a token file have another length.
    """
    wanted = samples + held_out
    if isinstance(source, Path):
        windows = load_windows(source, vocabulary=vocabulary).token_ids
        if windows.shape[1] != seqlen:
            raise UsageError(
                f"{source} has windows of {windows.shape[1]} tokens",
                where=f"the training wants {seqlen}",
                fix=f"use --set train_seqlen={windows.shape[1]}",
            )
        require_begun(windows, tokenizer, bos, path=source)
        rows = Windows(windows[:wanted], packed=False)
    else:
        rows = pack_windows(source, tokenizer, samples=wanted, seqlen=seqlen, seed=seed, bos=bos)
    have = len(rows.token_ids)
    if have < held_out + least:
        raise IncompatibleData(
            f"the text to learn from has {have} windows of {seqlen} tokens",
            where=f"{held_out} are held out, and a step takes {least}",
            fix="use a longer text (--set train_data=NAME), or smaller --set train_seqlen, "
            "batch or held_out",
        )
    return Training(rows.token_ids[held_out:].clone(), rows.token_ids[:held_out].clone())
