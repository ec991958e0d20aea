"""Temperature, scale, reward and learning rate by step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunebench.pruners.maskllm.relaxation import Relaxation


@dataclass(frozen=True)
class Schedule:
    """The schedules of the paper and its code.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step, over all processes.
        temperature: tau at the first and at the last step; linear between.
        scale: kappa, likewise.
        noise: Factor of the Gumbel noise.
        reward: lambda at the first step; falls linearly to 0.
        curvature: c, see `relaxation`; constant.
        peak_rate: Learning rate at the first step; falls along a cosine to `last_rate` of it.
    """

    steps: int
    batch: int
    temperature: tuple[float, float]
    scale: tuple[float, float]
    noise: float
    reward: float
    curvature: float
    peak_rate: float
    last_rate: float

    def relaxation(self, step: int, *, seed: int, draw: int) -> Relaxation:
        """Return the relaxation at a step, with the noise of one draw.

        Args:
            step: From 0.
            seed: Of the run.
            draw: Number of the noise draw, counted over all steps.
        """
        done = step / max(self.steps - 1, 1)  # 0 at the first step, 1 at the last
        return Relaxation(
            seed=seed,
            step=draw,
            temperature=self.temperature[0] + done * (self.temperature[1] - self.temperature[0]),
            scale=self.scale[0] + done * (self.scale[1] - self.scale[0]),
            noise=self.noise,
            # The linear fall to 0 is in the authors' code, not in the paper.
            reward=self.reward * (1 - step / self.steps),
            curvature=self.curvature,
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        done = step / self.steps
        low = self.peak_rate * self.last_rate
        return low + (self.peak_rate - low) * (1 + math.cos(math.pi * done)) / 2
