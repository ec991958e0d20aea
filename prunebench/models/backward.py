"""A backward pass of the whole model, block by block: for gradient norms and for learned masks.

The forward pass builds no graph; the input of every block and the output of every linear are
stored. The backward pass goes from the last block to the first: each block runs again with a graph,
but its linears return their stored outputs without a matrix product, so that only attention and
element-wise operations are recomputed. Only one block's autograd graph is alive at a time; each
linear's gradient is accumulated as soon as it is computed. (Matrices that are not called exactly
once as a module are multiplied again: fused experts, and those that a block uses twice. Their
gradient exists until it is added.)

A block is opened once in the forward and once in the backward pass for all batches, so that a store
can compute its weights each time, as MaskLLM does from soft masks.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.linears import Linear, find_blocks, find_repeats
from prunebench.models.plan import check_replay
from prunebench.models.replay import BlockCall, blocks_giving, record_calls
from prunebench.models.stored_outputs import (
    GradientSink,
    Outputs,
    add_autograd_gradients,
    record_outputs,
    replay_outputs,
)
from prunebench.models.weights import Blocks, ResidentWeights

HEAD_ROWS = {"cpu": 128, "cuda": 4096}
"""Tokens whose logits exist at a time: on a GPU more, because every part waits for the host."""

TokenLoss = Callable[[Tensor, Tensor, Tensor | None], tuple[float, Tensor]]
"""Returns the summed loss of some tokens and its gradient by their logits, in float32.

It takes logits [rows, vocabulary], targets [rows], and the logits of a teacher or None.
"""

_TOKEN_EXPONENT = -7
"""The weight of a token's loss in the backward pass is about 2 to the power of this.

Its share in a step of a million tokens would be lost in float16, which ends at 6e-8.
"""

_ROUNDING = 1 / 32
"""Largest relative difference between two matrix products of the same bfloat16 operands."""


@dataclass
class _Batch:
    """Windows that run together.

    Attributes:
        window: Their token ids.
        hidden: Input of the next block, (batch, seqlen, hidden).
        calls: The arguments of every block.
        inputs: Inputs of the blocks so far; the backward pass pops them.
    """

    window: Int[Tensor, "batch seqlen"]
    hidden: Tensor
    calls: list[BlockCall]
    inputs: list[Tensor] = field(default_factory=list)


class Backward:
    """Computes gradients of the loss and adds them to a sink.

    Args:
        model: The model, under `plain_inference`.
        linears: The linears whose gradients are computed.
        sums: Accumulates the gradients.
        weights: Opens the blocks; by default the model's weights are in memory.
        loss: Of the logits; by default their cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Linear],
        sums: GradientSink,
        weights: Blocks | None = None,
        loss: TokenLoss | None = None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.sums = sums
        self._loss: TokenLoss = loss or _cross_entropy
        self._weights: Blocks = weights or ResidentWeights(self.blocks)
        self._repeats = find_repeats(model, linears)
        self._by_block = [
            [linear for linear in linears if linear.block_index == index]
            for index in range(len(self.blocks))
        ]
        self._returns: list[tuple[Any, ...] | None] = []
        # linears whose output the block modifies in place: the stored output must be cloned
        self._modified: set[Linear] = set()
        # linears whose gradient autograd computes as a whole, because they cannot be replayed
        self._by_autograd = {linear for linear in linears if linear.expert is not None}
        forward: Any = model.forward
        self._some_logits = "logits_to_keep" in inspect.signature(forward).parameters

    def prepare(self, sample: Int[Tensor, "sample seqlen"]) -> None:
        """Check that the blocks can be replayed, and choose how to compute each gradient.

        Args:
            sample: One window, on the model's device.

        Raises:
            IncompatibleData: The blocks cannot be replayed, or share a matrix.
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
            self._by_autograd |= plan.by_product | plan.repeated
        if any(plan.leaves_tensors for plan in plans):
            raise IncompatibleData(
                f"the gradients of {type(self.model).__name__} cannot be computed block by block",
                where="a block leaves tensors for later blocks beside its hidden state",
                fix="use a method without gradients, such as wanda or sparsegpt",
            )
        hidden, calls = record_calls(self.model, self.blocks, sample, returns_tuple=self._returns)
        for index, block in enumerate(self.blocks):
            outputs: Outputs = {}
            with torch.no_grad(), self._find_plain_products(index):
                calls[index].run(block, hidden)
            with torch.no_grad(), record_outputs(self._called(index), outputs):
                hidden = calls[index].run(block, hidden)
            for linear, tensors in outputs.items():
                if any(tensor._version for tensor in tensors):  # counts in-place writes
                    self._modified.add(linear)

    @contextlib.contextmanager
    def _find_plain_products(self, index: int) -> Iterator[None]:
        """Leave linears whose output is more than the product and the bias to autograd."""

        def compare(linear: Linear, inputs: Tensor, output: Any) -> None:
            weight = linear.weight  # [out, in]
            product = nn.functional.linear(inputs, weight, getattr(linear.module, "bias", None))
            same = isinstance(output, Tensor) and output.shape == product.shape
            if not same or (output - product).norm() > _ROUNDING * product.norm():
                self._by_autograd.add(linear)

        handles = [
            linear.module.register_forward_hook(
                lambda _, args, output, linear=linear: compare(linear, args[0], output)
            )
            for linear in self._called(index)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self,
        windows: Int[Tensor, "windows seqlen"],
        *,
        batch: int = 1,
        scale: float = 1.0,
        teacher: Sequence[Tensor] | None = None,
    ) -> float:
        """Add the gradient of the windows' mean loss, times `scale`; return that loss in nats.

        Args:
            windows: Token windows, on the model's device.
            batch: Windows that run together.
            scale: Factor of the gradient.
            teacher: What `last_hidden` returned of them, for a loss that compares.
        """
        batches = self._batches(windows, batch)
        outputs = self._forward(batches, keep=True)
        share = scale / (windows[:, 1:].numel() or 1)  # every token but the first is predicted
        # a power of two, so that it rounds nothing when it is taken back in float32
        larger = 2.0 ** (_TOKEN_EXPONENT - math.frexp(share)[1])
        losses, gradients = [], []
        for i, current in enumerate(batches):
            loss, gradient = self._head(current, share * larger, teacher[i] if teacher else None)
            losses.append(loss)
            gradients.append(gradient)  # [batch, seqlen, hidden]
        for index in reversed(range(len(self.blocks))):
            of_block = outputs.pop()
            with self._weights.open_block(index) as block:
                self.sums.fetch(self._by_block[index], scale=1 / larger)
                for i, current in enumerate(batches):
                    gradients[i] = self._block(block, index, current, of_block, gradients[i])
                self.sums.release()
        return math.fsum(losses) / (windows[:, 1:].numel() or 1)

    def _called(self, index: int) -> list[Linear]:
        """Return the linears of a block that are called as modules, once each in a pass."""
        return [linear for linear in self._by_block[index] if linear not in self._by_autograd]

    def losses(
        self,
        windows: Int[Tensor, "windows seqlen"],
        *,
        batch: int = 1,
        teacher: Sequence[Tensor] | None = None,
    ) -> list[float]:
        """Return the summed loss of every batch of windows, in nats; no gradients."""
        batches = self._batches(windows, batch)
        self._forward(batches, keep=False)
        return [
            self._head(current, None, teacher[i] if teacher else None)[0]
            for i, current in enumerate(batches)
        ]

    def last_hidden(
        self, windows: Int[Tensor, "windows seqlen"], weights: Blocks, *, batch: int = 1
    ) -> list[Tensor]:
        """Return the output of the last block for every batch, (batch, seqlen, hidden).

        Args:
            windows: Token windows, on the model's device.
            weights: Opens the blocks with the weights of a teacher.
            batch: Windows that run together.
        """
        batches = self._batches(windows, batch)
        self._forward(batches, keep=False, weights=weights)
        return [current.hidden for current in batches]

    def _batches(self, windows: Tensor, batch: int) -> list[_Batch]:
        batches = []
        for window in torch.split(windows, batch):  # [batch, seqlen]
            hidden, calls = record_calls(
                self.model, self.blocks, window, returns_tuple=self._returns
            )
            batches.append(_Batch(window, hidden, calls))
        return batches

    def _forward(
        self, batches: list[_Batch], *, keep: bool, weights: Blocks | None = None
    ) -> list[Outputs]:
        """Run all batches through all blocks; return each block's outputs of its linears.

        Args:
            batches: Their `hidden` advances to the output of the last block.
            keep: Whether inputs of blocks and outputs of linears are stored.
            weights: Opens the blocks instead of the trained ones.
        """
        outputs: list[Outputs] = []
        for index in range(len(self.blocks)):
            of_block: Outputs = {}
            recording = record_outputs(self._called(index), of_block, self._modified)
            with (
                torch.no_grad(),
                (weights or self._weights).open_block(index) as block,
                recording if keep else contextlib.nullcontext(),
            ):
                for batch in batches:
                    if keep:
                        batch.inputs.append(batch.hidden)
                    batch.hidden = batch.calls[index].run(block, batch.hidden)
            outputs.append(of_block)
        return outputs

    def _head(
        self, batch: _Batch, share: float | None, teacher: Tensor | None
    ) -> tuple[float, Tensor]:
        """Return the summed loss of a batch, and the gradient of `share` times it.

        Args:
            batch: Its `hidden` is the output of the last block.
            share: Factor of the gradient; None where only the loss is needed.
            teacher: Output of a teacher's last block, (batch, seqlen, hidden), if it has one.

        Returns:
            The loss in nats, and the gradient by the hidden state, (batch, seqlen, hidden); the
            hidden state itself without `share`.
        """
        window, hidden = batch.window, batch.hidden
        leaf = hidden.detach().requires_grad_(share is not None)
        targets = window[:, 1:]  # [batch, seqlen - 1]
        length = targets.shape[1]
        # a model without `logits_to_keep` computes the logits of the whole batch at once
        most = HEAD_ROWS.get(window.device.type, HEAD_ROWS["cuda"])
        step = max(1, most // len(window)) if self._some_logits else length
        losses = []
        for start in range(0, length, step):
            rows = torch.arange(start, min(start + step, length), device=window.device)
            reference = None
            if teacher is not None:
                with torch.no_grad():
                    reference = self._logits(window, teacher, rows)
            with torch.set_grad_enabled(share is not None):
                logits = self._logits(window, leaf, rows)
            loss, gradient = self._loss(logits.detach(), targets[:, rows].flatten(), reference)
            losses.append(loss)
            if share is not None:
                gradient.mul_(share)
                # each slice adds its part to leaf.grad and frees its logits
                torch.autograd.backward([logits], [gradient.to(logits.dtype)])
        return math.fsum(losses), hidden if leaf.grad is None else leaf.grad

    def _logits(self, window: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of some positions, [batch * rows, vocabulary].

        Args:
            window: Token ids, (batch, seqlen).
            hidden: Output of the last block, (batch, seqlen, hidden).
            rows: The positions.
        """
        options: dict[str, Any] = {"logits_to_keep": rows} if self._some_logits else {}
        outputs = [hidden] * len(self.blocks)  # only the last block's is used
        with blocks_giving(self.blocks, outputs, self._returns):
            logits: Tensor = self.model(input_ids=window, use_cache=False, **options).logits
        # [batch, rows, vocabulary] -> [batch * rows, vocabulary]
        return (logits if self._some_logits else logits[:, :-1]).flatten(0, 1)

    def _block(
        self,
        block: nn.Module,
        index: int,
        batch: _Batch,
        outputs: Outputs,
        gradient: Tensor,
    ) -> Tensor:
        """Run a block again with a graph and add the gradients of its linears.

        Args:
            block: The block, open.
            index: Its index.
            batch: The batch; its last stored input is popped.
            outputs: Stored outputs of the block's linears; the first of each is popped.
            gradient: Gradient by the block's output, (batch, seqlen, hidden).

        Returns:
            The gradient by the block's input, (batch, seqlen, hidden).
        """
        leaf = batch.inputs.pop().detach().requires_grad_()
        whole = [linear for linear in self._by_block[index] if linear in self._by_autograd]
        replayed = replay_outputs(self._called(index), outputs, self.sums, self._modified)
        with replayed, add_autograd_gradients(whole, self.sums), torch.enable_grad():
            output = batch.calls[index].run(block, leaf)
            torch.autograd.backward([output], [gradient])
        assert leaf.grad is not None
        return leaf.grad


def _cross_entropy(
    logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, " rows"], teacher: Tensor | None
) -> tuple[float, Float[Tensor, "rows vocabulary"]]:
    """Return the summed cross-entropy and its gradient: softmax - 1 at the target, float32."""
    gradient = logits.to(torch.float32).log_softmax(-1)  # [rows, vocabulary]
    at_targets = torch.arange(len(targets), device=targets.device), targets
    loss = -float(gradient[at_targets].sum(dtype=torch.float64))
    gradient.exp_()[at_targets] -= 1  # in place: the logits of a slice are large
    return loss, gradient
