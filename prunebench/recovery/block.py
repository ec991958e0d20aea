"""Block reconstruction with the mask fixed: the kept weights of a block are trained on its output.

Papers: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs",
https://arxiv.org/abs/2402.12419; Shin et al., "Rethinking Pruning Large Language Models",
https://arxiv.org/abs/2406.15524 (section 2: block-wise reconstruction, with global propagation).

For block l with the keep mask M, read from the zeros that the method left, Adam minimizes over the
kept entries of all linears of the block

    L(W) = mean || f_l(x; M * W) - target ||^2

where x is the hidden state of the pruned model and the target is that of the dense model after the
block (`target=dense`), or the dense block's output of the same x (`target=local`).

What differs from both: only linears are trained unless `norms`; the rate of a matrix is relative to
the root mean square of its kept weights, so one default serves models whose weights differ tenfold;
masters and moments are float32 in every dtype; a share of the windows is held out of training, and
the weights with the lowest error on them, measured in the model's own dtype, are what stays, at
worst those of the method, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import Linear
from prunebench.models.out_of_memory import is_out_of_memory
from prunebench.models.pruned_block import (
    Loss,
    PrunedBlock,
    RecoveredBlock,
    Target,
    massive_share,
    output_loss,
)
from prunebench.recovery.masked_weights import MaskedWeights
from prunebench.recovery.protocol import BlockRecoverer, RecoveryCost
from prunebench.recovery.refine import Refinement
from prunebench.registry import LATER

_BETAS = (0.9, 0.95)
_EPSILON = 1e-10  # the loss is divided by its start, so gradients are small but of known size


@dataclass(frozen=True)
class Block(BlockRecoverer):
    """Trains the kept weights of each block to bring its output back to the dense model's.

    Attributes:
        lr: First learning rate, relative to the root mean square of a matrix's kept weights.
        epochs: Times that the training windows are seen.
        batch: Windows in a step.
        schedule: How the rate falls to 0.
        target: The dense model's hidden state after the block, or the dense block's output of the
            pruned model's hidden state.
        loss: `cauchy`: the logarithm of 1 + each token's squared error relative to its target, so
            that no token dominates; `channels`: the same, but every channel counts alike;
            `relative`: without the logarithm; `mse`: the mean squared error, as in the papers.
        held_out: Share of the calibration windows that are not trained on and choose what stays.
        checks: How often in an epoch the held-out error is measured.
        norms: Whether the weights and biases of normalizations are trained too.
        halves: Whether the linears of the block's first part (attention) are trained before the
            others: less memory, twice the steps.
        refine: Epochs, of the first ones, in which pruned weights are trained too and after which
            the mask is chosen anew (Wanda++); 0 keeps the method's mask.
    """

    lr: float = 0.008
    epochs: int = 3
    batch: int = 2
    schedule: Literal["linear", "cosine"] = "linear"
    target: Target = "dense"
    loss: Loss = "cauchy"
    held_out: float = 0.125
    checks: int = 2
    norms: bool = False
    halves: bool = False
    refine: int = field(default=0, metadata=LATER)

    @property
    def moves_mask(self) -> bool:
        """Whether other weights than the method's may be 0 afterwards."""
        return self.refine > 0

    @property
    def trains_norms(self) -> bool:
        """Whether parameters of normalizations change too."""
        return self.norms

    @property
    def weighs_channels_alike(self) -> bool:
        """Whether a few channels cannot be all that the loss sees."""
        return self.loss == "channels"

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr:g} is not above 0")
        for name in ("epochs", "batch", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not 1 or more")
        if not 0 < self.held_out <= 0.5:
            raise ValueError(f"held_out={self.held_out:g} is not above 0 and at most 0.5")
        if not 0 <= self.refine < self.epochs:
            raise ValueError(
                f"refine={self.refine} is not 0 or more and below epochs={self.epochs}"
            )

    def check(self, *, samples: int) -> None:
        """Refuse calibration sets of which no window can be held out."""
        if int(samples * self.held_out) < 1:
            raise UsageError(
                f"{samples} calibration windows are too few for --recover block",
                where=f"a share of {self.held_out:g} is held out, and that is less than a window",
                fix=f"use --calibration-samples {math.ceil(1 / self.held_out)} or more, or --set "
                "recover.block.held_out=0.5",
            )

    def cost(self, *, samples: int) -> RecoveryCost:
        """Return forward and backward passes of training, and the passes of the checks."""
        held = int(samples * self.held_out) / samples
        parts = 2 if self.halves else 1
        epochs = self.epochs + (1 if self.refine else 0)  # the scores take a pass and its gradient
        training = 3 * epochs * (1 - held) * parts
        checking = held * (1 + self.epochs * self.checks * parts)
        # the masters of the other half are needed too, its moments are not
        copies = (3 if parts == 1 else 2) + (1 if self.refine else 0)
        return RecoveryCost(training + checking, copies=copies, batch=self.batch)

    def recover_block(self, pruned: PrunedBlock) -> RecoveredBlock:
        """Train the kept weights; the weights with the lowest held-out error stay."""
        train, held = split(pruned.samples, self.held_out)
        start = pruned.error(held, self.batch, self.loss)
        if not math.isfinite(start):
            return RecoveredBlock(pruned.index, event="the block's output is not finite")
        record = RecoveredBlock(
            pruned.index, start, start, windows=len(train), held_out_windows=len(held),
            massive=round(massive_share(pruned.targets(held[:1])), 4),
        )  # fmt: skip
        if start == 0:  # nothing was pruned here or before
            return record
        for linears, norms in self._parts(pruned):
            record = _Training(self, pruned, linears, norms, train, held, record).run()
            if record.event:
                break
        return record

    def _parts(self, pruned: PrunedBlock) -> Iterator[tuple[list[Linear], bool]]:
        """Yield the linears that are trained together, and whether norms are, too."""
        linears = list(pruned.linears)
        if not self.halves:
            yield linears, self.norms
            return
        part_of = {
            id(module): child.split(".")[0] for child, module in pruned.module.named_modules()
        }
        first = part_of[id(linears[0].module)]
        yield [x for x in linears if part_of[id(x.module)] == first], False
        yield [x for x in linears if part_of[id(x.module)] != first], self.norms


class _Training:
    """The training of one block, or of one part of it."""

    def __init__(
        self,
        options: Block,
        pruned: PrunedBlock,
        linears: Sequence[Linear],
        norms: bool,
        train: list[int],
        held: list[int],
        record: RecoveredBlock,
    ) -> None:
        self._options = options
        self._pruned = pruned
        self._held = held
        self._record = record
        self._batches = [
            tuple(train[start : start + options.batch])
            for start in range(0, len(train), options.batch)
        ]
        self._weights = MaskedWeights(pruned, linears, norms=norms)
        self._linears = linears
        self._train = train
        self._scale = record.held_out_before or 1.0
        self._losses: list[float] = []  # of each step

    def run(self) -> RecoveredBlock:
        """Train for all epochs; return the record with what came of it."""
        options, weights = self._options, self._weights
        self._note(untrained=self._record.untrained + weights.untrained)
        if not weights.trained:
            return self._record
        groups = [
            {"params": [value], "base": options.lr * weights.rms(name)}
            for name, value in weights.trained.items()
        ]
        # fused: one pass over master, gradient and moments, and no temporaries of their size
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)
        count = len(self._batches)
        total = options.epochs * count
        refinement = None
        if options.refine:
            refinement = Refinement(self._pruned, weights, self._linears, self._train)
        generator = torch.Generator().manual_seed(self._pruned.seed)
        checks = {math.ceil(count * (n + 1) / options.checks) for n in range(options.checks)}
        for epoch in range(options.epochs):
            is_fixed = epoch >= options.refine
            order = torch.randperm(count, generator=generator).tolist()
            for number, batch in enumerate(order, 1):
                step = epoch * count + number
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * _falling(options.schedule, (step - 1) / total)
                loss = self._step(optimizer, self._batches[batch], masked=is_fixed)
                self._note(
                    steps=self._record.steps + 1,
                    tokens=self._record.tokens + len(self._batches[batch]) * self._pruned.seqlen,
                )
                if not math.isfinite(loss):
                    return self._failed(f"the loss of step {step} is not finite")
                if refinement is not None and not is_fixed and number == count:
                    refinement.choose(optimizer)
                # between two masks all weights move: nothing to measure
                if number in (checks if is_fixed else {count}) and not self._check():
                    return self._failed(f"the weights after step {step} are not finite")
        return self._note(
            train_before=_mean(self._losses[:count]), train_after=_mean(self._losses[-count:])
        )

    def _step(
        self, optimizer: torch.optim.Optimizer, windows: Sequence[int], *, masked: bool
    ) -> float:
        """Make one step, of the kept weights if `masked`; return its loss."""
        try:
            loss = self._pruned.batch.sum(
                lambda part: self._backward(part, len(windows)),
                windows,
                restart=lambda: optimizer.zero_grad(set_to_none=True),
            )
        except RuntimeError as error:
            if is_out_of_memory(error) or self._losses:
                raise
            raise IncompatibleData(
                f"{type(self._pruned.module).__name__} cannot be trained",
                where=f"{type(error).__name__}: {error}".split("\n")[0],
                fix="leave --recover out, or report this architecture",
            ) from error
        self._losses.append(loss)
        if math.isfinite(loss):
            if masked:
                self._weights.mask_gradients()
            else:
                self._weights.leave_untrained()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, windows: Sequence[int], of: int) -> float:
        """Add the gradient of some windows of a step; return their share of its loss."""
        pruned = self._pruned
        call = pruned.call(windows).cast(torch.float32)
        inputs = pruned.inputs(windows).to(torch.float32)  # [windows, seqlen, hidden]
        with torch.enable_grad():
            output = call.run(self._weights, inputs)
            error = output_loss(output, pruned.targets(windows), self._options.loss)
            loss = error * (len(windows) / of / self._scale)
        torch.autograd.backward([loss])
        return float(loss.detach()) * self._scale

    def _check(self) -> bool:
        """Measure the held-out error; the weights stay in the block if it is the lowest so far."""
        if not self._weights.are_finite:
            return False
        with self._weights.written() as trial:
            error = self._pruned.error(self._held, self._options.batch, self._options.loss)
            best = self._record.held_out_after
            trial.stays = best is not None and error < best
        if trial.stays:
            self._note(held_out_after=error, best_step=self._record.steps)
        return True

    def _failed(self, event: str) -> RecoveredBlock:
        """End the training: what stays is the best that was measured, at worst the start."""
        return self._note(event=event)

    def _note(self, **changes: object) -> RecoveredBlock:
        self._record = dataclasses.replace(self._record, **changes)  # type: ignore[arg-type]
        return self._record


def split(samples: int, held_out: float) -> tuple[list[int], list[int]]:
    """Return the windows that are trained on and those held out, spread evenly."""
    count = int(samples * held_out)
    held = {int((number + 0.5) * samples / count) for number in range(count)}
    return [window for window in range(samples) if window not in held], sorted(held)


def _falling(schedule: str, done: float) -> float:
    """Return the factor of the rate when a share `done` of the steps is made."""
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
