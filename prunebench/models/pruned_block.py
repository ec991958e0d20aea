"""A block that has just been pruned, for recovery: its inputs, its targets, and what came of it.

Two hidden-state streams run through the model during a walk with recovery: that of the pruned
model, which every block reads, and that of the dense model, whose output is the target of the
block. A recoverer trains the kept weights of one block at a time (`BlockWalker`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunebench.models.linears import Linear
from prunebench.models.out_of_memory import is_out_of_memory, report_halved
from prunebench.models.replay import BlockCall
from prunebench.models.weight_grid import WeightGrid
from prunebench.sparsity import Sparsity

Target = Literal["dense", "local"]
"""What a block's output should be: the dense stream, or the dense block's output of its inputs."""

Loss = Literal["cauchy", "channels", "relative", "mse"]
"""How a block's output is compared with its target, see `output_loss`."""
_LEAST_SHARE = 1e-4  # of what a channel has in the mean: below it rounding would be learned


@dataclass(frozen=True)
class RecoveredBlock:
    """What the recovery of one block did (JSON-serializable).

    Attributes:
        block: Index of the block.
        held_out_before: Loss of the block's output on held-out windows as the method left it; None
            for a recoverer that measures none.
        held_out_after: The same of the weights that stay.
        train_before: Mean training loss of the first epoch; None without a whole epoch.
        train_after: Mean training loss of the last epoch.
        windows: Windows that were trained on.
        held_out_windows: Windows that chose what stays.
        tokens: Tokens that were trained on, repeated ones counted again.
        steps: Steps that were made.
        best_step: The step whose weights stay; 0 is the start.
        seconds: With the dense stream.
        event: What went wrong, e.g. a loss that was not finite; empty if nothing did.
        untrained: Matrices that were not trained: experts with too few tokens.
        zeros: Weights that were kept and have become 0, by matrix.
        massive: Share of a target's squares that the largest hundredth of its channels holds, the
            mean over the tokens of a window; None if it was not measured.
    """

    block: int
    held_out_before: float | None = None
    held_out_after: float | None = None
    train_before: float | None = None
    train_after: float | None = None
    windows: int = 0
    held_out_windows: int = 0
    tokens: int = 0
    steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    event: str = ""
    untrained: tuple[str, ...] = ()
    zeros: Mapping[str, int] = field(default_factory=dict)
    massive: float | None = None


@dataclass(frozen=True)
class PrunedBlock:
    """One pruned block with the calibration windows before and the targets after it.

    Attributes:
        index: Its index.
        module: The block in the dtype of the model: write the new weights here.
        linears: Its prunable matrices.
        samples: Number of calibration windows.
        seqlen: Tokens of one.
        tokens: Tokens that reached each matrix, by name, where the text decides that (experts);
            else None.
        seed: Of the run and this block.
        sparsity: What each matrix was pruned to, by name.
        grid: The form of its matrices if they are quantized.
        inputs: Returns the inputs of some windows, (windows, seqlen, hidden), on the device.
        targets: Returns the targets of some windows, (windows, seqlen, hidden), on the device.
        call: Returns the arguments of the block for some windows.
        batch: How many windows run at a time.
    """

    index: int
    module: nn.Module
    linears: Sequence[Linear]
    samples: int
    seqlen: int
    tokens: Mapping[str, int] | None
    seed: int
    inputs: Callable[[Sequence[int]], Tensor]
    targets: Callable[[Sequence[int]], Tensor]
    call: Callable[[Sequence[int]], BlockCall]
    batch: WindowBatch
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    grid: WeightGrid | None = None

    @torch.no_grad()
    def error(self, windows: Sequence[int], batch: int, loss: Loss) -> float:
        """Return the loss of the block as it is, a mean over some windows.

        Args:
            windows: Their indices.
            batch: Windows that run at a time.
            loss: See `output_loss`.
        """

        def summed(part: Sequence[int]) -> float:
            output = self.call(part).run(self.module, self.inputs(part))
            return float(output_loss(output, self.targets(part), loss)) * len(part)

        parts = (windows[start : start + batch] for start in range(0, len(windows), batch))
        return math.fsum(self.batch.sum(summed, part) for part in parts) / len(windows)


def output_loss(output: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """Return the loss of a block's output in float32, a scalar, the mean over its tokens.

    Args:
        output: (windows, seqlen, hidden).
        target: (windows, seqlen, hidden).
        loss: `mse`, the mean squared error; `relative`, each token's squared error divided by the
            square of its target, so that a token with massive activations counts as any other;
            `cauchy`, the logarithm of 1 + that: a token whose output has become massive where its
            target is not has a relative error of thousands, and nothing else would be learned;
            `channels`, the same of errors that are divided by what a channel has in the mean over
            the tokens of a window, so that every channel counts alike: in Gemma a hundredth holds
            92% of the squares, and the norms in front of the next layers undo that.
    """
    target = target.to(torch.float32)
    squares = (output.to(torch.float32) - target).square()
    if loss == "mse":
        return squares.mean()
    if loss == "channels":
        squares = squares / _channel_shares(target).clamp_min(_LEAST_SHARE)
    relative = squares.mean(-1) / target.square().mean(-1)  # [windows, seqlen]
    return (relative if loss == "relative" else relative.log1p()).mean()


def massive_share(target: Tensor) -> float:
    """Return which share of its squares the largest hundredth of the channels holds.

    Args:
        target: (windows, seqlen, hidden). Every token counts alike.
    """
    shares = _channel_shares(target.to(torch.float32)).mean(dim=(0, 1))  # [hidden]
    largest = shares.topk(max(1, len(shares) // 100)).values
    return float(largest.sum() / shares.sum())


def _channel_shares(target: Tensor) -> Tensor:
    """Return the squares of each channel, (windows, 1, hidden), 1 in the mean over channels."""
    squares = target.square()
    # a token whose target is all zeros has no shares, and adds none
    means = squares.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (squares / means).mean(-2, keepdim=True)


@dataclass
class WindowBatch:
    """The largest number of windows that fits into memory; None until one did not fit."""

    size: int | None = None

    def sum(
        self,
        function: Callable[[Sequence[int]], float],
        windows: Sequence[int],
        *,
        restart: Callable[[], None] = lambda: None,
    ) -> float:
        """Return the sum of a function over the windows, in parts that fit.

        Args:
            function: Takes some windows.
            windows: All of them.
            restart: Called before the first part, and again after memory has run out.

        Raises:
            RuntimeError: A single window runs out of memory; the device's own error.
        """
        while True:
            size = self.size or max(1, len(windows))
            restart()
            try:
                starts = range(0, len(windows), size)
                return math.fsum(function(windows[start : start + size]) for start in starts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or min(size, len(windows)) == 1:
                    raise
            # outside the except clause, whose traceback keeps the failed tensors alive
            self.size = (min(size, len(windows)) + 1) // 2
            report_halved("recovery", self.size)


@runtime_checkable
class RecoversBlocks(Protocol):
    """Trains the kept weights of a block during the walk."""

    @property
    def target(self) -> Target:
        """What the output of a block should be."""

    @property
    def moves_mask(self) -> bool:
        """Whether other weights than the method's may be 0 afterwards, as many in each matrix."""

    def recover_block(self, pruned: PrunedBlock) -> RecoveredBlock:
        """Write new weights into the linears of a block; pruned places are +0.0."""


@dataclass(frozen=True)
class Recovery:
    """The recovery that a walk includes.

    Attributes:
        recoverer: What trains each block.
        seed: Of the run.
        sparsity: What each matrix is pruned to, by name.
        grid: The form of matrices that the method quantizes.
        report: Called with each recovered block.
    """

    recoverer: RecoversBlocks
    seed: int = 0
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    grid: WeightGrid | None = None
    report: Callable[[RecoveredBlock], Any] = lambda block: None
