"""The loop over training steps: order of the windows, held-out checks, the best state so far.

A step opens every block twice (forward, backward). What is trained decides what it is filled with.
"""

from __future__ import annotations

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.backward import Backward, TokenLoss
from prunebench.models.linears import Linear, find_blocks
from prunebench.models.replay import plain_inference
from prunebench.training.filled_weights import Fill, FilledWeights
from prunebench.training.gradients import GradientSums
from prunebench.training.shards import Shards

_CHECK_TOKENS = 128  # of the window on which `Backward` checks itself
_CPU_BATCH_TOKENS = 1024  # activations of a larger batch leave the cache


class Point(Protocol):
    """Metrics at the end of a training step; step 0 is the initial state."""

    @property
    def step(self) -> int:
        """Steps taken."""

    @property
    def seconds(self) -> float:
        """Since the start, over resumes."""


P = TypeVar("P", bound=Point)


@dataclass
class Progress(Generic[P]):
    """The state of a training.

    Attributes:
        best: What is trained, as it was at the lowest held-out loss so far, by linear, of the rows
            that this process owns.
        curve: One point per step.
        best_step: The step that `best` is from; 0 is the start.
    """

    best: dict[str, Tensor] = field(default_factory=dict)
    curve: list[P] = field(default_factory=list)
    best_step: int = 0


class TrainingLoop(ABC, Generic[P]):
    """Trains something from which the weights of a model follow.

    Args:
        model: In evaluation mode, all parameters frozen.
        linears: Their weights are trained.
        sums: Accumulates the gradients of a step.
        fill: Writes the weight of a linear as it is trained.
        steps: Number of steps.
        batch: Windows per step, over all processes.
        seed: Of the order of the windows.
        micro_tokens: Tokens of a micro-batch: their activations are in memory at the same time.
        shards: This process among others.
        loss: Of the logits; by default their cross-entropy.

    Attributes:
        done: Steps taken.
        progress: The curve, and the best state so far.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Linear],
        sums: GradientSums,
        fill: Fill,
        *,
        steps: int,
        batch: int,
        seed: int,
        micro_tokens: int,
        shards: Shards,
        loss: TokenLoss | None = None,
    ) -> None:
        self.model = model
        self.steps = steps
        self.batch = batch
        self.seed = seed
        self.micro_tokens = micro_tokens
        self.shards = shards
        self.done = 0
        self.progress: Progress[P] = Progress()
        self._store = FilledWeights(find_blocks(model)[1], linears, fill)
        self._backward = Backward(model, linears, sums, self._store, loss)
        self._device = next(model.parameters()).device

    def learn(
        self,
        train: Int[Tensor, "windows seqlen"],
        held_out: Int[Tensor, "held seqlen"],
        *,
        eval_every: int,
        after_step: Callable[[P], None] = lambda point: None,
    ) -> Progress[P]:
        """Run the remaining steps.

        Args:
            train: Windows to train on; reshuffled every epoch.
            held_out: Windows that select the best state.
            eval_every: Steps between two evaluations on them.
            after_step: Called with every point of the curve.

        Raises:
            IncompatibleData: The loss or a gradient is not finite; the message names the step.
        """
        start_time = time.perf_counter()
        if self.progress.curve:  # resumed: count the seconds before the interruption, too
            start_time -= self.progress.curve[-1].seconds

        def record(loss: float | None, measured: Any) -> None:
            tokens = self.done * self.batch * train.shape[1]
            seconds = time.perf_counter() - start_time
            point = self.point(loss, measured, tokens=tokens, seconds=seconds)
            self.progress.curve.append(point)
            after_step(point)

        with plain_inference(self.model):
            # Checked before the first step: a model that cannot be replayed fails now, not hours
            # later.
            self._backward.prepare(train[:1, :_CHECK_TOKENS].to(self._device))
            if not self.progress.curve:
                record(None, self._measure(held_out))
            for step in range(self.done, self.steps):
                loss = self._step(step, train)
                self.done = step + 1
                due = self.done == self.steps or self.done % eval_every == 0
                record(loss, self._measure(held_out) if due else None)
        return self.progress

    def _mean_loss(
        self, loss: float, total: float, step: int, *, state: str, fix: str, of: str = ""
    ) -> float:
        """Return the mean loss of a step over all processes.

        Args:
            loss: Mean over this process's windows.
            total: Sum over the gradients that this process owns.
            step: Steps taken before.
            state: What is trained, for the message.
            fix: What to do, for the message.
            of: The training, for the message.

        Raises:
            IncompatibleData: The loss or a gradient is not finite.
        """
        # Every process gets the same sums, so all of them raise or none does: one alone would leave
        # the others waiting in a collective call.
        loss, total = self.shards.sum(loss / self.shards.world, total)
        if not math.isfinite(loss + total):
            culprit = "gradient" if math.isfinite(loss) else "loss"
            raise IncompatibleData(
                f"the {culprit}{of} is not finite at step {step + 1}",
                where=f"the {state} are those of step {step}: this step was not applied",
                fix=fix,
            )
        return loss

    @abstractmethod
    def _step(self, step: int, train: Tensor) -> float:
        """Take one step and return its mean loss over all processes."""

    @abstractmethod
    def _measure(self, held_out: Tensor) -> Any:
        """Return what is measured on the held-out windows; keep the state if it is the best."""

    @abstractmethod
    def point(self, loss: float | None, measured: Any, *, tokens: int, seconds: float) -> P:
        """Return the metrics after `done` steps.

        Args:
            loss: Of the last step.
            measured: What `_measure` returned; None where nothing was measured.
            tokens: Trained on so far, over all processes.
            seconds: Since the start, over resumes.
        """

    @abstractmethod
    def saved_tensors(self) -> Iterable[tuple[str, Tensor, int]]:
        """Yield every tensor of the state, for a checkpoint: its name, itself, its total rows.

        Each is [k, rows, width], of the rows that this process owns; total 0 means that all
        processes have the same.
        """

    @abstractmethod
    def read_point(self, values: dict[str, Any]) -> P:
        """Return a point of the curve from its fields."""

    # ------------------------------------------------------------ windows

    def _windows(self, step: int, train: Tensor) -> Tensor:
        """Return this process's windows of a step; an epoch uses every window once."""
        first, count = step * self.batch, len(train)
        places = torch.arange(first, first + self.batch)
        epochs = places // count  # a step may cross into the next epoch
        rows = [
            _order(count, self.seed, epoch)[places[epochs == epoch] % count]
            for epoch in sorted(set(epochs.tolist()))
        ]
        # Strided: the union over the processes is the same batch for any number of them.
        indices = torch.cat(rows)[self.shards.rank :: self.shards.world]  # [batch / world]
        return train[indices].to(self._device)

    def _micro_batches(self, windows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(windows, max(1, self.micro_tokens // windows.shape[1]))

    def _batch(self, windows: Tensor) -> int:
        return batch_windows(len(windows), windows.shape[1], windows.device.type)

    def _held_out_share(self, held_out: Tensor) -> tuple[Tensor, bool]:
        """Return the held-out windows of this process, and whether they count."""
        share = list(range(len(held_out)))[self.shards.rank :: self.shards.world]
        # a process without windows runs one all the same: the gathers are collective
        return held_out[share or [0]].to(self._device), bool(share)


def batch_windows(windows: int, seqlen: int, device: str) -> int:
    """Return the windows of a batch: all, or on a CPU as many as stay in its cache."""
    if device != "cpu":
        return windows
    return max(1, min(windows, _CPU_BATCH_TOKENS // seqlen))


@functools.lru_cache(maxsize=2)  # a step asks for every window, and may cross into a new epoch
def _order(count: int, seed: int, epoch: int) -> Tensor:
    # A factor above any number of epochs: two seeds never share the order of an epoch.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
