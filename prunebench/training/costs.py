"""What a training takes, from shapes alone: activations, and the speed of a matrix product."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunebench.models.backward import HEAD_ROWS
from prunebench.models.linears import Linear, find_linears
from prunebench.training.loop import batch_windows
from prunebench.training.shards import Shards

_GRAPH_COPIES = 1.5  # tensors of a block's graph per output of its linears (estimate)


class TrainingCosts(ABC):
    """What the forecasts of all trainings share.

    Attributes:
        model: On the meta device, or real.
        dtype: Of the weights.
        device: Where the training will run.
        processes: Number of processes.
    """

    model: nn.Module
    dtype: torch.dtype
    device: torch.device
    processes: int

    @abstractmethod
    def micro(self) -> tuple[int, int]:
        """Return the number of windows in a micro-batch, and their length in tokens."""

    def rows(self, linear: Linear) -> int:
        """Return the rows of the first process: no other owns more."""
        rows = Shards(0, self.processes).rows(linear.out_features)
        count: int = rows.stop - rows.start
        return count

    def largest_block(self, linears: Sequence[Linear]) -> int:
        """Return the prunable weights of the largest block."""
        sizes: dict[int, int] = {}
        for linear in linears:
            sizes[linear.block_index] = sizes.get(linear.block_index, 0) + linear.size
        return max(sizes.values(), default=0)

    def activations(self, linears: Sequence[Linear], *, teacher: bool = False) -> int:
        """Return the bytes of saved outputs and inputs, and of one block's graph or some logits.

        Args:
            linears: Of the model.
            teacher: Whether a slice of logits exists twice, for a loss that compares.
        """
        windows, seqlen = self.micro()
        batch = batch_windows(windows, seqlen, self.device.type)
        plain = [linear for linear in linears if linear.expert is None]
        blocks = linears[-1].block_index + 1
        hidden = self.hidden()
        outputs = sum(linear.out_features for linear in plain) + (blocks + 1) * hidden
        graph = int(_GRAPH_COPIES * (outputs / blocks + 2 * hidden))
        # logits of HEAD_ROWS positions, their gradient, and both in float32
        each = 2 * self.dtype.itemsize + 8
        if teacher:  # its logits, their logarithms and probabilities
            each += self.dtype.itemsize + 8
        rows = min(HEAD_ROWS.get(self.device.type, HEAD_ROWS["cuda"]), batch * seqlen)
        head = max(1, rows // batch) * batch * self.vocabulary() * each
        tokens = windows * seqlen
        return tokens * outputs * self.dtype.itemsize + max(
            batch * seqlen * graph * self.dtype.itemsize, head
        )

    def hidden(self) -> int:
        """Return the width of a hidden state."""
        return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    def vocabulary(self) -> int:
        """Return the number of tokens that exist."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def used(self, linears: Sequence[Linear]) -> float:
        """Return the prunable weights that a token is multiplied with."""
        return sum(linear.size * self._share(linear) for linear in linears)

    def _share(self, linear: Linear) -> float:
        """Return the share of the tokens that reach a matrix: 1, except for experts."""
        if linear.expert is None:
            return 1.0
        config = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        experts = int(getattr(linear.module, linear.attribute).shape[0])
        return int(getattr(config, "num_experts_per_tok", experts)) / experts

    def product_rate(self) -> float:
        """Return operations per second of a product with the model's largest weight."""
        largest = max(find_linears(self.model), key=lambda linear: linear.size)
        windows, seqlen = self.micro()
        rows = batch_windows(windows, seqlen, self.device.type) * seqlen
        inputs = torch.ones(rows, largest.in_features, dtype=self.dtype, device=self.device)
        weight = torch.ones(
            largest.out_features, largest.in_features, dtype=self.dtype, device=self.device
        )
        # 2 operations, a multiplication and an addition, per weight and row
        seconds = self.timed(lambda: inputs @ weight.T)
        return 2 * rows * largest.size / seconds

    def timed(self, action: Callable[[], object]) -> float:
        """Return the seconds of the faster of two calls, after a warm-up call."""
        seconds = []
        # The first call is the warm-up: it compiles kernels and allocates memory.
        for _ in range(3):
            self._wait()
            start_time = time.perf_counter()
            action()
            self._wait()
            seconds.append(time.perf_counter() - start_time)
        return min(seconds[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
