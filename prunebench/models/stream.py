"""Run many batches through a model: batch by batch in memory, block by block from disk.

A model in memory runs one batch after the other. With its blocks on disk that would read the whole
model for every batch; there all batches go through block i before block i + 1 is read. The
arithmetic is the same: the same batches, and the arguments that the model passes to each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.activations import Activations
from prunebench.models.disk import DiskWeights
from prunebench.models.linears import find_blocks
from prunebench.models.out_of_memory import AutoBatch
from prunebench.models.replay import (
    BlockCall,
    blocks_giving,
    plain_inference,
    record_calls,
    run_model,
    share_arguments,
)
from prunebench.models.weights import ResidentWeights, weights_of

_PROBE_TOKENS = 8
Advance = Callable[[int], None]


def is_streamed(model: nn.Module) -> bool:
    """Return whether a model's blocks are read from disk when they are used."""
    return not isinstance(weights_of(model), ResidentWeights)


@torch.no_grad()
def batch_logits(
    model: nn.Module, batches: Sequence[Tensor], *, advance: Advance = lambda done: None
) -> Iterator[Tensor]:
    """Yield the logits of every batch of token ids, (samples, seqlen, vocabulary), in order.

    A batch that runs out of memory is yielded in parts, its rows in order.

    Args:
        model: A causal language model in evaluation mode.
        batches: int64 (samples, seqlen) each.
        advance: Called with the number of samples after each batch.
    """
    device = next(model.parameters()).device
    if not is_streamed(model):

        def run(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
            return logits

        auto_batch = AutoBatch("scoring")
        for ids in batches:
            yield from auto_batch.run(run, ids)
            advance(len(ids))
        return
    streamed = StreamedHead(model)
    hidden = streamed.run(batches, advance=advance)
    for number, ids in enumerate(batches):
        yield streamed.logits(ids, hidden[number])


class StreamedHead:
    """A model whose blocks are on disk: all batches through the blocks, then through the head.

    Args:
        model: A model loaded by `load_on_disk`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = find_blocks(model)[1]
        weights = weights_of(model)
        assert isinstance(weights, DiskWeights)
        self._weights = weights
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def run(
        self, batches: Sequence[Tensor], *, advance: Advance = lambda done: None
    ) -> Activations:
        """Return the outputs of the last block, (samples, seqlen, hidden) for each batch.

        Args:
            batches: int64 (samples, seqlen) each.
            advance: Called after each block with its share of the samples; all calls together add
                up to the number of samples.
        """
        states = self._weights.activations(self._device)
        with plain_inference(self._model, plain_experts=False):
            calls = self._record(batches, states)
            reported, total = 0, sum(map(len, batches))
            for index in range(len(self._blocks)):
                with self._weights.open_block(index) as block:
                    for batch, of_batch in enumerate(calls):
                        hidden = states[batch].to(self._device)  # [samples, seqlen, hidden]
                        states[batch] = of_batch[index].run(block, hidden)
                finished = total * (index + 1) // len(self._blocks)
                advance(finished - reported)
                reported = finished
        return states

    def _record(self, batches: Sequence[Tensor], states: Activations) -> list[list[BlockCall]]:
        """Record the arguments of every block for every batch; equal ones are stored once."""
        returns = self.returns
        calls: list[list[BlockCall]] = []
        by_shape: dict[torch.Size, list[BlockCall]] = {}
        for ids in batches:
            first, recorded = record_calls(
                self._model, self._blocks, ids.to(self._device), returns_tuple=returns
            )
            states.append(first)
            calls.append(share_arguments(recorded, by_shape.setdefault(ids.shape, recorded)))
        return calls

    @property
    def returns(self) -> list[tuple[Any, ...] | None]:
        """What follows the hidden state in each block's output; the first use runs the model."""
        if self._weights.returns is None:
            with plain_inference(self._model, plain_experts=False), torch.no_grad():
                probe = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64, device=self._device)
                self._weights.returns = run_model(self._model, self._blocks, probe).returns_tuple
        return self._weights.returns

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of a batch, (samples, seqlen, vocabulary).

        Args:
            ids: The batch's token ids, int64 (samples, seqlen).
            hidden: Output of the last block, (samples, seqlen, hidden).
        """
        outputs = [hidden.to(self._device)] * len(self._blocks)  # only the last block's is used
        with blocks_giving(self._blocks, outputs, self.returns):
            logits: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False).logits
        return logits
