"""Where BOS, the beginning-of-sequence token, stands: once per text, or first in every window.

`text` is the papers' protocol: special tokens as the tokenizer adds them to one long text, so only
the first window begins with BOS. `window`: every window of `seqlen` tokens is BOS followed by
`seqlen - 1` tokens of the text, which is tokenized without special tokens. Models of the Gemma
family were never trained without BOS; with `text` their perplexity is about twice as high.
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
    """Tokenize a text in one call; with `text`, the tokenizer adds its special tokens."""
    if bos == "window":
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(text).input_ids)


def text_tokens(seqlen: int, bos: Bos) -> int:
    """Return how many tokens of a window of `seqlen` come from the text."""
    return seqlen - 1 if bos == "window" else seqlen


def begin_windows(
    pieces: Int[Tensor, "windows piece"], tokenizer: Any, bos: Bos
) -> Int[Tensor, "windows seqlen"]:
    """Prepend BOS to every row if `bos` is `window`; else return the rows unchanged."""
    if bos == "text":
        return pieces
    first = torch.full((len(pieces), 1), require_bos(tokenizer), dtype=pieces.dtype)  # [windows, 1]
    return torch.cat([first, pieces], dim=1)  # [windows, seqlen]


def require_bos(tokenizer: Any, option: str = "window") -> int:
    """Return the id of BOS.

    Args:
        tokenizer: Of the model.
        option: The option that needs BOS, for the error.

    Raises:
        UsageError: The tokenizer has none.
    """
    token_id = tokenizer.bos_token_id
    if token_id is None:
        raise UsageError(
            f"{option}: the model's tokenizer has no BOS token",
            where=f"tokenizer_config.json in {tokenizer.name_or_path or '?'} names no bos_token",
            fix="leave it out",
        )
    return int(token_id)


def require_begun(
    token_ids: Int[Tensor, "windows seqlen"], tokenizer: Any, bos: Bos, *, path: Path
) -> None:
    """Refuse a token file whose windows do not all begin with BOS, if `bos` is `window`.

    Raises:
        IncompatibleData: Some windows do not begin with BOS.
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
    """Check the BOS options of a run; return a warning for the user, or "".

    Args:
        spec: The run.
        config: Of the model.
        tokenizer: Of the model.
        always: Whether the catalog says that this model needs BOS in each window.
        learns: Whether the method is trained on a text.

    Raises:
        UsageError: An option is `window`, and the tokenizer has no BOS.
    """
    options = {"--ppl-bos": spec.ppl_bos} if spec.ppl else {}
    if spec.calibration is not None or learns:
        options["--calibration-bos"] = spec.calibration_bos
    for option, bos in options.items():
        if bos == "window":
            require_bos(tokenizer, f"{option} window")
    missing = [f"{option} window" for option, bos in options.items() if bos == "text"]
    needed = always or needs_window(config)
    if not missing or not needed or getattr(tokenizer, "bos_token_id", None) is None:
        return ""
    return (
        f"{config.model_type} needs BOS in each window: add {' '.join(missing)} "
        "(its perplexity without is about twice as high)"
    )


def needs_window(config: Any) -> bool:
    """Return whether a model needs BOS in every window: it was never trained without."""
    kinds = (config.model_type, config.get_text_config().model_type)
    return any("gemma" in kind for kind in kinds)
