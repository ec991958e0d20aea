"""Every tensor of the model is read from the files, and every tensor of the files has a place.

What transformers misses it fills with random numbers, and what it does not know it leaves out; both
would be scored without a word. Every way of loading ends in `require_complete`.
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
    r"rotary\.inv_freq$",  # the same of the first Falcon
    r"(^|\.)position_ids$",  # 0, 1, 2, ...
    r"\.attn_rot_embd(\.weight)?$",  # the frequencies again, in old GGUF files
    r"attention\.masked_bias$|attn\.masked_bias$",  # the number that a masked score becomes
)
"""Tensors that older versions stored, and that every version computes."""

_CAUSAL_MASKS = r"(attn|attention)\.(bias|causal_mask)$"
"""Lower triangles of ones, [1, 1, context, context]: GPT-2, GPT-NeoX. A bias has one dimension."""


def require_complete(
    source: Path, *, missing: Iterable[str] = (), unplaced: Iterable[str] = ()
) -> None:
    """Refuse a checkpoint that does not fit its model, by name.

    Args:
        source: The file or folder that was read.
        missing: Parameters and persistent buffers of the model that were not read.
        unplaced: Tensors of the files that nothing in the model takes; see `unplaced_tensors`.

    Raises:
        IncompatibleData: There is one of either.
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
    """Sort tensors that the model has no place for.

    Args:
        model: The model, on any device.
        shapes: Of those tensors, by the name that transformers gives them; None if not known.

    Returns:
        Those that the architecture declares unused (multi-token prediction, a vision tower): real
        weights, of another part. And those to refuse. Harmless ones are in neither.
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
    """Whether a tensor is one that is computed anyway."""
    if any(re.search(pattern, name) for pattern in _HARMLESS):
        return True
    mask = shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return mask and re.search(_CAUSAL_MASKS, name) is not None


def _declared_unused(model: Any) -> re.Pattern[str] | None:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    return (
        re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None
    )


def without_tied(model: Any, missing: Iterable[str]) -> set[str]:
    """Return the missing names without those that are tied to one that was read."""
    names = set(missing)
    group_of: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = group_of.setdefault(source, {source})
        group.add(target)
        group_of[target] = group
    return {name for name in names if group_of.get(name, {name}) <= names}
