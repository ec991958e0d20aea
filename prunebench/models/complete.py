"""Check that every tensor of the model is in the files, and every tensor of the files in the model.

transformers initializes missing tensors with random numbers and ignores unknown ones; either way
another model would be scored, without an error. Every way of loading ends in `require_complete`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.errors import IncompatibleData

_HARMLESS = (
    r"rotary_emb\.(original_)?inv_freq$",  # computed from the config since 2023
    r"rotary\.inv_freq$",  # the same, in the first Falcon
    r"(^|\.)position_ids$",  # 0, 1, 2, ...
    r"\.attn_rot_embd(\.weight)?$",  # the same, in old GGUF files
    r"attention\.masked_bias$|attn\.masked_bias$",  # the score of masked positions, e.g. -1e9
)
"""Buffers that older versions stored; every version computes them."""

_CAUSAL_MASKS = r"(attn|attention)\.(bias|causal_mask)$"
"""Lower triangles of ones, [1, 1, context, context] (GPT-2, GPT-NeoX); a real bias is a vector."""


def require_complete(
    source: Path, *, missing: Iterable[str] = (), unplaced: Iterable[str] = ()
) -> None:
    """Refuse a checkpoint that does not fit its model.

    Args:
        source: The file or folder that was read.
        missing: Parameters and persistent buffers of the model that are not in the files.
        unplaced: Tensors of the files that have no place in the model; see `unplaced_tensors`.

    Raises:
        IncompatibleData: Names the first tensor of either.
    """
    names = sorted(missing)
    if names:
        raise IncompatibleData(
            f"{source} lacks {len(names)} tensors of the model",
            where=f"the first one is {names[0]}",
            fix="copy or download the weights again",
        )
    names = sorted(unplaced)
    if names:
        raise IncompatibleData(
            f"{source} holds {len(names)} tensors that the model has no place for",
            where=f"the first one is {names[0]}; without it, another model would be scored",
            fix="check that the config and the weights belong together",
        )


def unplaced_tensors(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...] | None]
) -> tuple[set[str], set[str]]:
    """Sort tensors that have no place in the model.

    Args:
        model: The model, on any device.
        shapes: Shapes of those tensors, by the name that transformers gives them; None if unknown.

    Returns:
        The tensors that the architecture declares unused (multi-token prediction, a vision tower:
        real weights of another part), and the tensors to refuse. Harmless ones are in neither.
    """
    declared = _declared_unused(model)
    unused: set[str] = set()
    refused: set[str] = set()
    for name, shape in shapes.items():
        if is_harmless(name, shape):
            continue
        (unused if declared and declared.search(name) else refused).add(name)
    return unused, refused


def is_harmless(name: str, shape: tuple[int, ...] | None) -> bool:
    """Return whether a tensor is a buffer that the model computes anyway."""
    if any(re.search(pattern, name) for pattern in _HARMLESS):
        return True
    # [1, 1, context, context]; without a shape it cannot be told from a bias, and is refused.
    mask = shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return mask and re.search(_CAUSAL_MASKS, name) is not None


def _declared_unused(model: Any) -> re.Pattern[str] | None:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    return (
        re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None
    )


def without_tied(model: Any, missing: Iterable[str]) -> set[str]:
    """Remove from missing names those that are tied to one that was read."""
    names = set(missing)
    # A chain of ties (A to B, B to C) is one group: it is missing only if none of it was read.
    group_of: dict[str, set[str]] = {}
    # transformers: parameter that is tied -> the one that it is tied to.
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = group_of.setdefault(source, {source})
        group.add(target)
        group_of[target] = group
    return {name for name in names if group_of.get(name, {name}) <= names}
