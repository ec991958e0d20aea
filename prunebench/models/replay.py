"""Replay: call the blocks of a model one at a time, with the arguments that the model passes.

There is no code per architecture. The model itself is run with every block's forward replaced by
one that records its arguments and returns its input, so that embeddings, masks, position embeddings
and whatever else a transformers version passes are computed by the model's own code, at almost no
cost. A block is then called with those arguments and any hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunebench.errors import IncompatibleData

_CHECK_TOKENS = 8
Copies = dict[int, tuple[Tensor, Tensor]]
"""By `id(tensor)`: the tensor, held so that its id is not reused, and its copy on a device."""


class Stop(Exception):
    """Ends a forward pass early; raised and caught in this package only."""


@dataclass
class BlockCall:
    """The arguments of one call of a block, without the hidden state.

    Attributes:
        args: Positional arguments; the first is the hidden state, and None here, if `keyword` is
            empty.
        kwargs: Keyword arguments, without the hidden state.
        keyword: Name under which the hidden state is passed, or empty.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str

    @classmethod
    def take(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
        """Split the arguments of a call into the rest and the hidden state."""
        if args:
            return cls((None, *args[1:]), dict(kwargs), ""), args[0]
        rest = dict(kwargs)
        return cls((), rest, "hidden_states"), rest.pop("hidden_states")

    def to(self, device: torch.device, copies: Copies) -> BlockCall:
        """Return the call with its tensors on `device`.

        `copies` has the tensors that were copied there before: shared ones are copied once.
        """

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = (tensor, tensor.to(device))
            return copies[id(tensor)][1]

        return self._mapped(moved)

    def cast(self, dtype: torch.dtype) -> BlockCall:
        """Return the call with its floating-point tensors in `dtype`."""
        return self._mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return BlockCall(args, kwargs, self.keyword)

    def count_tensors(self) -> int:
        """Count the tensors in the arguments; a block may add some to mappings and lists."""

        def count(value: Any) -> int:
            if isinstance(value, Mapping):
                value = list(value.values())
            if isinstance(value, list | tuple):
                return sum(map(count, value))
            return isinstance(value, Tensor)

        return count((self.args, self.kwargs))

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Call the block; return its hidden state, (samples, seqlen, hidden)."""
        if self.keyword:
            return hidden_of(block(**{self.keyword: hidden}, **self.kwargs))
        return hidden_of(block(hidden, *self.args[1:], **self.kwargs))


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state of a block's output, a tensor or a tuple that begins with it."""
    hidden = output[0] if type(output) is tuple else output
    if not isinstance(hidden, Tensor):
        raise IncompatibleData(
            f"a block returns {type(output).__name__}, not a hidden state",
            fix="this architecture cannot be replayed; report it",
        )
    return hidden


@contextlib.contextmanager
def plain_inference(model: nn.Module, *, plain_experts: bool = True) -> Iterator[None]:
    """Evaluation mode, no KV cache, experts one by one; restore the settings afterwards.

    A KV cache among the recorded arguments would grow at every replay, and the second pass would
    attend to the keys of the first.

    Args:
        model: A causal language model.
        plain_experts: Whether experts run one by one, so that the inputs of each can be captured.
    """
    pretrained: Any = model  # what transformers adds to nn.Module
    config = pretrained.config
    use_cache, training = getattr(config, "use_cache", None), model.training
    experts = pretrained.get_experts_implementation()
    has_experts = plain_experts and any(experts.values())
    model.eval()
    config.use_cache = False
    if has_experts:
        pretrained.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.train(training)
        config.use_cache = use_cache
        if has_experts:
            pretrained.set_experts_implementation(experts)


@dataclass(frozen=True)
class TrueRun:
    """A forward pass of the model on one sample: the input of every block and the last output.

    Attributes:
        inputs: Hidden state before every block, (1, seqlen, hidden).
        output: Hidden state after the last block.
        returns_tuple: What each block returns after the hidden state, if it returns a tuple, with
            tensors replaced by NaN; else None.
        leaves_tensors: Whether a block put tensors into its arguments, for later blocks.
    """

    inputs: list[Tensor]
    output: Tensor
    returns_tuple: list[tuple[Any, ...] | None]
    leaves_tensors: bool = False


def run_model(
    model: nn.Module, blocks: nn.ModuleList, token_ids: Tensor, *, to_end: bool = True
) -> TrueRun:
    """Run the model on one sample and record the input of each block.

    Args:
        model: The model.
        blocks: Its blocks.
        token_ids: One sample, (1, seqlen).
        to_end: Whether to continue after the last block, where a model might call its blocks again;
            False where that has been checked.

    Raises:
        IncompatibleData: The blocks are not called once each, in order, or pass each other more
            than the hidden state.
    """
    trace = _Trace(model, len(blocks), to_end=to_end)
    handles = []
    for index, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=index: trace.before(i, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            block.register_forward_hook(lambda _, args, out, i=index: trace.after(i, out))
        )
    try:
        with contextlib.suppress(Stop):
            model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if trace.order != list(range(len(blocks))):
        missing = sorted(set(range(len(blocks))) - set(trace.order))
        order = trace.order[: 2 * len(blocks)]
        reason = f"its blocks run in the order {order}, not once each in order"
        raise not_replayable(model, f"block {missing[0]} does not run" if missing else reason)
    return TrueRun(trace.inputs, trace.last[0], trace.returns, trace.leaves_tensors)


class _Trace:
    """Record the inputs and outputs of the blocks."""

    def __init__(self, model: nn.Module, blocks: int, *, to_end: bool) -> None:
        self.order: list[int] = []
        self.inputs: list[Tensor] = []
        self.returns: list[tuple[Any, ...] | None] = []
        self.last: list[Tensor] = []
        self.leaves_tensors = False
        self._model = model
        self._final = blocks - 1
        self._to_end = to_end
        # By `id`, with the tensors held so that no id is reused: arguments of the blocks so far,
        # and new tensors that they returned after the hidden state.
        self._arguments: dict[int, Tensor] = {}
        self._extras: dict[int, Tensor] = {}

    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, hidden = BlockCall.take(args, kwargs)
        self.order.append(index)
        self.inputs.append(hidden)
        self._call, self._count = call, call.count_tensors()
        self._arguments |= _tensors((args, kwargs))
        if not self._arguments.keys().isdisjoint(self._extras):
            reason = "blocks pass tensors to later blocks beside the hidden state"
            raise not_replayable(self._model, reason)

    def after(self, index: int, output: Any) -> None:
        hidden = hidden_of(output)
        self.leaves_tensors |= self._call.count_tensors() != self._count
        rest = output[1:] if isinstance(output, tuple) else None
        # a block may return an argument unchanged; that tells a later block nothing new
        extras = _tensors(rest)
        self._extras |= {key: extras[key] for key in extras.keys() - self._arguments.keys()}
        self.returns.append(None if rest is None else tuple(map(_unusable, rest)))
        if index == self._final:
            self.last.append(hidden.clone())  # the code after the blocks may write into it
            if not self._to_end:
                raise Stop


def _tensors(values: Any) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _unusable(value: Any) -> Any:
    """Return NaN in place of a tensor: what blocks pass to each other is not replayed.

    A replaced block could only return tensors of other tokens; NaN shows if a model uses them.
    """
    if isinstance(value, Tensor):
        return torch.full_like(value, float("nan")) if value.is_floating_point() else value * 0
    return value


@torch.no_grad()
def require_run(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Check on a few tokens that the forward pass runs every block.

    Raises:
        IncompatibleData: A block does not run.
    """
    ran: set[int] = set()
    handles = [
        block.register_forward_pre_hook(lambda *_, index=index: ran.add(index))
        for index, block in enumerate(blocks)
    ]
    token_ids = torch.zeros(
        (1, _CHECK_TOKENS), dtype=torch.int64, device=next(model.parameters()).device
    )
    try:
        model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(ran) < len(blocks):
        missing = min(set(range(len(blocks))) - ran)
        raise not_replayable(model, f"block {missing} does not run")


@torch.no_grad()
def record_calls(
    model: nn.Module,
    blocks: nn.ModuleList,
    token_ids: Tensor,
    *,
    returns_tuple: list[tuple[Any, ...] | None],
) -> tuple[Tensor, list[BlockCall]]:
    """Run the model without its blocks: return the first hidden state and each block's arguments.

    Args:
        model: The model, under `plain_inference`.
        blocks: Its blocks.
        token_ids: (samples, seqlen).
        returns_tuple: For each block, what follows the hidden state in its output if it returns a
            tuple, else None; see `run_model`.
    """
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = BlockCall.take(args, kwargs)
            calls.append(call)
            if index == 0:
                first.append(hidden)  # [samples, seqlen, hidden]
            if index == len(blocks) - 1:
                raise Stop  # no head: the logits are not needed
            rest = returns_tuple[index]
            return hidden if rest is None else (hidden, *rest)

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        with contextlib.suppress(Stop):
            model(input_ids=token_ids, use_cache=False)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # the class's forward shows again
    return first[0], calls


def share_arguments(calls: list[BlockCall], first: list[BlockCall]) -> list[BlockCall]:
    """Replace a batch's arguments by those of the first batch where they are equal: one copy."""
    # by pair of ids: the blocks share most arguments, so each pair is compared once
    chosen: dict[tuple[int, int], Any] = {}

    def shared(new: Any, old: Any) -> Any:
        key = (id(new), id(old))
        if key not in chosen:
            chosen[key] = old if _same(new, old) else new
        return chosen[key]

    for call, old in zip(calls, first, strict=True):
        if len(call.args) == len(old.args) and call.kwargs.keys() == old.kwargs.keys():
            call.args = tuple(map(shared, call.args, old.args))
            call.kwargs = {
                name: shared(call.kwargs[name], old.kwargs[name]) for name in call.kwargs
            }
    return calls


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (
            left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
        )
    if isinstance(left, tuple | list) and type(left) is type(right):
        return len(left) == len(right) and all(map(_same, left, right))
    return left is right


@torch.no_grad()
def resume(
    model: nn.Module, blocks: nn.ModuleList, token_ids: Tensor, *, index: int, run: TrueRun
) -> Tensor:
    """Run the model from block `index` to its end; return logits, (samples, seqlen, vocabulary).

    Args:
        model: The model, under `plain_inference`.
        blocks: Its blocks.
        token_ids: (samples, seqlen).
        index: The first block that runs.
        run: The dense model's run on these tokens; the blocks before `index` return its outputs.

    Raises:
        IncompatibleData: Blocks leave tensors for later blocks beside the hidden state.
    """
    if run.leaves_tensors:
        raise not_replayable(model, "blocks leave tensors for later blocks beside the hidden state")
    outputs = run.inputs[1 : index + 1]
    with blocks_giving(blocks, outputs, run.returns_tuple):
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits


@contextlib.contextmanager
def blocks_giving(
    blocks: nn.ModuleList,
    outputs: Sequence[Tensor],
    returns_tuple: Sequence[tuple[Any, ...] | None],
) -> Iterator[None]:
    """Replace the first blocks: block i returns `outputs[i]`, (samples, seqlen, hidden)."""

    def stand_in(index: int) -> Callable[..., Any]:
        hidden, rest = outputs[index], returns_tuple[index]
        return lambda *args, **kwargs: hidden if rest is None else (hidden, *rest)

    try:
        for index in range(len(outputs)):
            blocks[index].forward = stand_in(index)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def not_replayable(model: nn.Module, reason: str) -> IncompatibleData:
    """Return the error for an architecture that cannot be replayed."""
    return IncompatibleData(
        f"{type(model).__name__} cannot be replayed block by block",
        where=reason,
        fix="choose another architecture, or report this one",
    )
