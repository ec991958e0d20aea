"""Texts, documents and token ids that a caller holds, under names as a run takes them.

They are written to a folder of the call: a run reads them back as it reads a user's file, so that
equal content gives equal windows and the same origin.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prunebench.calibration.texts import texts
from prunebench.calibration.windows import Windows, save_windows
from prunebench.errors import IncompatibleData

_NAME_LENGTH = 200  # a longer string is a text, also in a language without spaces


def text_name(text: Any, folder: Path) -> str:
    """Return a name that a run takes for a text, documents or token ids; they are written there."""
    if isinstance(text, str):
        kind, colon, _ = text.partition(":")
        prefixed = colon and kind in ("file", "tokens", *texts()) and "\n" not in text
        if prefixed or (len(text) <= _NAME_LENGTH and not any(map(str.isspace, text))):
            return text
        path = folder / "text.txt"
        path.write_bytes(text.encode())  # bytes: line ends stay as they are
        return f"file:{path}"
    if isinstance(text, list | tuple) and text and all(isinstance(row, str) for row in text):
        path = folder / "documents.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in text), "utf-8")
        return f"file:{path}"
    path = folder / "token_ids.safetensors"
    save_windows(path, Windows(token_ids_of(text), packed=False))
    return f"tokens:{path}"


def token_ids_of(given: Any) -> Int[Tensor, "windows seqlen"]:
    """Return token ids as int64 [windows, seqlen] on the CPU.

    Raises:
        IncompatibleData: They are no integers, or not two-dimensional.
    """
    try:
        # what tokenizers return has `input_ids`
        token_ids = torch.as_tensor(getattr(given, "input_ids", given)).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_tokens(type(given).__name__) from error
    integral = not (token_ids.is_floating_point() or token_ids.is_complex())
    if not integral or token_ids.dtype == torch.bool or token_ids.ndim != 2:
        raise _not_tokens(f"{token_ids.dtype} {list(token_ids.shape)}")
    if not token_ids.numel():
        raise _not_tokens(f"an empty tensor {list(token_ids.shape)}")
    return token_ids.to(torch.int64).contiguous()


def _not_tokens(given: str) -> IncompatibleData:
    return IncompatibleData(
        f"{given} is neither a text nor token ids",
        where="token ids are integers [windows, seqlen], all windows of one length",
        fix="pass a name, a text, a list of texts, or such token ids",
    )


def cut_tokens(text: Any, seqlen: int) -> Any:
    """Cut token ids [tokens], or a single row of them that is too long, into windows."""
    ids = getattr(text, "input_ids", text)
    if isinstance(ids, str) or (isinstance(ids, list | tuple) and ids and isinstance(ids[0], str)):
        return text
    try:
        flat = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        return text  # `token_ids_of` says what is wrong
    if flat.ndim == 2 and (len(flat) != 1 or flat.shape[1] <= seqlen):
        return flat
    count = flat.numel() // seqlen
    if flat.ndim > 2 or not count:
        raise IncompatibleData(
            f"{flat.numel():,} token ids are too few" if flat.ndim < 3 else "token ids have 3 axes",
            where=f"one window of {seqlen} is needed",
            fix="use a smaller seqlen, or token ids [windows, seqlen]",
        )
    return flat.reshape(-1)[: count * seqlen].view(count, seqlen)  # [windows, seqlen]
