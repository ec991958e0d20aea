"""The training loop: soft masks in the forward pass, gradients of the logits in the backward pass.

A step opens every block twice (forward, backward) and then passes over the logits. The result is
the hard mask with the best perplexity on held-out text. The first candidate is the prior itself,
without the noise of the initial logits, so the result is never worse than the prior there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.linears import Linear
from prunebench.pruners.maskllm import dispatch
from prunebench.pruners.maskllm.candidates import mask_of
from prunebench.pruners.maskllm.gradients import FactoredSums
from prunebench.pruners.maskllm.optimize import Directions, Optimizer, sum_squares
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.pruners.training import CurvePoint
from prunebench.training.loop import TrainingLoop
from prunebench.training.shards import Shards


class Learner(TrainingLoop[CurvePoint]):
    """Learns the masks of a model; its weights are frozen.

    Args:
        model: In evaluation mode, all parameters frozen.
        layers: The initial logits of every linear.
        prior: The choices around which the logits were initialized, of the owned rows.
        optimizer: Updates the logits.
        schedule: Temperature, scale, reward and learning rate by step.
        seed: Of noise and of the order of the windows.
        noise_samples: Noise draws per step; each gets an equal share of the step's windows.
        micro_tokens: Tokens of a micro-batch: their activations are in memory at the same time.
        shards: This process among others.
        gradient_dtype: Storage dtype of dL/dW~ until the end of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[Linear, LayerLogits],
        prior: Mapping[str, Tensor],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        seed: int,
        noise_samples: int = 1,
        micro_tokens: int = 4096,
        shards: Shards | None = None,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = dict(layers)
        self.prior = dict(prior)
        self.optimizer = optimizer
        self.schedule = schedule
        self.noise_samples = noise_samples
        self._groups = sum(linear.size // self._group(linear) for linear in self.layers)
        self._sums = FactoredSums(shards or Shards(), gradient_dtype)
        self._direction_sums: dict[Linear, Tensor] = {}  # over the draws of a step
        self._relaxation: Relaxation | None = None  # of the current draw
        super().__init__(
            model, list(layers), self._sums, self._soft, steps=schedule.steps,
            batch=schedule.batch, seed=seed, micro_tokens=micro_tokens, shards=shards or Shards(),
        )  # fmt: skip
        self.progress.best = dict(prior)

    # ------------------------------------------------------------ one step

    def _step(self, step: int, train: Tensor) -> float:
        """Take one step and return its mean loss over all processes."""
        windows = self._windows(step, train)
        parts = torch.chunk(windows, self.noise_samples)
        loss = 0.0
        for sample, part in enumerate(parts):
            self._relaxation = self.schedule.relaxation(
                step, seed=self.seed, draw=step * self.noise_samples + sample
            )
            for batch in self._micro_batches(part):
                # The loss is a mean over all processes' windows; every micro-batch adds its share
                # of it.
                share = len(batch) / len(windows)
                scale = share / self.shards.world
                loss += share * self._backward.add(batch, batch=self._batch(batch), scale=scale)
            if self.noise_samples > 1:
                self._add_directions()
        loss = self._mean_loss(
            loss, float(self._sums.total), step, state="masks",
            fix="use --dtype float32 or bfloat16, a lower --set rate, or check the weights",
        )  # fmt: skip
        self._update(step)
        self._sums.clear()
        # Zeroed, not freed: as large as the logits, and needed again in the next step.
        for total_direction in self._direction_sums.values():
            total_direction.zero_()
        return loss

    def _update(self, step: int) -> None:
        """Apply the step's gradients to all logits.

        The optimizer divides every gradient by `unit`. AdamW normalizes each logit by its second
        moment, so `unit` only clips: norm / clip over all layers if above 1, the same for each
        layer. `momentum` and `mirror` have no second moment; for them `unit` is the layer's root
        mean square gradient, which makes the learning rate independent of the scale of the layer.
        """
        relaxation = self._relaxation
        assert relaxation is not None
        optimizer, rate = self.optimizer, self.schedule.rate(step)
        excess = 1.0
        if optimizer.kind == "adamw" and optimizer.clip:
            # AdamW's clip needs the norm over all layers before the first is updated: a pass of its
            # own.
            squares = math.fsum(
                sum_squares(self._directions(linear, relaxation)) for linear in self.layers
            )
            excess = max(1.0, math.sqrt(self.shards.sum(squares)[0]) / optimizer.clip)
        for linear, layer in self.layers.items():
            unit = excess
            if optimizer.kind != "adamw":
                squares = self.shards.sum(sum_squares(self._directions(linear, relaxation)))[0]
                count = linear.size // self._group(linear) * len(layer.table)
                unit = max(math.sqrt(squares / count), 1e-30)
            optimizer.step(
                layer,
                self._directions(linear, relaxation),
                relaxation,
                count=step + 1,
                rate=rate,
                unit=unit,
            )

    def _directions(self, linear: Linear, relaxation: Relaxation) -> Directions:
        """Return the direction of a layer's logits, from dL/dW~ or summed over the draws."""
        layer, total = self.layers[linear], self._direction_sums.get(linear)
        # One draw: dL/dz is made piece by piece, and never stored for a whole layer.
        if total is None:
            weight, slope = self._own_rows(linear), self._sums.owned[linear]
            return self.optimizer.directions(layer, weight, slope, relaxation)
        return ((part, total[:, part].clone()) for part in layer.chunks())  # overwritten later

    def _add_directions(self) -> None:
        """Add this draw's directions to those of the step; as much memory as the logits.

        dL/dW~ belongs to one draw's mask, so it cannot be summed over draws; dL/dz can. A draw sees
        1/n of the step's windows, so its gradients are already scaled by 1/n. The reward, which
        does not depend on windows, is divided by n here. The factored curvature is a product of two
        sums over tokens, so it is scaled by 1/n^2 and multiplied by n.
        """
        assert self._relaxation is not None
        relaxation = replace(
            self._relaxation,
            reward=self._relaxation.reward / self.noise_samples,
            curvature=self._relaxation.curvature * self.noise_samples,
        )
        for linear, layer in self.layers.items():
            if linear not in self._direction_sums:
                self._direction_sums[linear] = torch.zeros_like(layer.logits, dtype=torch.float32)
            weight, slope = self._own_rows(linear), self._sums.owned[linear]
            for part, direction in self.optimizer.directions(layer, weight, slope, relaxation):
                self._direction_sums[linear][:, part] += direction
        self._sums.forget()

    # ------------------------------------------------------------ masks and measurements

    def _group(self, linear: Linear) -> int:
        return self.layers[linear].table.shape[1]

    def _own_rows(self, linear: Linear) -> Tensor:
        """Return the dense weight of the rows that this process owns, [rows, in]."""
        return linear.weight[self.shards.rows(linear.out_features)]

    def _soft(self, linear: Linear, out: Tensor) -> None:
        """Write W~ of the current draw into `out`, [out, in], all rows."""
        assert self._relaxation is not None
        layer, weight = self.layers[linear], self._own_rows(linear)
        shard = out if self.shards.world == 1 else out.new_empty(weight.shape)
        dispatch.soften(layer, weight, self._relaxation, shard)
        self.shards.gather(shard, out)

    def _choices(self, linear: Linear) -> Tensor:
        """Return the hard choices of the owned rows; before the first step, the prior's."""
        return self.layers[linear].choices() if self.done else self.prior[linear.name]

    def _hard(self, linear: Linear, out: Tensor) -> None:
        """Write the weight under the hard mask into `out`, [out, in], all rows."""
        weight, layer = self._own_rows(linear), self.layers[linear]
        keep = mask_of(self._choices(linear), layer.table, weight.shape)
        self.shards.gather(torch.where(keep, weight, 0), out)

    def _measure(self, held_out: Tensor) -> float:
        """Return the held-out perplexity of the hard mask; store the mask if it is the best."""
        windows, counts = self._held_out_share(held_out)
        # The same store and replay as in training, with hard masks in place of soft ones.
        self._store.fill = self._hard
        try:
            total = math.fsum(self._backward.losses(windows, batch=self._batch(windows)))
        finally:
            self._store.fill = self._soft
        loss = self.shards.sum(total if counts else 0.0)[0] / held_out[:, 1:].numel()
        ppl = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf  # exp(710) overflows
        scores = [point.held_out_ppl for point in self.progress.curve]
        # Strictly better: of equal masks the earlier one stays. The first, the prior's, always
        # counts.
        if all(ppl < score for score in scores if score is not None):
            self.progress.best = {linear.name: self._choices(linear) for linear in self.layers}
            self.progress.best_step = self.done
        return ppl

    def point(
        self, loss: float | None, measured: Any, *, tokens: int, seconds: float
    ) -> CurvePoint:
        """Return the metrics after `done` steps; `measured` is the held-out perplexity."""
        # The point after `step` steps reports the schedule's values at that step, whose index is
        # step - 1.
        relaxation = self.schedule.relaxation(max(self.done - 1, 0), seed=self.seed, draw=0)
        certain = math.fsum(dispatch.certainty(layer, relaxation) for layer in self.layers.values())
        changed = math.fsum(
            float((layer.choices() != self.prior[linear.name]).sum())
            for linear, layer in self.layers.items()
        )
        certain, changed = self.shards.sum(certain, changed)
        return CurvePoint(
            self.done,
            tokens=tokens,
            loss=loss,
            temperature=relaxation.temperature,
            scale=relaxation.scale,
            certainty=certain / self._groups,
            changed=changed / self._groups,
            held_out_ppl=measured,
            seconds=seconds,
        )

    # ------------------------------------------------------------ saved states

    def saved_tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield logits, moments and the best choices of every layer, [choices, rows, width]."""
        for linear, layer in self.layers.items():
            total = linear.out_features
            named = {"logits": layer.logits, "best": self.progress.best[linear.name][None]}
            named |= {name: packed.values for name, packed in layer.state.items()}
            for name, tensor in named.items():
                # [choices, groups] -> [choices, rows, width]
                rows = tensor.view(len(tensor), layer.rows, layer.width)
                yield f"{linear.name}.{name}", rows, total
            for name, packed in layer.state.items():
                if packed.scales.shape[1]:
                    yield f"{linear.name}.{name}.scales", packed.scales[..., None], total

    def read_point(self, values: dict[str, Any]) -> CurvePoint:
        """Return a point of the curve from its fields."""
        return CurvePoint(**values)
