"""Match the tensors of a checkpoint with the parameters of a model, by name.

transformers renames some keys when it loads a checkpoint, and rebuilds other tensors from several
(it fuses the experts of a mixture, for example). Renamed tensors can be read straight from the
file, a block at a time; rebuilt ones cannot, and `--weights disk` refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
    """Where the parameters and persistent buffers of a model are stored in its files.

    Attributes:
        stored: Tensors that are stored as they are, by name in the model.
        rebuilt: Names in the model that transformers makes from several tensors, or several from
            one; with the key of one of them.
        missing: Names in the model that no file holds, and that are not tied to one that a file
            holds.
        unused: Tensors that the architecture declares it does not load, by name in the file: real
            weights of another part of the checkpoint (multi-token prediction, a vision tower).
        refused: Names in the files of tensors that have no place in the model.
    """

    stored: dict[str, StoredTensor]
    rebuilt: dict[str, str]
    missing: set[str]
    unused: dict[str, StoredTensor]
    refused: set[str]


def check_tensors(model: nn.Module, stored: Mapping[str, StoredTensor]) -> CheckpointKeys:
    """Refuse a checkpoint that does not fit the model; only the headers of its files are needed.

    Args:
        model: The model, its parameters on any device.
        stored: From `stored_tensors`.

    Raises:
        IncompatibleData: A tensor is missing, has no place in the model, has another shape, is
            stored twice, or holds integers where the model has floating-point numbers.
    """
    keys = find_places(model, stored)
    require_complete(_folder_of(stored), missing=keys.missing, unplaced=keys.refused)
    return keys


def find_places(model: nn.Module, stored: Mapping[str, StoredTensor]) -> CheckpointKeys:
    """Match the tensors of a checkpoint with a model that was built from its config.

    Args:
        model: The model, its parameters on any device.
        stored: From `stored_tensors`.

    Raises:
        IncompatibleData: A tensor has another shape, is stored twice, or is quantized.
    """
    state = model.state_dict()
    places: dict[str, StoredTensor] = {}
    parts: dict[tuple[str, str], list[str]] = {}  # keys of rebuilt tensors, by name and pattern
    rebuilt: dict[str, str] = {}
    unplaced: list[tuple[str, StoredTensor]] = []
    for key, name, converter, pattern in matched_keys(model, stored, conversion_steps(model)):
        tensor = stored[key]
        if name not in state:
            unplaced.append((name, tensor))
            continue
        # Codes of a quantized checkpoint have the right shape, and would be cast to floats.
        if state[name].is_floating_point() and "float" not in tensor.dtype:
            raise _quantized(tensor)
        if name in places or (name in rebuilt and converter is None):
            other = places[name].name if name in places else rebuilt[name]
            raise IncompatibleData(
                f"{tensor.path} holds {name} of the model twice",
                where=f"as {other} and as {key}",
                fix="remove the one that is not of this model",
            )
        if converter is not None:
            parts.setdefault((name, pattern), []).append(key)
            targets = converter.target_patterns  # several: one tensor is split into many
            names = [name.replace(targets[0], target) for target in targets]
            rebuilt.update(dict.fromkeys(names, key))
            continue
        if tuple(state[name].shape) != tensor.shape:
            raise IncompatibleData(
                f"{tensor.path} does not fit its config",
                where=f"{key} is {list(tensor.shape)}, the model has {list(state[name].shape)}",
                fix="check that config.json and the safetensors belong together",
            )
        places[name] = tensor
    missing = set(state) - set(places) - set(rebuilt)
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
    """Match a checkpoint that `--weights disk` reads one tensor at a time, see `check_tensors`.

    Args:
        model: The model, its parameters on any device.
        stored: From `stored_tensors`.
        dtype: Of the run.

    Raises:
        IncompatibleData: transformers does more than rename its tensors; or as in `check_tensors`.
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


def conversion_steps(model: Any) -> list[Any]:
    """Return what transformers does to the keys of this architecture: renames and rebuilds."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def matched_keys(
    model: Any, stored: Mapping[str, StoredTensor], steps: list[Any]
) -> Iterator[tuple[str, str, Any, str]]:
    """Yield for every key of a checkpoint its name in the model, its converter and its pattern.

    The same as `transformers.core_model_loading` does, in the same order. A tensor that is only
    renamed has no converter (None) and no pattern (""); a name that is not in the model is yielded
    too.

    Args:
        model: The model, its parameters on any device.
        stored: From `stored_tensors`.
        steps: From `conversion_steps`; transformers notes in them which were used.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state, prefix = model.state_dict(), model.base_model_prefix
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    # experts.2 before experts.10: the order in which they are stacked.
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # the file has the new names already
            name, pattern = key, None
        yield key, name, None if pattern is None else by_pattern[pattern], pattern or ""


def _gaps(keys: list[str]) -> list[str]:
    """Return the first number that is missing from numbered keys, as a key, or nothing.

    transformers stacks the experts that exist: a missing one would shift those after it.
    """
    numbers = [[int(digits) for digits in re.findall(r"\d+", key)] for key in keys]
    # Keys of different forms: their numbers cannot be compared by position.
    if len({len(row) for row in numbers}) != 1:
        return []
    for place, column in enumerate(zip(*numbers, strict=True)):
        lacking = set(range(max(column))) - set(column)
        # A column with one value is no index of the stack, such as the number of the block.
        if len(set(column)) > 1 and lacking:
            # With a group in the pattern, split keeps the numbers, at odd places.
            pieces = re.split(r"(\d+)", keys[0])
            pieces[2 * place + 1] = str(min(lacking))
            return ["".join(pieces)]
    return []


def _quantized(tensor: StoredTensor) -> IncompatibleData:
    return IncompatibleData(
        f"{tensor.path} is quantized: {tensor.name} is {tensor.dtype}",
        where="integers would be read as if they were the weights",
        fix="give the unquantized checkpoint",
    )


def _require_plain(model: Any, dtype: torch.dtype) -> None:
    """Refuse a model that transformers does not simply cast to `dtype`."""
    name = type(model).__name__
    if getattr(model.config, "quantization_config", None):
        raise not_on_disk(name, "the checkpoint is quantized")
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(model, "_keep_in_fp32_modules", None) or ()
    # transformers: the strict ones for both 16-bit dtypes, the others for float16 only.
    in_float32 = {torch.float16: {*strict, *loose}, torch.bfloat16: {*strict}}.get(dtype)
    if in_float32:
        raise not_on_disk(name, f"transformers keeps {sorted(in_float32)[0]} in float32")


def not_on_disk(architecture: str, reason: str) -> IncompatibleData:
    """Return the error for an architecture that `--weights disk` does not support."""
    return IncompatibleData(
        f"--weights disk does not fit {architecture}",
        where=reason,
        fix="use --weights resident, on a machine that holds the whole model",
    )
