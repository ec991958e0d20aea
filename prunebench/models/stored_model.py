"""A model as its files hold it: every parameter by its name in the model, none of them loaded.

transformers renames tensors when it loads a checkpoint, and makes some from several (the fused
experts of a mixture). Here the same is done one tensor at a time, when it is read, so that files
can be hashed as the model that a plain transformers would load from them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.safetensors_files import StoredTensor
from prunebench.models.tensor_files import bytes_of


@dataclass(frozen=True)
class StoredModel:
    """What files hold, seen from a model that was built from their config.

    Attributes:
        tensors: Parameters and persistent buffers by name in the model. Of tied parameters the
            name that the model lists, whatever name the files have.
        parameters: The names that the loaded model lists as its parameters.
        keys: The names in the files of each of `tensors`.
        missing: Names in the model that no file holds.
        unused: What the model has no place for, by name in the files.
        steps: What transformers does to the names.
    """

    tensors: dict[str, StoredTensor]
    parameters: list[str]
    keys: dict[str, list[str]]
    missing: list[str]
    unused: dict[str, StoredTensor]
    steps: list[Any]

    @property
    def names(self) -> set[str]:
        """Return the names in the files of all that the model uses."""
        return {key for keys in self.keys.values() for key in keys}


@dataclass(frozen=True)
class Rebuilt(StoredTensor):
    """A parameter that transformers makes of several tensors; made when it is read."""

    parts: dict[str, list[StoredTensor]]
    converter: Any
    model: Any

    def pieces(self, *, align: int = 1) -> Iterator[bytearray]:
        """Yield all its bytes, row-major.

        Raises:
            IncompatibleData: A file has become shorter.
        """
        converter = copy.deepcopy(self.converter)
        for pattern, parts in self.parts.items():
            converter.collected_tensors[pattern] = [_whole(part) for part in parts]
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        tensor = made[self.name]
        yield bytearray(bytes_of(tensor[0] if isinstance(tensor, list) else tensor))


def stored_model(model: nn.Module, stored: Mapping[str, StoredTensor]) -> StoredModel:
    """Find the parameters and persistent buffers of a model in its files.

    Args:
        model: Built from the config of the files, its parameters on any device.
        stored: What the files hold, from `stored_tensors`; packed ones as if they were dense.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    tensors: dict[str, StoredTensor] = {}
    keys: dict[str, list[str]] = {}
    parts: dict[str, tuple[Any, dict[str, list[StoredTensor]]]] = {}
    unused: dict[str, StoredTensor] = {}
    steps = _steps(model)
    for key, name, converter, pattern in _named(model, stored, wanted, steps):
        if name not in wanted:
            unused[key] = stored[key]
            continue
        keys.setdefault(name, []).append(key)
        if converter is None:
            tensors[name] = stored[key]
        else:
            parts.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(stored[key])
    for first, (converter, lists) in parts.items():
        for pattern in converter.target_patterns:  # one-to-many: each of them is made anew
            name = first.replace(converter.target_patterns[0], pattern)
            if name in wanted:
                shape = tuple(wanted[name].shape)
                tensors[name] = _rebuilt(name, shape, lists, converter, model)
                keys[name] = keys[first]
    parameters = _settle_ties(model, tensors, keys)
    missing = [name for name in (*parameters, *kept_buffers(model)) if name not in tensors]
    return StoredModel(tensors, parameters, keys, missing, unused, steps)


def saved_names(model: Any, source: StoredModel) -> set[str]:
    """Return the names that transformers would give the tensors of a model that it saves.

    Args:
        model: On the meta device: nothing is computed.
        source: The files that it is loaded from.
    """
    from transformers.core_model_loading import revert_weight_conversion

    wanted = {name: model.state_dict()[name] for name in source.tensors}
    model._weight_conversions = [step for step in source.steps if step.was_used()]
    try:
        return set(revert_weight_conversion(model, wanted))
    finally:
        del model._weight_conversions


def _steps(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _named(
    model: Any, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], steps: list[Any]
) -> Iterator[tuple[str, str, Any, str]]:
    """Yield of every key its name in the model, and what makes it of how many (else None).

    As `transformers.core_model_loading` does when it loads, in the same order.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix = model.base_model_prefix
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        converter = None if pattern is None else by_pattern[pattern]
        yield key, name, converter, pattern or ""


def _rebuilt(
    name: str,
    shape: tuple[int, ...],
    parts: dict[str, list[StoredTensor]],
    converter: Any,
    model: nn.Module,
) -> Rebuilt:
    first = next(iter(parts.values()))[0]
    size = torch.Size(shape).numel() * getattr(torch, first.dtype).itemsize
    return Rebuilt(first.path, name, first.dtype, shape, 0, size, parts, converter, model)


def kept_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers that belong into a model's files."""
    saved = set(model.state_dict())
    return [name for name, _ in model.named_buffers() if name in saved]


def _settle_ties(
    model: nn.Module, tensors: dict[str, StoredTensor], keys: dict[str, list[str]]
) -> list[str]:
    """Do with tied parameters what transformers does when it loads; returns all parameters.

    It ties what is there once, under whatever name. What is there twice, with different values, is
    not tied at all.
    """
    first_of: dict[int, str] = {}
    parameters: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_of.setdefault(id(parameter), name)
        if first == name:
            parameters.append(name)
        elif name in tensors and first not in tensors:
            tensors[first], keys[first] = tensors.pop(name), keys.pop(name)
        elif name in tensors and not _same_bytes(tensors[name], tensors[first]):
            parameters.append(name)
        elif name in tensors:
            del tensors[name]
            keys[first] = [*keys[first], *keys.pop(name)]
    return parameters


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, a piece in memory at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if isinstance(one, Rebuilt) or isinstance(other, Rebuilt):
        return b"".join(one.pieces()) == b"".join(other.pieces())
    return all(a == b for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _whole(stored: StoredTensor) -> Tensor:
    data = bytearray().join(stored.pieces())
    return torch.frombuffer(data, dtype=getattr(torch, stored.dtype)).view(stored.shape)
