"""Count the peak number of bytes in tensors while code runs, on any device.

On the meta device tensors have shapes and no memory, so the peak of a block of any size is computed
in milliseconds. Scratch memory inside a kernel is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunebench.calibration.stats import StatsAccumulator, Workspace
from prunebench.models.disk import build_skeleton
from prunebench.models.linears import Linear, find_blocks, find_linears
from prunebench.models.replay import BlockCall, Stop, plain_inference
from prunebench.models.taps import capture_inputs

_LOSS_ROWS = 128  # tokens whose losses are computed at a time, see `evaluate.perplexity`


class _NoScores(torch.autograd.Function):
    """Attention that stores what the fused kernels store, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))  # [..., tokens, head dim]
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """Attention with the memory of the fused kernels: the output, but no score matrix."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            apply: Any = _NoScores.apply
            return apply(*args[:3])
        return func(*args, **(kwargs or {}))


class Footprint(TorchDispatchMode):
    """Count the bytes of all tensor storages that are created inside the `with` statement.

    Attributes:
        peak: Largest number of bytes that existed at a time.
        now: Number of bytes that exist now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        # storages of the arguments are not new: the output of a view or in-place operation
        old = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            self._count(tensor.untyped_storage(), old)
        return output

    def _count(self, storage: Any, old: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted or id(storage) in old:
            return
        self._counted.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        # Counted down when the storage is freed, whichever tensor held it last.
        weakref.finalize(storage, self._uncount, key, size)

    def _uncount(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class BlockFootprint:
    """Peak bytes of tensors in each stage, without weights.

    Attributes:
        running: Running one block without statistics.
        collecting: Running one block and collecting statistics.
        statistics: The complete statistics of one block.
        head: Computing logits from the last hidden state, and losses from them.
        training: Running one block in float32 forward and backward, gradients included; 0 if it was
            not counted.
    """

    running: int
    collecting: int
    statistics: int
    head: int
    training: int = 0


@torch.no_grad()
def count_footprint(
    config: Any,
    dtype: torch.dtype,
    *,
    calibration: tuple[int, int],
    scoring: tuple[int, int],
    hessian: bool,
    trained: int = 0,
) -> BlockFootprint:
    """Count the memory that a batch takes, from the config alone.

    Args:
        config: Configuration of the model.
        dtype: Of the weights and activations.
        calibration: Shape of a calibration batch, (samples, seqlen).
        scoring: Shape of an evaluation batch, (samples, seqlen).
        hessian: Whether Gram matrices are collected.
        trained: Windows of a training batch; 0 if no block is trained.
    """
    model = build_skeleton(config, dtype)
    prefix, blocks = find_blocks(model)
    _put_zeros_outside(model, prefix)
    block = blocks[0]
    linears = [linear for linear in find_linears(model) if linear.block_index == 0]
    with plain_inference(model), _FusedAttention():
        hidden, call = _first_call(model, block, calibration)
        with Footprint() as plain:
            call.run(block, hidden)
        workspace: Workspace = {}
        accumulators: dict[str, StatsAccumulator] = {}
        last: list[Tensor] = []

        def hook(linear: Linear, inputs: Tensor) -> None:
            if not last or last[0] is not inputs:  # linears that share an input share statistics
                last[:] = [inputs]
                accumulators[linear.name] = StatsAccumulator(workspace, hessian=hessian)
                accumulators[linear.name].add(inputs)

        with Footprint() as collecting:
            with capture_inputs(linears, hook):
                call.run(block, hidden)
            last.clear()  # the last input would be counted as statistics
            # What still exists after the block: the accumulators and their workspace.
            statistics = collecting.now
        training = 0
        if trained:
            hidden, call = _first_call(model, block, (trained, calibration[1]))
            training = _training_peak(block, hidden, call)
    head = _head(config, dtype, scoring)
    return BlockFootprint(plain.peak, collecting.peak, statistics, head, training)


def _training_peak(block: nn.Module, hidden: Tensor, call: BlockCall) -> int:
    """Return the bytes of a forward and backward pass of a block in float32, with its gradients."""
    values = {
        name: parameter.to(torch.float32).requires_grad_(parameter.ndim > 1)
        for name, parameter in block.named_parameters()
    }
    call, hidden = call.cast(torch.float32), hidden.to(torch.float32)

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, values, args, kwargs)

    with Footprint() as footprint, torch.enable_grad():
        output = call.run(run, hidden)
        torch.autograd.backward([output.square().mean()])
    return int(footprint.peak)


def _put_zeros_outside(model: nn.Module, prefix: str) -> None:
    """Replace the meta parameters outside the blocks by zeros that take no memory."""
    for path, module in model.named_modules():
        if not f"{path}.".startswith(f"{prefix}."):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    # one element with strides of 0
                    zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    for buffer in model.buffers():
        assert not buffer.is_meta


def _first_call(
    model: nn.Module, block: nn.Module, shape: tuple[int, int]
) -> tuple[Tensor, BlockCall]:
    """Return the hidden state and the arguments of the first block, on the meta device."""
    calls: list[tuple[BlockCall, Tensor]] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        calls.append(BlockCall.take(args, kwargs))
        raise Stop

    block.forward = forward
    try:
        with contextlib.suppress(Stop):
            # All before the blocks runs on the CPU; the first block only notes its arguments.
            model(input_ids=torch.zeros(shape, dtype=torch.int64), use_cache=False)
    finally:
        vars(block).pop("forward", None)
    call, hidden = calls[0]
    # The skeleton keeps its buffers real; in the block they must be on the device of its inputs.
    for name, buffer in block.named_buffers():
        owner, _, attribute = name.rpartition(".")
        block.get_submodule(owner)._buffers[attribute] = buffer.to("meta")
    args, kwargs = tree_map(_to_meta, (call.args, call.kwargs))
    return hidden.to("meta"), BlockCall(args, kwargs, call.keyword)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _head(config: Any, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """Return the bytes of a batch's logits, and of the losses of `_LOSS_ROWS` tokens."""
    vocabulary = config.get_text_config().vocab_size
    logits = shape[0] * shape[1] * int(vocabulary) * dtype.itemsize  # [samples, seqlen, vocabulary]
    rows = min(_LOSS_ROWS, shape[1]) * vocabulary * 4
    return logits + 3 * int(rows)  # float32 logits and temporaries of the loss
