"""The config of a model without some of its blocks: its depth, and what it says block by block."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from prunebench.errors import IncompatibleData

_DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")
# lists of numbers of blocks, which are renumbered; every other list of their length is cut
_BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
_NOT_BY_BLOCK = ("_token_id", "_tokens", "_multipliers")


def fields_without(config: Any, removed: Collection[int], depth: int) -> dict[str, Any]:
    """Return the fields of the text config that a model without some blocks has otherwise.

    Args:
        config: Of the dense model.
        removed: Indices of the blocks that are removed.
        depth: Blocks of the dense model.

    Raises:
        IncompatibleData: The config does not say how many blocks there are.
    """
    text = config.get_text_config(decoder=True)
    names = [text.attribute_map.get(name, name) for name in _DEPTHS]
    name = next((name for name in names if getattr(text, name, None) == depth), None)
    if name is None:
        raise IncompatibleData(
            f"blocks of {config.model_type} cannot be removed",
            where=f"no field of its config says that it has {depth} blocks",
            fix="choose another architecture, or a method that zeroes weights",
        )
    stay = [index for index in range(depth) if index not in removed]
    fields: dict[str, Any] = {name: len(stay)}
    for key, value in vars(text).items():
        if key.startswith("_") or key.endswith(_NOT_BY_BLOCK) or not isinstance(value, list):
            continue
        if key in _BLOCK_NUMBERS:
            fields[key] = [stay.index(index) for index in value if index in stay]
        elif len(value) == depth and not any(isinstance(item, list | dict) for item in value):
            fields[key] = [value[index] for index in stay]
    # GPT-Neo's stored form of `attention_layers`: pairs of a pattern and how often it repeats
    if "attention_layers" in fields and hasattr(text, "attention_types"):
        fields["attention_types"] = [[fields["attention_layers"], 1]]
    return fields


def smaller_config(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a copy of a config with other fields of its text config."""
    smaller = copy.deepcopy(config)
    set_fields(smaller, fields)
    return smaller


def set_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Change fields of the text config of a model, in place."""
    text = config.get_text_config(decoder=True)
    for name, value in fields.items():
        setattr(text, name, copy.copy(value))
