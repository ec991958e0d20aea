"""BOS, the token that begins a text: once a text, or at the beginning of every window.

`text` is the protocol of the papers: special tokens as the tokenizer puts them into one long text,
so that of all windows only the first begins with BOS. `window`: every window of `seqlen` tokens is
BOS and `seqlen - 1` tokens of the text, which is tokenised without special tokens. Models of the
Gemma family never saw a text without it, and are scored twice as bad by `text`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prunebench.errors import IncompatibleData, UsageError
from prunebench.spec import Bos, RunSpec


def tokenize(tokenizer: Any, text: str, bos: Bos = "text") -> list[int]:
    """Tokenise in one call, special tokens as the tokenizer puts them; with `window`, none."""
    if bos == "window":
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(text).input_ids)


def text_tokens(seqlen: int, bos: Bos) -> int:
    """Return how many tokens of a window come from the text."""
    return seqlen - 1 if bos == "window" else seqlen


def begin_windows(
    pieces: Int[Tensor, "windows piece"], tokenizer: Any, bos: Bos
) -> Int[Tensor, "windows seqlen"]:
    """Put BOS before every piece, if every window begins with it."""
    if bos == "text":
        return pieces
    first = torch.full((len(pieces), 1), require_bos(tokenizer), dtype=pieces.dtype)
    return torch.cat([first, pieces], dim=1)


def require_bos(tokenizer: Any, option: str = "window") -> int:
    """Return the id of BOS.

    Raises:
        UsageError: The tokenizer has none.
    """
    found = tokenizer.bos_token_id
    if found is None:
        raise UsageError(
            f"{option}: the model's tokenizer has no BOS token",
            where=f"tokenizer_config.json in {tokenizer.name_or_path or '?'} names no bos_token",
            fix="leave it out",
        )
    return int(found)


def require_begun(
    token_ids: Int[Tensor, "windows seqlen"], tokenizer: Any, bos: Bos, *, path: Path
) -> None:
    """Refuse a token file whose windows do not all begin with BOS, where they should.

    Raises:
        IncompatibleData: Says how many do not.
        UsageError: The tokenizer has no BOS.
    """
    if bos == "text":
        return
    lacking = int((token_ids[:, 0] != require_bos(tokenizer)).sum())
    if lacking:
        raise IncompatibleData(
            f"{path}: {lacking:,} of {len(token_ids):,} windows do not begin with BOS",
            where=f"every window should (token {require_bos(tokenizer)}); a token file is used as "
            "it is",
            fix="make it with --calibration-bos window --save-calibration PATH, or say text",
        )


def check_bos(
    spec: RunSpec, config: Any, tokenizer: Any, *, always: bool = False, learns: bool = False
) -> str:
    """Refuse `window` without a BOS token; return what the user should be told, or nothing.

    Args:
        spec: What is run.
        config: The model's.
        tokenizer: The model's.
        always: Whether the catalog says that this model needs BOS in each window.
        learns: Whether the method cuts a text to learn from.

    Raises:
        UsageError: Every window should begin with BOS, and the tokenizer has none.
    """
    options = {"--ppl-bos": spec.ppl_bos} if spec.ppl else {}
    if spec.calibration is not None or learns:
        options["--calibration-bos"] = spec.calibration_bos
    for option, bos in options.items():
        if bos == "window":
            require_bos(tokenizer, f"{option} window")
    missing = [f"{option} window" for option, bos in options.items() if bos == "text"]
    needed = always or needs_window(config)
    if not missing or not needed or tokenizer.bos_token_id is None:
        return ""
    return (
        f"{config.model_type} needs BOS in each window: add {' '.join(missing)} "
        "(its perplexity without is about twice as high)"
    )


def needs_window(config: Any) -> bool:
    """Whether a model was trained on texts that all begin with BOS, and goes wrong without."""
    kinds = (config.model_type, config.get_text_config().model_type)
    return any("gemma" in kind for kind in kinds)
