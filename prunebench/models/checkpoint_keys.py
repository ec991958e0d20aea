"""Which tensor of a checkpoint is which parameter of the model, if that is a question of names.

transformers renames some keys when it loads a checkpoint, and rebuilds other tensors (it fuses the
experts of a mixture, for example). What is only renamed can be read straight from the file, a block
at a time; what is rebuilt cannot, and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunebench.errors import IncompatibleData
from prunebench.models.complete import require_complete, unplaced_tensors, without_tied
from prunebench.models.safetensors_files import StoredTensor


@dataclass(frozen=True)
class CheckpointKeys:
    """Where the parameters and persistent buffers of a model lie in its files.

    Attributes:
        stored: By name in the model.
        rebuilt: Names in the model that transformers makes from several tensors, or several from
            one; with the key of one of them.
        missing: Names that no file holds, and that are tied to none.
        unused: Tensors that the architecture declares it does not load, by their name in the file.
        refused: Names in the files of tensors that nothing in the model takes.
    """

    stored: dict[str, StoredTensor]
    rebuilt: dict[str, str]
    missing: set[str]
    unused: dict[str, StoredTensor]
    refused: set[str]


def check_tensors(model: nn.Module, stored: Mapping[str, StoredTensor]) -> CheckpointKeys:
    """Refuse a checkpoint unless its tensors and the model's are the same, from the headers alone.

    Args:
        model: The model, its parameters on any device.
        stored: What the files hold, from `stored_tensors`.

    Raises:
        IncompatibleData: A tensor is missing, has no place, has another shape, is there twice, or
            holds integers where the model computes.
    """
    keys = find_places(model, stored)
    require_complete(_folder_of(stored), missing=keys.missing, unplaced=keys.refused)
    return keys


def unused_tensors(model: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the weights of the files that the model's architecture declares it does not load.

    Multi-token-prediction blocks, or a vision tower that a text model leaves out: real weights of
    another part of the checkpoint. Buffers that are computed anyway are not among them.
    """
    return find_places(model, stored).unused


def find_places(model: nn.Module, stored: Mapping[str, StoredTensor]) -> CheckpointKeys:
    """Match the tensors of a checkpoint with a model that was built from its config.

    Raises:
        IncompatibleData: A tensor has another shape, is there twice, or is quantised.
    """
    wanted = model.state_dict()
    transforms = _transforms(model)
    places: dict[str, StoredTensor] = {}
    parts: dict[tuple[str, str], list[str]] = {}  # of what is rebuilt: name and pattern, keys
    rebuilt: dict[str, str] = {}
    unplaced: list[tuple[str, StoredTensor]] = []
    for key, tensor in stored.items():
        name, pattern = _name_in_model(model, key, wanted, transforms)
        if name not in wanted:
            unplaced.append((name, tensor))
            continue
        if wanted[name].is_floating_point() and "float" not in tensor.dtype:
            raise _quantised(tensor)
        if name in places or (name in rebuilt and pattern is None):
            other = places[name].name if name in places else rebuilt[name]
            raise IncompatibleData(
                f"{tensor.path} holds {name} of the model twice",
                where=f"as {other} and as {key}",
                fix="remove the one that is not of this model",
            )
        if pattern is not None:
            parts.setdefault((name, pattern), []).append(key)
            rebuilt.update(dict.fromkeys(_made_with(name, pattern, transforms[1]), key))
            continue
        if tuple(wanted[name].shape) != tensor.shape:
            raise IncompatibleData(
                f"{tensor.path} does not fit its config",
                where=f"{key} is {list(tensor.shape)}, the model has {list(wanted[name].shape)}",
                fix="check that config.json and the safetensors belong together",
            )
        places[name] = tensor
    missing = set(wanted) - set(places) - set(rebuilt)
    gaps = {gap for keys in parts.values() for gap in _gaps(keys)}
    unused, refused = unplaced_tensors(model, {name: extra.shape for name, extra in unplaced})
    return CheckpointKeys(
        places,
        rebuilt,
        without_tied(model, missing) | gaps,
        {extra.name: extra for name, extra in unplaced if name in unused},
        {extra.name for name, extra in unplaced if name in refused},
    )


def match_keys(
    model: nn.Module, stored: Mapping[str, StoredTensor], *, dtype: torch.dtype
) -> CheckpointKeys:
    """Match the tensors of a checkpoint that is read a tensor at a time, see `check_tensors`.

    Args:
        model: The model, its parameters on any device.
        stored: What the files hold, from `stored_tensors`.
        dtype: Of the run.

    Raises:
        IncompatibleData: The architecture or the checkpoint needs more than names; or as in
            `check_tensors`.
    """
    _require_plain(model, dtype)
    keys = find_places(model, stored)
    for name, key in keys.rebuilt.items():
        raise not_on_disk(
            type(model).__name__, f"transformers makes {name} from several tensors like {key}"
        )
    require_complete(_folder_of(stored), missing=keys.missing, unplaced=keys.refused)
    return keys


def _folder_of(stored: Mapping[str, StoredTensor]) -> Path:
    return next((tensor.path.parent for tensor in stored.values()), Path())


def _name_in_model(
    model: Any, key: str, wanted: Mapping[str, Any], transforms: tuple[list[Any], list[Any]]
) -> tuple[str, str | None]:
    """Return the name of a checkpoint's tensor in the model, and the pattern that rebuilds it."""
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(key, *transforms, model.base_model_prefix, wanted)
    if name not in wanted and key in wanted:
        return key, None
    return name, pattern


def _made_with(name: str, pattern: str, converters: list[Any]) -> list[str]:
    """Return all names that a conversion gives with the first of them."""
    for converter in converters:
        if pattern in converter.source_patterns:
            first = converter.target_patterns[0]
            return [name.replace(first, other) for other in converter.target_patterns]
    return [name]


def _gaps(keys: list[str]) -> list[str]:
    """Return the first key that is missing in a numbered row: experts are stacked as they come."""
    numbers = [[int(digits) for digits in re.findall(r"\d+", key)] for key in keys]
    if len({len(row) for row in numbers}) != 1:
        return []
    for place, column in enumerate(zip(*numbers, strict=True)):
        lacking = set(range(max(column))) - set(column)
        if len(set(column)) > 1 and lacking:
            pieces = re.split(r"(\d+)", keys[0])
            pieces[2 * place + 1] = str(min(lacking))
            return ["".join(pieces)]
    return []


def _quantised(tensor: StoredTensor) -> IncompatibleData:
    return IncompatibleData(
        f"{tensor.path} is quantised: {tensor.name} is {tensor.dtype}",
        where="integers would be read as if they were the weights",
        fix="give the unquantised checkpoint",
    )


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return what transformers does to the keys of this architecture: renaming, rebuilding."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    return (
        [step for step in steps if isinstance(step, WeightRenaming)],
        [step for step in steps if isinstance(step, WeightConverter)],
    )


def _require_plain(model: Any, dtype: torch.dtype) -> None:
    name = type(model).__name__
    if getattr(model.config, "quantization_config", None):
        raise not_on_disk(name, "the checkpoint is quantised")
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {torch.float16: {*strict, *loose}, torch.bfloat16: {*strict}}.get(dtype)
    if kept:
        raise not_on_disk(name, f"transformers keeps {sorted(kept)[0]} in float32")


def not_on_disk(architecture: str, reason: str) -> IncompatibleData:
    """Return the refusal of `--weights disk` for an architecture."""
    return IncompatibleData(
        f"--weights disk does not fit {architecture}",
        where=reason,
        fix="use --weights resident, on a machine that holds the whole model",
    )
