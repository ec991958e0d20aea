"""The training loop: soft masks forward, gradients of the logits backward, the best mask kept.

A step opens every block twice (forward, backward) and then passes over the logits. Which hard mask
is kept is decided on text that is not trained on; the prior itself, which the noise of the first
logits does not touch, is the first candidate, so what is kept is never worse there.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int, Integer
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.backward import Backward
from prunebench.models.linears import Linear, find_blocks
from prunebench.models.replay import plain_inference
from prunebench.pruners.maskllm import dispatch
from prunebench.pruners.maskllm.candidates import mask_of
from prunebench.pruners.maskllm.masked_weights import MaskedWeights
from prunebench.pruners.maskllm.optimise import Directions, Optimizer, sum_squares
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.pruners.maskllm.shards import Shards
from prunebench.pruners.training import CurvePoint

_CHECK_TOKENS = 128
_CPU_BATCH_TOKENS = 1024


@dataclass
class Progress:
    """Where the training stands.

    Attributes:
        best: The choices with the lowest held-out perplexity so far, by linear, of the own rows.
        curve: One point a step.
        best_step: The step that `best` is from; 0 is the prior.
    """

    best: dict[str, Integer[Tensor, " groups"]] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    best_step: int = 0

    @property
    def held_out(self) -> list[CurvePoint]:
        """The points with a held-out score."""
        return [point for point in self.curve if point.held_out_ppl is not None]


class Learner:
    """Learns the masks of a model whose weights stay as they are.

    Args:
        model: In evaluation mode; all its parameters are frozen.
        layers: The logits of every linear, as they begin.
        prior: The choices that the logits began from, of the own rows.
        optimizer: How logits follow their gradients.
        schedule: What changes from step to step.
        seed: Of noise and of the order of the windows.
        noise_samples: Draws of the noise in a step; each gets its share of the step's windows.
        micro_tokens: Tokens whose activations exist at a time.
        shards: This process among others.
        gradient_dtype: How dL/dW~ is kept until the end of a step.
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
        self.model = model
        self.layers = dict(layers)
        self.prior = dict(prior)
        self.optimizer = optimizer
        self.schedule = schedule
        self.seed = seed
        self.noise_samples = noise_samples
        self.micro_tokens = micro_tokens
        self.shards = shards or Shards()
        self.done = 0
        self.progress = Progress(best=dict(prior))
        self._groups = sum(one.size // self._group(one) for one in self.layers)
        self._sums = _Gradients(self.shards, gradient_dtype)
        self._drawn: dict[Linear, Tensor] = {}
        self._how: Relaxation | None = None
        linears = list(self.layers)
        self._store = MaskedWeights(find_blocks(model)[1], linears, self._soft)
        self._backward = Backward(model, linears, self._sums, self._store)
        self._device = next(model.parameters()).device

    def learn(
        self,
        train: Int[Tensor, "windows seqlen"],
        held_out: Int[Tensor, "held seqlen"],
        *,
        eval_every: int,
        after_step: Callable[[CurvePoint], None] = lambda point: None,
    ) -> Progress:
        """Take the steps that are left.

        Args:
            train: Windows to learn from, in an order of their own every epoch.
            held_out: Windows that decide which hard mask is kept.
            eval_every: Steps between two measurements on them.
            after_step: Hears every point as it is made.

        Raises:
            IncompatibleData: The loss is not finite; the step is named.
        """
        begun = time.perf_counter()
        if self.progress.curve:
            begun -= self.progress.curve[-1].seconds
        with plain_inference(self.model):
            self._backward.prepare(train[:1, :_CHECK_TOKENS].to(self._device))
            if not self.progress.curve:
                self._record(0, None, self._measure(held_out), train, begun, after_step)
            for step in range(self.done, self.schedule.steps):
                loss = self._step(step, train)
                self.done = step + 1
                last = self.done == self.schedule.steps
                ppl = self._measure(held_out) if last or self.done % eval_every == 0 else None
                self._record(self.done, loss, ppl, train, begun, after_step)
        return self.progress

    # ------------------------------------------------------------ one step

    def _step(self, step: int, train: Tensor) -> float:
        """Take one step and return its mean loss over all processes."""
        windows = self._windows(step, train)
        parts = torch.chunk(windows, self.noise_samples)
        loss = 0.0
        for sample, part in enumerate(parts):
            self._how = self.schedule.relaxation(
                step, seed=self.seed, draw=step * self.noise_samples + sample
            )
            for few in torch.split(part, max(1, self.micro_tokens // part.shape[1])):
                share = len(few) / len(windows)
                scale = share / self.shards.world
                loss += share * self._backward.add(few, batch=self._batch(few), scale=scale)
            if self.noise_samples > 1:
                self._keep_directions()
        loss, total = self.shards.sum(loss / self.shards.world, float(self._sums.total))
        if not math.isfinite(loss + total):
            culprit = "gradient" if math.isfinite(loss) else "loss"
            raise IncompatibleData(
                f"the {culprit} is not finite at step {step + 1}",
                where=f"the masks are those of step {step}, and nothing of this step was applied",
                fix="use --dtype float32 or bfloat16, a lower --set rate, or check the weights",
            )
        self._update(step)
        self._sums.clear()
        for drawn in self._drawn.values():
            drawn.zero_()
        return loss

    def _update(self, step: int) -> None:
        relaxation = self._how
        assert relaxation is not None
        optimizer, rate = self.optimizer, self.schedule.rate(step)
        norm = 1.0
        if optimizer.kind == "adamw" and optimizer.clip:
            squares = math.fsum(
                sum_squares(self._directions(one, relaxation)) for one in self.layers
            )
            norm = max(1.0, math.sqrt(self.shards.sum(squares)[0]) / optimizer.clip)
        for linear, layer in self.layers.items():
            unit = norm
            if optimizer.kind != "adamw":
                own = sum_squares(self._directions(linear, relaxation))
                squares = self.shards.sum(own)[0]
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
        """Return the direction of a layer's logits, from dL/dW~ or from what the draws left."""
        layer, drawn = self.layers[linear], self._drawn.get(linear)
        if drawn is None:
            weight, slope = self._own_rows(linear), self._sums.own[linear]
            return self.optimizer.directions(layer, weight, slope, relaxation)
        return ((part, drawn[:, part].clone()) for part in layer.chunks())

    def _keep_directions(self) -> None:
        """Add this draw's directions to those of the step: needs memory like the logits.

        A draw sees its share of the step's windows. The reward, which no window scales, is shared
        out alike; the factored curvature shrinks with the square of the share.
        """
        assert self._how is not None
        relaxation = replace(
            self._how,
            reward=self._how.reward / self.noise_samples,
            curvature=self._how.curvature * self.noise_samples,
        )
        for linear, layer in self.layers.items():
            if linear not in self._drawn:
                self._drawn[linear] = torch.zeros_like(layer.logits, dtype=torch.float32)
            weight, slope = self._own_rows(linear), self._sums.own[linear]
            for part, direction in self.optimizer.directions(layer, weight, slope, relaxation):
                self._drawn[linear][:, part] += direction
        self._sums.forget()

    def _windows(self, step: int, train: Tensor) -> Tensor:
        """Return this process's windows of a step: all are used once before any is used again."""
        first, count = step * self.schedule.batch, len(train)
        places = torch.arange(first, first + self.schedule.batch)
        epochs = places // count
        rows = [
            _order(count, self.seed, epoch)[places[epochs == epoch] % count]
            for epoch in sorted(set(epochs.tolist()))
        ]
        mine = torch.cat(rows)[self.shards.rank :: self.shards.world]
        return train[mine].to(self._device)

    # ------------------------------------------------------------ masks and measurements

    def _group(self, linear: Linear) -> int:
        return self.layers[linear].table.shape[1]

    def _own_rows(self, linear: Linear) -> Tensor:
        """Return the dense weight of the rows that this process owns."""
        weight = linear.stored.T if linear.transposed else linear.stored
        return weight[self.shards.rows(linear.out_features)]

    def _soft(self, linear: Linear, out: Tensor) -> None:
        assert self._how is not None
        relaxation, layer, weight = self._how, self.layers[linear], self._own_rows(linear)
        mine = out if self.shards.world == 1 else out.new_empty(weight.shape)
        dispatch.soften(layer, weight, relaxation, mine)
        self.shards.gather(mine, out)

    def _choices(self, linear: Linear) -> Tensor:
        """Return the hard choices of the own rows: before the first step, the prior's."""
        return self.layers[linear].choices() if self.done else self.prior[linear.name]

    def _hard(self, linear: Linear, out: Tensor) -> None:
        weight, layer = self._own_rows(linear), self.layers[linear]
        keep = mask_of(self._choices(linear), layer.table, weight.shape)
        self.shards.gather(torch.where(keep, weight, 0), out)

    def _measure(self, held_out: Tensor) -> float:
        """Return the perplexity of the hard mask; remember the mask if it is the best."""
        share = list(range(len(held_out)))[self.shards.rank :: self.shards.world]
        windows = held_out[share or [0]].to(self._device)
        self._store.fill = self._hard
        try:
            total = math.fsum(self._backward.losses(windows, batch=self._batch(windows)))
        finally:
            self._store.fill = self._soft
        loss = self.shards.sum(total if share else 0.0)[0] / held_out[:, 1:].numel()
        ppl = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
        scores = [point.held_out_ppl for point in self.progress.held_out]
        if all(ppl < score for score in scores if score is not None):
            self.progress.best = {one.name: self._choices(one) for one in self.layers}
            self.progress.best_step = self.done
        return ppl

    def _record(
        self,
        step: int,
        loss: float | None,
        ppl: float | None,
        train: Tensor,
        begun: float,
        after_step: Callable[[CurvePoint], None],
    ) -> None:
        relaxation = self.schedule.relaxation(max(step - 1, 0), seed=self.seed, draw=0)
        certain = math.fsum(dispatch.certainty(layer, relaxation) for layer in self.layers.values())
        changed = math.fsum(
            float((layer.choices() != self.prior[one.name]).sum())
            for one, layer in self.layers.items()
        )
        certain, changed = self.shards.sum(certain, changed)
        point = CurvePoint(
            step,
            tokens=step * self.schedule.batch * train.shape[1],
            loss=loss,
            temperature=relaxation.temperature,
            scale=relaxation.scale,
            certainty=certain / self._groups,
            changed=changed / self._groups,
            held_out_ppl=ppl,
            seconds=time.perf_counter() - begun,
        )
        self.progress.curve.append(point)
        after_step(point)

    def _batch(self, windows: Tensor) -> int:
        return batch_windows(len(windows), windows.shape[1], windows.device.type)


def batch_windows(windows: int, seqlen: int, device: str) -> int:
    """Return how many windows run together: on a CPU what stays in cache."""
    if device != "cpu":
        return windows
    return max(1, min(windows, _CPU_BATCH_TOKENS // seqlen))


class _Gradients:
    """How the loss changes with W~: of one block whole, and of the own rows of all blocks.

    Attributes:
        own: The sums so far, by linear.
        total: Of all that was added in this step: not finite if any of it is not.
    """

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        self.own: dict[Linear, WeightGradient] = {}
        self.total = torch.zeros(())
        self._shards = shards
        self._dtype = dtype
        self._whole: dict[Linear, WeightGradient] = {}

    def fetch(self, linears: Sequence[Linear]) -> None:
        """Make room for a block."""
        for one in linears:
            zeros = functools.partial(torch.zeros, device=one.stored.device)
            self._whole[one] = WeightGradient(
                zeros(one.out_features, one.in_features),
                zeros(one.out_features),
                zeros(one.in_features),
            )

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add outer^T inputs; outer is (tokens, out) and inputs (tokens, in)."""
        whole = self._whole[linear]
        if outer.is_cuda and outer.dtype != torch.float32:  # tensor cores sum in float32 as well
            whole.gradient.add_(torch.mm(outer.T, inputs, out_dtype=torch.float32))
            outer, inputs = outer.to(torch.float32), inputs.to(torch.float32)
        else:
            outer, inputs = outer.to(torch.float32), inputs.to(torch.float32)
            whole.gradient.addmm_(outer.T, inputs)
        whole.rows.add_(outer.square().sum(0))
        whole.columns.add_(inputs.square().sum(0))

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add a gradient that exists already; nothing is known of its curvature."""
        self._whole[linear].gradient.add_(gradient.T if linear.transposed else gradient)

    def release(self) -> None:
        """Sum the block over all processes and keep the own rows."""
        for linear, whole in self._whole.items():
            mine = self._shards.sum_rows(whole.gradient).to(self._dtype)
            rows = self._shards.sum_rows(whole.rows[:, None])[:, 0]
            columns = self._shards.sum_all(whole.columns)
            sums = whole.gradient.sum() + rows.sum() + columns.sum()
            self.total = self.total.to(sums.device) + sums
            if linear in self.own:
                known = self.own[linear]
                known.gradient.add_(mine)
                known.rows.add_(rows)
                known.columns.add_(columns)
            else:
                self.own[linear] = WeightGradient(mine, rows, columns)
        self._whole = {}

    def forget(self) -> None:
        """Forget what has been added so far in this step."""
        self.own = {}

    def clear(self) -> None:
        """Forget the step."""
        self.forget()
        self.total = torch.zeros(())


@functools.lru_cache(maxsize=2)  # a step asks for every window, and may cross into a new epoch
def _order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
