"""The backward pass of some windows, block by block: for gradient norms and for learned masks.

Forward without a graph: the input of every block and the output of every linear are kept. Backward
from the last block to the first: the block runs again with a graph, its linears give what they gave
before without a product, so that only attention and element-wise work is repeated. Of the graph
only one block exists, and a linear's gradient goes straight to whoever sums it. (Matrices that are
not called as modules, once each, run again: fused experts, and what a block uses twice. Their
gradient exists until it is added.)

A block is opened once forward and once backward for all batches of windows, so that a store may
make its weights anew each time, as masks that are still soft do.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.linears import Linear, find_blocks, find_repeats
from prunebench.models.plan import check_replay
from prunebench.models.replay import BlockCall, blocks_giving, record_calls
from prunebench.models.weights import Blocks, ResidentWeights

HEAD_ROWS = 128
"""Tokens whose logits exist at a time."""


_ROUNDING = 1 / 32
"""Largest relative difference of two ways to multiply in bfloat16."""


@runtime_checkable
class GradientSink(Protocol):
    """Who sums the gradients."""

    def fetch(self, linears: Sequence[Linear]) -> None:
        """Hear which linears come next."""

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Take the gradient outer^T inputs; outer is (tokens, out) and inputs (tokens, in)."""

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Take a gradient that exists already, stored as the weight is."""

    def release(self) -> None:
        """Hear that a block is done."""


class _Replayed(torch.autograd.Function):
    """A linear whose output is known: no product forward, its gradient to the accumulator."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, output: Tensor, linear: Linear, sums: GradientSink
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.linear, ctx.sums = linear, sums
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        linear, outer = ctx.linear, gradients[0]
        ctx.sums.add_product(linear, outer.flatten(0, -2), inputs.flatten(0, -2))
        weight = linear.stored.T if linear.transposed else linear.stored  # (out, in)
        return outer @ weight if ctx.needs_input_grad[0] else None, None, None, None


@dataclass
class _Batch:
    """Windows that run together, and where they are: `hidden` is the input of the next block."""

    window: Int[Tensor, "batch seqlen"]
    hidden: Tensor
    calls: list[BlockCall]
    inputs: list[Tensor] = field(default_factory=list)


class Backward:
    """Adds the gradients of some windows after others.

    Args:
        model: The model, under `plain_inference`.
        linears: Those whose gradients are wanted.
        sums: Who takes them.
        weights: Where the weights of a block come from; by default the model has them.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Linear],
        sums: GradientSink,
        weights: Blocks | None = None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.sums = sums
        self._weights: Blocks = weights or ResidentWeights(self.blocks)
        self._repeats = find_repeats(model, linears)
        self._by_block = [
            [one for one in linears if one.block_index == index]
            for index in range(len(self.blocks))
        ]
        self._returns: list[tuple[Any, ...] | None] = []
        self._changed: set[Linear] = set()
        self._whole = {linear for linear in linears if linear.expert is not None}
        forward: Any = model.forward
        self._some_logits = "logits_to_keep" in inspect.signature(forward).parameters

    def prepare(self, sample: Int[Tensor, "one seqlen"]) -> None:
        """Check that the blocks can be replayed, and see how each gradient is to be had.

        Raises:
            IncompatibleData: They cannot be, or blocks share a matrix.
        """
        for repeat, linear in self._repeats.items():
            raise IncompatibleData(
                f"the gradient of {linear.name} cannot be summed block by block",
                where=f"blocks {linear.block_index} and {repeat.block_index} share its weight",
                fix="use a method without gradients, such as wanda or sparsegpt",
            )
        plans = check_replay(self.model, self.blocks, self._by_block, sample)
        self._returns = [plan.returns for plan in plans]
        for plan in plans:
            self._whole |= plan.by_product | plan.repeated
        if any(plan.leaves_tensors for plan in plans):
            raise IncompatibleData(
                f"the gradients of {type(self.model).__name__} cannot be had block by block",
                where="a block leaves tensors for later blocks beside its hidden state",
                fix="use a method without gradients, such as wanda or sparsegpt",
            )
        hidden, calls = record_calls(self.model, self.blocks, sample, returns_tuple=self._returns)
        for index, block in enumerate(self.blocks):
            known: dict[Linear, list[Tensor]] = {}
            with torch.no_grad(), self._plain_products(index):
                calls[index].run(block, hidden)
            with torch.no_grad(), _outputs_kept(self._called(index), known):
                hidden = calls[index].run(block, hidden)
            self._changed |= {one for one, made in known.items() if any(t._version for t in made)}

    @contextlib.contextmanager
    def _plain_products(self, index: int) -> Iterator[None]:
        """See which linears give more than the product and the bias: autograd has to run those."""

        def look(linear: Linear, inputs: Tensor, output: Any) -> None:
            weight = linear.stored.T if linear.transposed else linear.stored
            product = nn.functional.linear(inputs, weight, getattr(linear.module, "bias", None))
            same = isinstance(output, Tensor) and output.shape == product.shape
            if not same or (output - product).norm() > _ROUNDING * product.norm():
                self._whole.add(linear)

        handles = [
            linear.module.register_forward_hook(
                lambda _, args, output, linear=linear: look(linear, args[0], output)
            )
            for linear in self._called(index)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self, windows: Int[Tensor, "windows seqlen"], *, batch: int = 1, scale: float = 1.0
    ) -> float:
        """Add the gradient of the windows' mean loss, times `scale`; return that loss in nats.

        Args:
            windows: Token windows, on the model's device.
            batch: Windows that run together.
            scale: Factor of the gradient.
        """
        batches = self._batches(windows, batch)
        known = self._forward(batches, keep=True)
        share = scale / (windows[:, 1:].numel() or 1)
        losses, gradients = [], []
        for one in batches:
            loss, gradient = self._head(one.window, one.hidden, share)
            losses.append(loss)
            gradients.append(gradient)
        for index in reversed(range(len(self.blocks))):
            outputs = known.pop()
            with self._weights.open_block(index) as block:
                self.sums.fetch(self._by_block[index])
                for place, one in enumerate(batches):
                    gradients[place] = self._block(block, index, one, outputs, gradients[place])
                self.sums.release()
        return math.fsum(losses) / (windows[:, 1:].numel() or 1)

    def _called(self, index: int) -> list[Linear]:
        """Return the linears of a block that are called as modules, once each in a pass."""
        return [linear for linear in self._by_block[index] if linear not in self._whole]

    def losses(self, windows: Int[Tensor, "windows seqlen"], *, batch: int = 1) -> list[float]:
        """Return the summed cross-entropy of every batch of windows, in nats; no gradients."""
        batches = self._batches(windows, batch)
        self._forward(batches, keep=False)
        return [self._head(one.window, one.hidden, None)[0] for one in batches]

    def _batches(self, windows: Tensor, batch: int) -> list[_Batch]:
        made = []
        for window in torch.split(windows, batch):
            hidden, calls = record_calls(
                self.model, self.blocks, window, returns_tuple=self._returns
            )
            made.append(_Batch(window, hidden, calls))
        return made

    def _forward(self, batches: list[_Batch], *, keep: bool) -> list[dict[Linear, list[Tensor]]]:
        """Run all batches through all blocks; return what each block's linears gave."""
        known: list[dict[Linear, list[Tensor]]] = []
        for index in range(len(self.blocks)):
            made: dict[Linear, list[Tensor]] = {}
            kept = _outputs_kept(self._called(index), made, self._changed)
            with (
                torch.no_grad(),
                self._weights.open_block(index) as block,
                kept if keep else contextlib.nullcontext(),
            ):
                for one in batches:
                    if keep:
                        one.inputs.append(one.hidden)
                    one.hidden = one.calls[index].run(block, one.hidden)
            known.append(made)
        return known

    def _head(self, window: Tensor, hidden: Tensor, share: float | None) -> tuple[float, Tensor]:
        """Return the summed loss of a batch, and the gradient of `share` times it, if wanted."""
        leaf = hidden.detach().requires_grad_(share is not None)
        targets = window[:, 1:]
        length = targets.shape[1]
        step = max(1, HEAD_ROWS // len(window)) if self._some_logits else length
        outputs = [leaf] * len(self.blocks)  # only the last one's is used
        losses = []
        with (
            blocks_giving(self.blocks, outputs, self._returns),
            torch.set_grad_enabled(share is not None),
        ):
            for start in range(0, length, step):
                rows = torch.arange(start, min(start + step, length), device=window.device)
                wanted: dict[str, Any] = {"logits_to_keep": rows} if self._some_logits else {}
                logits = self.model(input_ids=window, use_cache=False, **wanted).logits
                logits = (logits if self._some_logits else logits[:, :-1]).flatten(0, 1)
                loss, slope = _loss_slope(logits.detach(), targets[:, rows].flatten())
                losses.append(loss)
                if share is not None:
                    slope.mul_(share)
                    torch.autograd.backward([logits], [slope.to(logits.dtype)])
        return math.fsum(losses), hidden if leaf.grad is None else leaf.grad

    def _block(
        self,
        block: nn.Module,
        index: int,
        batch: _Batch,
        known: dict[Linear, list[Tensor]],
        gradient: Tensor,
    ) -> Tensor:
        """Run a block again with a graph, add its linears' gradients, return its input's."""
        leaf = batch.inputs.pop().detach().requires_grad_()
        whole = [linear for linear in self._by_block[index] if linear in self._whole]
        given = _outputs_given(self._called(index), known, self.sums, self._changed)
        with given, _whole_gradients(whole, self.sums), torch.enable_grad():
            output = batch.calls[index].run(block, leaf)
            torch.autograd.backward([output], [gradient])
        assert leaf.grad is not None
        return leaf.grad


def _loss_slope(
    logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, " rows"]
) -> tuple[float, Float[Tensor, "rows vocabulary"]]:
    """Return the summed cross-entropy and its gradient: softmax - 1 at the target, float32."""
    slope = logits.to(torch.float32).log_softmax(-1)
    places = torch.arange(len(targets), device=targets.device), targets
    loss = -float(slope[places].sum(dtype=torch.float64))
    slope.exp_()[places] -= 1
    return loss, slope


@contextlib.contextmanager
def _outputs_kept(
    linears: Sequence[Linear],
    known: dict[Linear, list[Tensor]],
    changed: Set[Linear] = frozenset(),
) -> Iterator[None]:
    """Keep what every linear gives, in the order of its calls.

    What is in `changed` gives a copy: the block writes into it.
    """

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        plain = linear.module.forward

        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = plain(inputs)
            known.setdefault(linear, []).append(output)
            return output.clone() if linear in changed else output

        return forward

    with _forwards(linears, wrapped):
        yield


@contextlib.contextmanager
def _outputs_given(
    linears: Sequence[Linear],
    known: dict[Linear, list[Tensor]],
    sums: GradientSink,
    changed: Set[Linear],
) -> Iterator[None]:
    """Let every linear give what it gave before, and add its gradient to `sums`."""

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = _Replayed.apply(  # type: ignore[no-untyped-call]
                inputs, known[linear].pop(0), linear, sums
            )
            return output.clone() if linear in changed else output

        return forward

    with _forwards(linears, wrapped):
        yield


@contextlib.contextmanager
def _forwards(
    linears: Sequence[Linear], wrapped: Callable[[Linear], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    try:
        for linear in linears:
            linear.module.forward = wrapped(linear)
        yield
    finally:
        for linear in linears:
            vars(linear.module).pop("forward", None)


@contextlib.contextmanager
def _whole_gradients(linears: Sequence[Linear], sums: GradientSink) -> Iterator[None]:
    """Add the gradient of every parameter as autograd makes it, over all its uses, and free it."""
    owned: dict[int, tuple[nn.Parameter, list[Linear]]] = {}
    for linear in linears:
        parameter: nn.Parameter = getattr(linear.module, linear.attribute)
        owned.setdefault(id(parameter), (parameter, []))[1].append(linear)
    handles = []
    try:
        for parameter, members in owned.values():

            def add(of: Tensor, members: list[Linear] = members) -> None:
                assert of.grad is not None
                for one in members:
                    sums.add_gradient(one, of.grad if one.expert is None else of.grad[one.expert])
                of.grad = None

            parameter.requires_grad_(True)
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(add))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, _ in owned.values():
            parameter.requires_grad_(False)
            parameter.grad = None
