"""The training loop of a distillation.

The model itself holds the dense weights, the teacher's; the student's are written into a workspace,
a block at a time. Only blocks differ: teacher and student share embeddings and head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.linears import Linear
from prunebench.models.out_of_memory import is_out_of_memory, report_halved
from prunebench.models.weights import ResidentWeights
from prunebench.recovery.distill.loss import DistillLoss
from prunebench.recovery.distill.options import DistillConfig
from prunebench.recovery.distill.weights import TrainedSums, TrainedWeight
from prunebench.recovery.protocol import DistillPoint, HeldOut
from prunebench.training.loop import TrainingLoop
from prunebench.training.shards import Shards

_BETAS = (0.9, 0.95)
_EPSILON = 1e-10  # gradients of a mean over tokens are small


class Distiller(TrainingLoop[DistillPoint]):
    """Trains the kept weights of a model on the outputs of the dense one.

    Args:
        model: With the dense weights, all parameters frozen.
        weights: What is trained of every matrix.
        config: The options.
        shards: This process among others.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[Linear, TrainedWeight],
        config: DistillConfig,
        shards: Shards,
    ) -> None:
        self.weights = dict(weights)
        self._config = config
        self._loss = DistillLoss(config.eta, config.temperature)
        self._sums = TrainedSums(shards, self.weights)
        super().__init__(
            model, list(weights), self._sums, self._fill, steps=config.steps, batch=config.batch,
            seed=config.seed, micro_tokens=config.micro_tokens, shards=shards, loss=self._loss,
        )  # fmt: skip
        self._dense = ResidentWeights(self._backward.blocks)
        self._held_out_teacher: list[Tensor] | None = None
        groups = [
            {"params": [parameter], "base": weight.rates[name]}
            for weight in self.weights.values()
            for name, parameter in weight.parameters.items()
        ]
        # fused: one pass over master, gradient and moments, and no temporaries of their size
        self._optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)
        for parameter in self._parameters():
            # as Adam makes them at its first step, so that a saved state can be read before it
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.progress.best = self._snapshot()

    def best_weights(self) -> Iterator[tuple[Linear, Tensor]]:
        """Yield the best weight of every matrix in the dtype of the model, [rows, in]."""
        for linear, weight in self.weights.items():
            prefix = f"{linear.name}/"
            best = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.progress.best.items()
                if name.startswith(prefix)
            }
            yield linear, weight.restored(best)

    def _parameters(self) -> Iterator[Tensor]:
        for weight in self.weights.values():
            yield from weight.parameters.values()

    def _snapshot(self) -> dict[str, Tensor]:
        return {
            f"{linear.name}/{name}": tensor
            for linear, weight in self.weights.items()
            for name, tensor in weight.snapshot().items()
        }

    def _fill(self, linear: Linear, out: Tensor) -> None:
        """Write the student's weight into `out`, [out, in], all rows."""
        rows = self.shards.rows(linear.out_features)
        shard = out if self.shards.world == 1 else out[rows].clone()
        self.weights[linear].write(shard)
        self.shards.gather(shard, out)

    # ------------------------------------------------------------ one step

    def _step(self, step: int, train: Tensor) -> float:
        """Take one step and return its mean loss over all processes."""
        loss = self._add_gradients(self._windows(step, train))
        loss = self._mean_loss(
            loss, float(self._sums.total), step, state="weights", of=" of the distillation",
            fix="use --dtype float32 or bfloat16, or a lower --set recover.distill.lr",
        )  # fmt: skip
        rate = self._config.lr * self._config.factor(step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * rate
        for parameter in self._parameters():
            self._optimizer.state[parameter]["step"].fill_(step)
        self._optimizer.step()
        self._sums.clear()
        return loss

    def _add_gradients(self, windows: Tensor) -> float:
        """Add the gradient of this process's windows; return their mean loss."""
        while True:
            try:
                loss = 0.0
                for micro in self._micro_batches(windows):
                    # The loss is a mean over all processes' windows; every micro-batch adds its
                    # share of it.
                    share = len(micro) / len(windows)
                    batch, teacher = self._batch(micro), self._teacher(micro)
                    loss += share * self._backward.add(
                        micro, batch=batch, scale=share / self.shards.world, teacher=teacher
                    )
                return loss
            except (RuntimeError, MemoryError) as error:
                alone = self.shards.world == 1  # the others would wait in a collective call
                if not is_out_of_memory(error) or not alone or len(micro) == 1:
                    raise
            # outside the except clause, whose traceback keeps the failed tensors alive
            size = (len(micro) + 1) // 2
            self.micro_tokens = size * windows.shape[1]
            self._sums.clear()
            report_halved("distillation", size)

    def _teacher(self, windows: Tensor) -> list[Tensor] | None:
        """Return the dense model's last hidden states, by batch; None if the loss has no teacher.

        The logits follow from them a slice at a time, so those of a batch never exist.
        """
        if not self._config.eta:
            return None
        return self._backward.last_hidden(windows, self._dense, batch=self._batch(windows))

    # ------------------------------------------------------------ measurements

    def _measure(self, held_out: Tensor) -> HeldOut:
        """Return the held-out loss of the student; keep its weights if it is the lowest."""
        windows, counts = self._held_out_share(held_out)
        if self._held_out_teacher is None:
            self._held_out_teacher = self._teacher(windows)
        self._loss.reset()
        # a rounding sum that all measurements make alike
        total = math.fsum(
            self._backward.losses(
                windows, batch=self._batch(windows), teacher=self._held_out_teacher
            )
        )
        values = (total, self._loss.cross_entropy, self._loss.divergence)
        targets = held_out[:, 1:].numel()
        loss, entropy, divergence = (
            value / targets for value in self.shards.sum(*(values if counts else (0.0,) * 3))
        )
        # exp(710) overflows
        finite = math.isfinite(loss) and entropy < 700
        earlier = [point.held_out for point in self.progress.curve if point.held_out]
        # strictly better: of equal losses the earlier weights stay
        if finite and earlier and all(x.loss is None or loss < x.loss for x in earlier):
            self.progress.best = self._snapshot()
            self.progress.best_step = self.done
        if not finite:
            return HeldOut(None, None, None)
        return HeldOut(loss, math.exp(entropy), divergence if self._config.eta else None)

    def point(
        self, loss: float | None, measured: HeldOut | None, *, tokens: int, seconds: float
    ) -> DistillPoint:
        """Return the metrics after `done` steps."""
        return DistillPoint(self.done, tokens, loss, measured, seconds)

    # ------------------------------------------------------------ saved states

    def saved_tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield parameters, moments and the best weights."""
        for linear, weight in self.weights.items():
            for name, parameter in weight.parameters.items():
                state = self._optimizer.state[parameter]
                # B of a low-rank update is the same in all processes
                total = 0 if name == "right" else linear.out_features
                for kind, tensor in (
                    ("value", parameter),
                    ("first", state["exp_avg"]),
                    ("second", state["exp_avg_sq"]),
                ):
                    yield f"{linear.name}/{name}.{kind}", tensor[None], total
        rows = {linear.name: linear.out_features for linear in self.weights}
        for key, tensor in self.progress.best.items():
            name, _, part = key.rpartition("/")
            yield f"{key}.best", tensor[None], 0 if part == "right" else rows[name]

    def read_point(self, values: dict[str, Any]) -> DistillPoint:
        """Return a point of the curve from its fields."""
        held_out = values.pop("held_out")
        return DistillPoint(**values, held_out=HeldOut(**held_out) if held_out else None)
