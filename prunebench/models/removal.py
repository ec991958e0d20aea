"""Remove decoder blocks from a model in place, and prove that the rest is what it was.

A block may only be removed where the others do not notice. Three models must give the same logits,
bit for bit, on a sample:

1. the dense model, in which the blocks to remove return their input;
2. a new model that transformers builds from the smaller config, with the weights that stay: what
   `from_pretrained` will make of a saved folder;
3. the model itself, after its blocks are gone and those that stay have their new numbers.

So there is no code per architecture: one whose blocks share weights, keep keys for each other, or
depend on their place in a way that its config cannot say, is refused, and is then unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.errors import CheckFailed, IncompatibleData
from prunebench.models.disk import build_skeleton
from prunebench.models.hashing import block_index_of
from prunebench.models.linears import find_blocks, find_linears, is_finite
from prunebench.models.replay import BlockCall, TrueRun, plain_inference, run_model
from prunebench.models.smaller_config import fields_without, set_fields, smaller_config

_CHECK_TOKENS = 128
_SCALARS = (bool, int, float, str, type(None), list, tuple)
_OF_TRAINING = ("training", "gradient_checkpointing")


@dataclass(frozen=True)
class Removal:
    """Blocks that were removed, recounted on the model.

    Attributes:
        blocks: Their indices in the dense model, in the order in which they were chosen.
        blocks_before: Blocks of the dense model.
        weights: Prunable weights that are gone.
        parameters: All parameters that are gone.
    """

    blocks: tuple[int, ...]
    blocks_before: int
    weights: int
    parameters: int


def require_removable(model: nn.Module) -> None:
    """Refuse a model whose blocks share parameters with each other or with the rest.

    Raises:
        IncompatibleData: Names the parameter.
    """
    prefix, _ = find_blocks(model)
    block_of = block_index_of(prefix)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if block_of(first) != block_of(name):
            raise _refused(model, f"{name} is the same parameter as {first}")


@torch.no_grad()
def remove_blocks(
    model: nn.Module,
    indices: Sequence[int],
    token_ids: Int[Tensor, "samples seqlen"] | None = None,
) -> Removal:
    """Remove blocks from a model in place; its config and the numbers in its blocks follow.

    Args:
        model: In memory, in evaluation mode.
        indices: The blocks, in any order; none changes nothing.
        token_ids: Windows; the logits are compared on the first tokens. By default random ones.

    Raises:
        IncompatibleData: The blocks that stay depend on those that go, or no config describes the
            smaller model. The model is unchanged.
        CheckFailed: The smaller model does not compute what it should: a bug.
    """
    depth = len(find_blocks(model)[1])
    if not indices:
        return Removal((), depth, 0, 0)
    require_removable(model)
    sample = _sample(model, token_ids)
    expected = _logits_without(model, indices, sample)
    fields = fields_without(_config_of(model), indices, depth)
    built = built_with(model, smaller_config(_config_of(model), fields), removed=indices)
    if not torch.equal(_logits(built, sample), expected):
        raise _refused(model, "the blocks that stay compute otherwise without those that go")
    changes = _changed_attributes(model, built, indices)
    weights, parameters = _count(model)
    _, blocks = find_blocks(model)
    for index in sorted(indices, reverse=True):
        del blocks[index]
    set_fields(_config_of(model), fields)
    for module, name, value in changes:
        setattr(module, name, value)
    if not torch.equal(_logits(model, sample), expected):
        raise CheckFailed(
            f"{type(model).__name__} without {len(indices)} blocks is not what it should be",
            where="its logits differ from those of the dense model whose blocks were skipped",
            fix="load the model again, and report this architecture",
        )
    weights_left, parameters_left = _count(model)
    gone = (weights - weights_left, parameters - parameters_left)
    return Removal(tuple(indices), depth, *gone)


def built_with(model: nn.Module, config: Any, *, removed: Sequence[int] = ()) -> nn.Module:
    """Build a model from a config, with the parameters of another one (not copies of them).

    Args:
        model: In memory.
        config: Of the model to build.
        removed: Blocks of `model` that the other one does not have.

    Raises:
        IncompatibleData: The config builds a model with other parameters.
    """
    own = _config_of(model)
    parameter, new_name = next(model.parameters()), _new_names(model, removed)
    try:
        built: Any = build_skeleton(config, parameter.dtype, attention=own._attn_implementation)
    except Exception as error:  # a config that contradicts itself may raise anything
        raise _refused(model, f"its smaller config is refused: {_first_line(error)}") from error
    tensors = {
        new: tensor
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if (new := new_name(name))
    }
    for name, meta in list(built.named_parameters(remove_duplicate=False)):
        tensor = tensors.pop(name, None)
        if tensor is None or tensor.shape != meta.shape:
            raise _refused(model, f"its smaller config has another {name}")
        _put(built, name, tensor)
    if tensors:
        raise _refused(model, f"its smaller config has no {min(tensors)}")
    buffers = {new: b for name, b in model.named_buffers() if (new := new_name(name))}
    for name, buffer in built.named_buffers():
        if name not in buffers or buffers[name].shape != buffer.shape:
            raise _refused(model, f"its smaller config has another {name}")
        _put(built, name, buffers[name])
    ready: nn.Module = built
    return ready


def same_logits(model: nn.Module, config: Any) -> bool:
    """Return whether a config, such as that of a saved folder, builds a model that computes alike.

    Both have the weights of `model`, so only the configs can make a difference.

    Raises:
        IncompatibleData: The config builds a model with other parameters.
    """
    sample = _sample(model, None)
    return torch.equal(_logits(built_with(model, config), sample), _logits(model, sample))


def _sample(model: nn.Module, token_ids: Tensor | None) -> Tensor:
    """Return a short window on the model's device, [1, tokens]."""
    if token_ids is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = _config_of(model).get_text_config(decoder=True).vocab_size
        token_ids = torch.randint(vocabulary, (1, _CHECK_TOKENS), generator=generator)
    return token_ids[:1, :_CHECK_TOKENS].to(next(model.parameters()).device)


# ---------------------------------------------------------------- logits


@torch.no_grad()
def _logits(model: Any, token_ids: Tensor) -> Tensor:
    with plain_inference(model):
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits


def _logits_without(model: nn.Module, indices: Sequence[int], token_ids: Tensor) -> Tensor:
    """Return the logits of a model in which some blocks return their input."""
    _, blocks = find_blocks(model)
    with plain_inference(model):
        run = run_model(model, blocks, token_ids)
    if run.leaves_tensors:
        raise _refused(model, "blocks leave tensors for later blocks beside the hidden state")
    with _skipped(blocks, indices, run):
        logits = _logits(model, token_ids)
    if not is_finite(logits):
        raise _refused(model, "without the blocks its logits are NaN or infinite")
    return logits


@contextlib.contextmanager
def _skipped(blocks: nn.ModuleList, indices: Sequence[int], run: TrueRun) -> Iterator[None]:
    """Make some blocks return their input."""

    def stand_in(index: int) -> Callable[..., Any]:
        rest = run.returns_tuple[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = BlockCall.take(args, kwargs)[1]
            return hidden if rest is None else (hidden, *rest)

        return forward

    try:
        for index in indices:
            blocks[index].forward = stand_in(index)
        yield
    finally:
        for index in indices:
            vars(blocks[index]).pop("forward", None)


# ---------------------------------------------------------------- names and numbers


def _new_names(model: nn.Module, removed: Sequence[int]) -> Callable[[str], str | None]:
    """Return a function from a name in the dense model to that in the smaller one, or None."""
    prefix, blocks = find_blocks(model)
    stay = [index for index in range(len(blocks)) if index not in removed]
    numbers = {old: new for new, old in enumerate(stay)}
    block_of = block_index_of(prefix)

    def new_name(name: str) -> str | None:
        index = block_of(name)
        if index is None:
            return name
        rest = name[len(f"{prefix}.{index}") :]
        return f"{prefix}.{numbers[index]}{rest}" if index in numbers else None

    return new_name


def _changed_attributes(
    model: nn.Module, built: nn.Module, removed: Sequence[int]
) -> list[tuple[nn.Module, str, Any]]:
    """Return what modules of a model say otherwise in the smaller one: module, name, new value.

    Raises:
        IncompatibleData: A block that stays would be another one, not only have another number.
    """
    new_name, (prefix, blocks) = _new_names(model, removed), find_blocks(model)
    block_of, depth = block_index_of(prefix), len(blocks)
    others = dict(built.named_modules())
    changes = []
    for name, module in model.named_modules():
        new = new_name(name)
        if new is None:
            continue
        index, new_index = block_of(name), block_of(new)
        pair = (depth, depth - len(removed)) if index is None else (index, new_index)
        for key, value in vars(others[new]).items():
            old = vars(module).get(key, value)
            if key.startswith("_") or key in _OF_TRAINING or not isinstance(value, _SCALARS):
                continue
            if old == value and type(old) is type(value):
                continue
            if (old, value) == pair or _is_cut(old, value, removed):
                changes.append((module, key, value))
            elif index is not None:
                reason = f"{new}.{key} would be {value!r}, and was {old!r} in block {index}"
                raise _refused(model, reason)
    return changes


def _is_cut(old: Any, value: Any, removed: Sequence[int]) -> bool:
    """Return whether a list is another one without what it says of the blocks that go."""
    if not (isinstance(old, list | tuple) and isinstance(value, list | tuple)):
        return False
    return list(value) == [item for index, item in enumerate(old) if index not in removed]


def _count(model: nn.Module) -> tuple[int, int]:
    """Return the prunable weights and all parameters of a model."""
    weights = sum(linear.size for linear in find_linears(model))
    return weights, sum(parameter.numel() for parameter in model.parameters())


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    store: Any = module._parameters if attribute in module._parameters else module._buffers
    store[attribute] = tensor


def _config_of(model: nn.Module) -> Any:
    return model.config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _refused(model: nn.Module, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"blocks of {type(model).__name__} cannot be removed",
        where=reason,
        fix="choose another architecture, or a method that zeroes weights",
    )
