"""In-place optimizer updates for mask logits: AdamW, momentum, mirror descent.

`adamw` is the paper's (decoupled weight decay, gradients clipped by their norm over all layers).
`momentum` divides gradients by their root mean square over the layer and clips them: in a few dozen
steps Adam gets no estimate of the second moment of every single logit. `mirror` does the same with
s - mean(s), without the softmax's factor y: mirror descent on the simplex, where the gradient of an
improbable candidate does not vanish.
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
    """The gradient of a layer's logits, computed lazily, piece by piece or inside a kernel."""

    layer: LayerLogits
    weight: Tensor
    slope: WeightGradient
    relaxation: Relaxation
    mirror: bool

    @property
    def kernels(self) -> ModuleType | None:
        """The module of fused kernels; None if they cannot run on this layer."""
        return kernels_for(self.layer.logits, self.layer.table)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        inputs = (self.weight, self.slope, self.relaxation)
        if self.kernels is not None:
            for part in self.layer.chunks():
                direction = self.kernels.directions(
                    self.layer, *inputs, mirror=self.mirror, part=part
                )
                yield part, direction
            return
        for part, chosen, scores in self.layer.scores(*inputs):
            if self.mirror:
                yield part, scores.sub_(scores.mean(0))  # s - mean(s), [choices, part]
            else:
                yield part, slope_of_logits(chosen, scores, self.relaxation)


@dataclass(frozen=True)
class Optimizer:
    """Updates logits from their gradients.

    Attributes:
        kind: `adamw`, `momentum` or `mirror`, see the module.
        betas: Decay of the first and second moment; `momentum` and `mirror` only use the first.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of the logits (`adamw`).
        clip: Maximum norm of the gradient over all layers (`adamw`); 0 for none.
        outlier: Maximum gradient in units of the layer's root mean square (`momentum`, `mirror`).
        state_dtype: Storage of the moments.
    """

    kind: Kind = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    outlier: float = 20.0
    state_dtype: StateDtype = "float32"

    def prepare(self, layer: LayerLogits) -> None:
        """Allocate the moments of a layer."""
        make = functools.partial(
            PackedMoments.zeros, layer.logits, self.state_dtype, width=layer.width
        )
        layer.state["first"] = make()
        if self.kind == "adamw":
            layer.state["second"] = make(positive=True)

    def directions(
        self, layer: LayerLogits, weight: Tensor, slope: WeightGradient, relaxation: Relaxation
    ) -> Directions:
        """Return an iterable of slices of groups and the gradient of their logits, [choices, part].

        It is lazy: `step` and `sum_squares` replace the iteration by a fused kernel.

        Args:
            layer: The logits.
            weight: W, the rows of this layer that the process owns.
            slope: dL/dW~ of the same rows.
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
        """Update a layer's logits in place.

        Args:
            layer: The logits and their moments.
            directions: The gradient, piece by piece; overwritten.
            relaxation: That of the forward pass; its seed and step are those of the rounding.
            rate: Learning rate.
            unit: Divisor of the gradients: norm / clip if above 1 (`adamw`), or the layer's root
                mean square gradient (`momentum`, `mirror`).
            count: Number of this step, from 1; the step of `relaxation` counts noise draws, of
                which one optimizer step may have several.
        """
        # One fused pass. 8-bit moments need the largest value of a row first, and a kernel's block
        # of groups is not a row.
        if isinstance(directions, _Ascent) and self.state_dtype != "int8":
            kernels = directions.kernels
            if kernels is not None:
                kernels.update(
                    layer, directions.weight, directions.slope, relaxation, kind=self.kind,
                    rate=rate, unit=unit, betas=self.betas, eps=self.eps, outlier=self.outlier,
                    weight_decay=self.weight_decay,
                )  # fmt: skip
                return
        # plain PyTorch: without kernels, with 8-bit moments, or with several draws per step
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
                # Rounding to nearest would lose every update below half a unit in the last place.
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
        # `read` is a copy in float32, so that in-place operations do not touch the stored moments.
        first = layer.state["first"].read(part).lerp_(gradient, 1 - b1)
        second = (
            layer.state["second"].read(part).mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        )
        layer.state["first"].write(part, first)
        layer.state["second"].write(part, second)
        scale = (second / (1 - b2**count)).sqrt_().add_(self.eps)  # with bias correction
        # Decoupled (AdamW): the decay does not pass through the moments.
        old.mul_(1 - rate * self.weight_decay)
        return old.addcdiv_(first, scale, value=-rate / (1 - b1**count))

    def _momentum(
        self, layer: LayerLogits, part: slice, old: Tensor, gradient: Tensor, *, rate: float
    ) -> Tensor:
        # After `unit`: the bound is in root mean squares.
        gradient.clamp_(-self.outlier, self.outlier)
        first = layer.state["first"].read(part).mul_(self.betas[0]).add_(gradient)
        layer.state["first"].write(part, first)
        return old.add_(first, alpha=-rate)


def sum_squares(directions: Directions) -> float:
    """Return the sum of squares of a layer's gradient; the pieces are overwritten."""
    kernels = directions.kernels if isinstance(directions, _Ascent) else None
    if isinstance(directions, _Ascent) and kernels is not None:
        inputs = (directions.layer, directions.weight, directions.slope, directions.relaxation)
        return float(kernels.sum_squares(*inputs, mirror=directions.mirror))
    return float(sum(float(part.square_().sum(dtype=torch.float64)) for _, part in directions))
