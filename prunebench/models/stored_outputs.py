"""Linears that return their stored outputs in the backward pass, and where their gradients go.

`record_outputs` stores what the linears of a block return in the forward pass; `replay_outputs`
returns it in the backward pass instead of multiplying again, and adds each linear's gradient to a
`GradientSink`. Parameters that cannot be replayed go through `add_autograd_gradients`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunebench.models.linears import Linear

Outputs = dict[Linear, list[Tensor]]
"""Outputs of a block's linears, one for each batch, in order."""


@runtime_checkable
class GradientSink(Protocol):
    """Accumulates the gradients."""

    def fetch(self, linears: Sequence[Linear], *, scale: float) -> None:
        """Prepare for the gradients of a block's linears; called before its backward pass.

        Args:
            linears: Those of the block.
            scale: What the gradients are still to be multiplied by.
        """

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add the gradient outer^T inputs, (out, in).

        Args:
            linear: The linear.
            outer: Gradient of its output, (tokens, out).
            inputs: Its input, (tokens, in).
        """

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add a gradient that autograd has computed, in the layout of the stored weight."""

    def release(self) -> None:
        """Free what `fetch` has prepared; called after a block's backward pass."""


def product_operands(outer: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return operands and keyword arguments with which `torch.mm` gives outer^T inputs in float32.

    Args:
        outer: Gradient of a linear's output, (tokens, out).
        inputs: Its input, (tokens, in).
    """
    if outer.is_cuda and outer.dtype == inputs.dtype in (torch.float16, torch.bfloat16):
        # tensor cores multiply 16 bits and sum in float32
        return outer, inputs, {"out_dtype": torch.float32}
    return outer.to(torch.float32), inputs.to(torch.float32), {}


class _Replayed(torch.autograd.Function):
    """A linear whose output is stored: no product forward; its gradient is added to a sink."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, output: Tensor, linear: Linear, sums: GradientSink
    ) -> Tensor:
        ctx.save_for_backward(inputs)  # [..., in]
        ctx.linear, ctx.sums = linear, sums
        return output  # [..., out]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        linear, outer = ctx.linear, gradients[0]  # outer: [..., out]
        # [tokens, out], [tokens, in]
        ctx.sums.add_product(linear, outer.flatten(0, -2), inputs.flatten(0, -2))
        weight = linear.weight  # [out, in]
        # [..., out] @ [out, in] -> [..., in]; no gradient for output, linear and sums
        return outer @ weight if ctx.needs_input_grad[0] else None, None, None, None


@contextlib.contextmanager
def record_outputs(
    linears: Sequence[Linear],
    outputs: Outputs,
    modified: Set[Linear] = frozenset(),
) -> Iterator[None]:
    """Store the output of every linear in `outputs`, in the order of its calls.

    The linears in `modified` return a copy, because the block writes into it.
    """

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        plain = linear.module.forward

        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = plain(inputs)  # [..., out]
            outputs.setdefault(linear, []).append(output)
            return output.clone() if linear in modified else output

        return forward

    with _forwards(linears, wrapped):
        yield


@contextlib.contextmanager
def replay_outputs(
    linears: Sequence[Linear],
    outputs: Outputs,
    sums: GradientSink,
    modified: Set[Linear],
) -> Iterator[None]:
    """Return every linear's stored output instead of the product; add its gradient to `sums`."""

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = _Replayed.apply(  # type: ignore[no-untyped-call]
                inputs, outputs[linear].pop(0), linear, sums
            )
            return output.clone() if linear in modified else output

        return forward

    with _forwards(linears, wrapped):
        yield


@contextlib.contextmanager
def _forwards(
    linears: Sequence[Linear], wrapped: Callable[[Linear], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Replace the forward of every linear's module by `wrapped(linear)`."""
    try:
        for linear in linears:
            linear.module.forward = wrapped(linear)
        yield
    finally:
        for linear in linears:
            vars(linear.module).pop("forward", None)  # the class's forward shows again


@contextlib.contextmanager
def add_autograd_gradients(linears: Sequence[Linear], sums: GradientSink) -> Iterator[None]:
    """Add the gradients that autograd computes to `sums`, over all uses, and free them at once."""
    # by id of the parameter: the experts of a fused one share its gradient, [experts, out, in]
    owned: dict[int, tuple[nn.Parameter, list[Linear]]] = {}
    for linear in linears:
        parameter: nn.Parameter = getattr(linear.module, linear.attribute)
        owned.setdefault(id(parameter), (parameter, []))[1].append(linear)
    handles = []
    try:
        for parameter, members in owned.values():

            def add(owner: Tensor, members: list[Linear] = members) -> None:
                gradient = owner.grad
                assert gradient is not None
                for linear in members:
                    expert = linear.expert
                    sums.add_gradient(linear, gradient if expert is None else gradient[expert])
                owner.grad = None

            parameter.requires_grad_(True)  # weights are frozen otherwise
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(add))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, _ in owned.values():
            parameter.requires_grad_(False)
            parameter.grad = None
