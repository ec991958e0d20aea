"""How many bytes of tensors exist at a time, counted while code runs, on any device.

On the meta device tensors have shapes and no memory: the peak of a whole block of any size is
known in milliseconds. Scratch memory inside a kernel is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunebench.calibration.stats import StatsAccumulator, Workspace
from prunebench.models.disk import build_skeleton
from prunebench.models.linears import Linear, find_blocks, find_linears
from prunebench.models.replay import BlockCall, Stop, plain_inference
from prunebench.models.taps import capture_inputs

_LOSS_ROWS = 128  # tokens whose losses are made at a time, see `evaluate.perplexity`


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: its output exists, its scores never do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class Footprint(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is open.

    Attributes:
        peak: The most that existed at a time.
        now: What exists now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        old = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if _is_plain(one)}
        for one in tree_leaves(output):
            if _is_plain(one):
                self._see(one.untyped_storage(), old)
        return output

    def _see(self, storage: Any, old: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or id(storage) in old:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class BlockFootprint:
    """Bytes of tensors at the peak of a stage, weights not counted.

    Attributes:
        running: Running one block with nothing collected.
        collecting: Running one block and collecting statistics.
        statistics: What the statistics take when they are complete.
        head: Making logits of the last hidden state, and losses of them.
    """

    running: int
    collecting: int
    statistics: int
    head: int


@torch.no_grad()
def count_footprint(
    config: Any,
    dtype: torch.dtype,
    *,
    calibration: tuple[int, int],
    scoring: tuple[int, int],
    hessian: bool,
) -> BlockFootprint:
    """Count what a batch takes, from the config alone.

    Args:
        config: Of the model.
        dtype: Of the run.
        calibration: Sequences and tokens of a calibration batch.
        scoring: The same of a batch that is scored.
        hessian: Whether Gram matrices are collected.
    """
    model = build_skeleton(config, dtype)
    prefix, blocks = find_blocks(model)
    _put_zeros_outside(model, prefix)
    block = blocks[0]
    linears = [one for one in find_linears(model) if one.block_index == 0]
    with plain_inference(model), _FusedAttention():
        hidden, call = _first_call(model, block, calibration)
        with Footprint() as plain:
            call.run(block, hidden)
        workspace: Workspace = {}
        seen: dict[str, StatsAccumulator] = {}
        last: list[Tensor] = []

        def tap(linear: Linear, inputs: Tensor) -> None:
            if not last or last[0] is not inputs:  # linears that share an input share statistics
                last[:] = [inputs]
                seen[linear.name] = StatsAccumulator(workspace, hessian=hessian)
                seen[linear.name].add(inputs)

        with Footprint() as collecting:
            with capture_inputs(linears, tap):
                call.run(block, hidden)
            last.clear()
            statistics = collecting.now
    head = _head(config, dtype, scoring)
    return BlockFootprint(plain.peak, collecting.peak, statistics, head)


def _put_zeros_outside(model: nn.Module, prefix: str) -> None:
    """Give what lies outside the blocks weights of zero that take no memory."""
    for path, module in model.named_modules():
        if not f"{path}.".startswith(f"{prefix}."):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    for buffer in model.buffers():
        assert not buffer.is_meta


def _first_call(
    model: nn.Module, block: nn.Module, shape: tuple[int, int]
) -> tuple[Tensor, BlockCall]:
    """Return the hidden state and the arguments of the first block, on the meta device."""
    found: list[tuple[BlockCall, Tensor]] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        found.append(BlockCall.take(args, kwargs))
        raise Stop

    block.forward = forward
    try:
        with contextlib.suppress(Stop):
            model(input_ids=torch.zeros(shape, dtype=torch.int64), use_cache=False)
    finally:
        vars(block).pop("forward", None)
    call, hidden = found[0]
    for name, buffer in block.named_buffers():
        owner, _, attribute = name.rpartition(".")
        block.get_submodule(owner)._buffers[attribute] = buffer.to("meta")
    args, kwargs = tree_map(_to_meta, (call.args, call.kwargs))
    return hidden.to("meta"), BlockCall(args, kwargs, call.keyword)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _head(config: Any, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """Return what logits take, and the losses of as many tokens as are made at a time."""
    vocabulary = config.get_text_config().vocab_size
    logits = shape[0] * shape[1] * int(vocabulary) * dtype.itemsize
    rows = min(_LOSS_ROWS, shape[1]) * vocabulary * 4
    return logits + 3 * int(rows)
