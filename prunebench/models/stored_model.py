"""The model that transformers would load from files, one tensor at a time.

transformers renames tensors when it loads a checkpoint, and makes some from several (the fused
experts of a mixture). Here each tensor is converted when it is read, so that files can be hashed as
the model that they become, without loading it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.checkpoint_keys import conversion_steps, matched_keys
from prunebench.models.safetensors_files import StoredTensor
from prunebench.models.tensor_files import bytes_of


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a checkpoint, by their names in the model.

    Attributes:
        tensors: Parameters and persistent buffers by name in the model. Tied parameters are listed
            once, under the model's name for them, whatever name the files have.
        parameters: The names that `named_parameters` of the loaded model would list.
        keys: The names in the files of each of `tensors`.
        missing: Names in the model that no file holds.
        unused: Tensors that have no place in the model, by name in the files.
        steps: From `conversion_steps`.
    """

    tensors: dict[str, StoredTensor]
    parameters: list[str]
    keys: dict[str, list[str]]
    missing: list[str]
    unused: dict[str, StoredTensor]
    steps: list[Any]

    @property
    def names(self) -> set[str]:
        """Return the names in the files of all tensors that the model uses."""
        return {key for keys in self.keys.values() for key in keys}


@dataclass(frozen=True)
class Rebuilt(StoredTensor):
    """A parameter that transformers makes from other tensors; converted when it is read.

    Attributes:
        parts: The tensors in the files, by the pattern of the converter that they match.
        converter: The `WeightConverter` of transformers.
        model: The model, for its config.
    """

    parts: dict[str, list[StoredTensor]]
    converter: Any
    model: Any

    def pieces(self, *, align: int = 1) -> Iterator[bytearray]:
        """Yield all its bytes, row-major.

        Raises:
            IncompatibleData: A file has become shorter.
        """
        converter = copy.deepcopy(self.converter)  # it collects the tensors that it is given
        for pattern, parts in self.parts.items():
            converter.collected_tensors[pattern] = [whole_tensor(part) for part in parts]
        converted = converter.convert(self.name, model=self.model, config=self.model.config)
        tensor = converted[self.name]
        yield bytearray(bytes_of(tensor[0] if isinstance(tensor, list) else tensor))  # row-major


def stored_model(model: nn.Module, stored: Mapping[str, StoredTensor]) -> StoredModel:
    """Find the parameters and persistent buffers of a model in its files; nothing is refused.

    Args:
        model: Built from the config of the files, its parameters on any device.
        stored: From `stored_tensors` or `dense_tensors`.
    """
    state: dict[str, Tensor] = model.state_dict()
    tensors: dict[str, StoredTensor] = {}
    keys: dict[str, list[str]] = {}
    parts: dict[str, tuple[Any, dict[str, list[StoredTensor]]]] = {}
    unused: dict[str, StoredTensor] = {}
    steps = conversion_steps(model)
    for key, name, converter, pattern in matched_keys(model, stored, steps):
        if name not in state:
            unused[key] = stored[key]
            continue
        keys.setdefault(name, []).append(key)
        if converter is None:
            tensors[name] = stored[key]
        else:
            parts.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(stored[key])
    for first, (converter, lists) in parts.items():
        for pattern in converter.target_patterns:  # one-to-many: converted again for each
            name = first.replace(converter.target_patterns[0], pattern)
            if name in state:
                shape = tuple(state[name].shape)
                tensors[name] = _rebuilt(name, shape, lists, converter, model)
                keys[name] = keys[first]
    parameters = _settle_ties(model, tensors, keys)
    missing = [name for name in (*parameters, *kept_buffers(model)) if name not in tensors]
    return StoredModel(tensors, parameters, keys, missing, unused, steps)


def saved_names(model: Any, source: StoredModel) -> set[str]:
    """Return the names that `save_pretrained` would give the tensors of a model.

    Args:
        model: On the meta device: nothing is computed.
        source: The files that it is loaded from.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: model.state_dict()[name] for name in source.tensors}
    # revert_weight_conversion reads this attribute, which from_pretrained would have set
    model._weight_conversions = [step for step in source.steps if step.was_used()]
    try:
        return set(revert_weight_conversion(model, state))
    finally:
        del model._weight_conversions


def _rebuilt(
    name: str,
    shape: tuple[int, ...],
    parts: dict[str, list[StoredTensor]],
    converter: Any,
    model: nn.Module,
) -> Rebuilt:
    first = next(iter(parts.values()))[0]
    # Converters stack, split and transpose: the dtype is that of the parts.
    size = torch.Size(shape).numel() * getattr(torch, first.dtype).itemsize
    # It has no range of bytes in a file: 0 and the size stand for it.
    return Rebuilt(first.path, name, first.dtype, shape, 0, size, parts, converter, model)


def kept_buffers(model: nn.Module) -> list[str]:
    """Return the names of a model's persistent buffers, which its files hold."""
    state = set(model.state_dict())
    # Buffers that are not persistent are not in the state dict.
    return [name for name, _ in model.named_buffers() if name in state]


def _settle_ties(
    model: nn.Module, tensors: dict[str, StoredTensor], keys: dict[str, list[str]]
) -> list[str]:
    """Resolve tied parameters as transformers does, in place; return the names of all parameters.

    It ties what is stored once, under whichever name. What is stored twice, with different values,
    is not tied.
    """
    first_of: dict[int, str] = {}
    parameters: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_of.setdefault(id(parameter), name)  # tied parameters are the same object
        if first == name:
            parameters.append(name)
        # Stored under the other name only: it moves to the model's.
        elif name in tensors and first not in tensors:
            tensors[first], keys[first] = tensors.pop(name), keys.pop(name)
        # Stored twice with different values: transformers leaves the two untied.
        elif name in tensors and not _same_bytes(tensors[name], tensors[first]):
            parameters.append(name)
        elif name in tensors:
            del tensors[name]
            keys[first] = [*keys[first], *keys.pop(name)]
    return parameters


def _same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Return whether two tensors are equal, bit for bit, reading a piece at a time."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if isinstance(left, Rebuilt) or isinstance(right, Rebuilt):  # a rebuilt one is a single piece
        return b"".join(left.pieces()) == b"".join(right.pieces())
    return all(a == b for a, b in zip(left.pieces(), right.pieces(), strict=True))


def whole_tensor(stored: StoredTensor) -> Tensor:
    """Read a whole tensor, of whatever kind; it is not empty, and torch has its dtype."""
    data = bytearray().join(stored.pieces())
    return torch.frombuffer(data, dtype=getattr(torch, stored.dtype)).view(stored.shape)
