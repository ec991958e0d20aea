"""From the gradient of some logits to their new values, in one pass and in place.

`adamw` is the paper's (decoupled weight decay, gradients clipped by their norm over all layers).
`momentum` descends along gradients in units of their root mean square over the layer, clipped: a
few dozen steps do not give Adam an estimate for every single logit. `mirror` does the same, but
along s - mean(s) without the softmax's factor y: mirror descent on the simplex, in which a
candidate that has become improbable still hears how good it would be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from prunebench.pruners.maskllm.dispatch import kernels_for
from prunebench.pruners.maskllm.moments import PackedMoments, StateDtype, round_at_random
from prunebench.pruners.maskllm.relaxation import (
    LayerLogits,
    Relaxation,
    WeightGradient,
    slope_of_logits,
)

Kind = Literal["adamw", "momentum", "mirror"]
Directions = Iterable[tuple[slice, Tensor]]


@dataclass(frozen=True)
class _Ascent:
    """The directions of a layer, made from its gradient wherever they are used."""

    layer: LayerLogits
    weight: Tensor
    slope: WeightGradient
    relaxation: Relaxation
    mirror: bool

    @property
    def kernels(self) -> ModuleType | None:
        """What makes them in one pass, if it can."""
        return kernels_for(self.layer.logits, self.layer.table)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        given = (self.layer, self.weight, self.slope, self.relaxation)
        if self.kernels is not None:
            for part in self.layer.chunks():
                yield part, self.kernels.directions(*given, mirror=self.mirror, part=part)
            return
        for part, chosen, scores in self.layer.scores(*given[1:]):
            if self.mirror:
                yield part, scores.sub_(scores.mean(0))
            else:
                yield part, slope_of_logits(chosen, scores, self.relaxation)


@dataclass(frozen=True)
class Optimizer:
    """How logits follow their gradient.

    Attributes:
        kind: See the module.
        betas: Decay of the first and second moment; `momentum` and `mirror` have the first alone.
        eps: Added to the root of the second moment.
        weight_decay: Share of a logit that is lost a step, times the rate.
        clip: Largest norm of the gradient over all layers (`adamw`); 0 for none.
        outlier: Largest gradient in units of the layer's root mean square (the others).
        state_dtype: How moments are kept.
    """

    kind: Kind = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    outlier: float = 20.0
    state_dtype: StateDtype = "float32"

    def prepare(self, layer: LayerLogits) -> None:
        """Make the moments of a layer."""
        make = functools.partial(
            PackedMoments.zeros, layer.logits, self.state_dtype, width=layer.width
        )
        layer.state["first"] = make()
        if self.kind == "adamw":
            layer.state["second"] = make(positive=True)

    def directions(
        self, layer: LayerLogits, weight: Tensor, slope: WeightGradient, relaxation: Relaxation
    ) -> Directions:
        """Return the direction of ascent of some groups after others, (choices, part).

        It is made while one iterates, or in a kernel by whoever uses it.

        Args:
            layer: The logits.
            weight: W, the rows that the layer has.
            slope: How the loss changes with W~.
            relaxation: That of the forward pass.
        """
        return _Ascent(layer, weight, slope, relaxation, mirror=self.kind == "mirror")

    def step(
        self,
        layer: LayerLogits,
        directions: Directions,
        relaxation: Relaxation,
        *,
        rate: float,
        unit: float,
        count: int | None = None,
    ) -> None:
        """Change a layer's logits in place.

        Args:
            layer: The logits and their moments.
            directions: The gradient, piece by piece; overwritten.
            relaxation: That of the forward pass; random rounding has its seed and step.
            rate: Learning rate.
            unit: What gradients are divided by: by what `clip` leaves (`adamw`), or the layer's
                root mean square.
            count: Steps so far, with this one; the step of `relaxation` counts draws, of which
                there may be many in a step of the optimizer.
        """
        if isinstance(directions, _Ascent) and self.state_dtype != "int8":
            kernels = directions.kernels
            if kernels is not None:
                kernels.update(
                    layer, directions.weight, directions.slope, relaxation, kind=self.kind,
                    rate=rate, unit=unit, betas=self.betas, eps=self.eps, outlier=self.outlier,
                    weight_decay=self.weight_decay,
                )  # fmt: skip
                return
        count = relaxation.step + 1 if count is None else count
        for part, gradient in directions:
            gradient.div_(unit)
            old = layer.logits[:, part].to(torch.float32)
            if self.kind == "adamw":
                new = self._adamw(layer, part, old, gradient, rate=rate, count=count)
            else:
                new = self._momentum(layer, part, old, gradient, rate=rate)
            if layer.logits.dtype == torch.bfloat16:
                groups = torch.arange(part.start, part.stop, device=new.device) + layer.first
                new = round_at_random(
                    new, groups, seed=relaxation.seed, step=relaxation.step, layer=layer.index
                )
            layer.logits[:, part] = new

    def _adamw(
        self,
        layer: LayerLogits,
        part: slice,
        old: Tensor,
        gradient: Tensor,
        *,
        rate: float,
        count: int,
    ) -> Tensor:
        b1, b2 = self.betas
        first = layer.state["first"].read(part).lerp_(gradient, 1 - b1)
        second = (
            layer.state["second"].read(part).mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        )
        layer.state["first"].write(part, first)
        layer.state["second"].write(part, second)
        scale = (second / (1 - b2**count)).sqrt_().add_(self.eps)
        old.mul_(1 - rate * self.weight_decay)
        return old.addcdiv_(first, scale, value=-rate / (1 - b1**count))

    def _momentum(
        self, layer: LayerLogits, part: slice, old: Tensor, gradient: Tensor, *, rate: float
    ) -> Tensor:
        gradient.clamp_(-self.outlier, self.outlier)
        first = layer.state["first"].read(part).mul_(self.betas[0]).add_(gradient)
        layer.state["first"].write(part, first)
        return old.add_(first, alpha=-rate)


def sum_squares(directions: Directions) -> float:
    """Return the sum of squares of a direction."""
    kernels = directions.kernels if isinstance(directions, _Ascent) else None
    if isinstance(directions, _Ascent) and kernels is not None:
        one = directions
        return float(
            kernels.sum_squares(one.layer, one.weight, one.slope, one.relaxation, mirror=one.mirror)
        )
    return float(sum(float(part.square_().sum(dtype=torch.float64)) for _, part in directions))
