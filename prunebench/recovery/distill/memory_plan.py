"""Forecast of a distillation from shapes alone: memory by item, tokens, and time.

Bytes of persistent tensors are exact; those of activations and of the graph of one block are
estimates. Time is that of the matrix products, at the speed of a small probe on random numbers, and
of Adam's updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.models.linears import Linear, find_linears
from prunebench.pruners.training import Forecast
from prunebench.recovery.distill.options import DistillConfig
from prunebench.training.costs import TrainingCosts

_PROBE = 1 << 22  # weights of the probe of an update


@dataclass(frozen=True)
class DistillPlan(TrainingCosts):
    """Forecasts the cost of one distillation."""

    model: nn.Module
    options: DistillConfig
    dtype: torch.dtype
    device: torch.device
    processes: int = 1

    def forecast(self) -> Forecast:
        """Return memory of one process, tokens of all processes, and time."""
        config = self.options
        return Forecast(
            memory=self.memory(),
            tokens=config.steps * config.batch * config.seqlen,
            seconds=self.seconds(),
        )

    def memory(self) -> dict[str, int]:
        """Return the bytes of every item in memory during training, in one process."""
        linears = find_linears(self.model)
        experts = self.largest_block([linear for linear in linears if linear.expert is not None])
        width, rank = self.dtype.itemsize, self.options.rank
        parameters = sum(p.numel() for p in self.model.parameters())
        owned = sum(self.rows(linear) * linear.in_features for linear in linears)
        low = sum(rank * (self.rows(linear) + linear.in_features) for linear in linears)
        trained = low if rank else owned
        block = self.largest_block(linears)
        items = {
            "dense model (teacher)": parameters * width,
            "masters": 4 * trained,
            "moments": 8 * trained,
            # of what is trained, and of one whole block
            "gradients": 4 * (trained + block) + experts * width,
            "best so far": 4 * low if rank else owned * width,
            "workspace": block * width,
            "activations": self.activations(linears, teacher=bool(self.options.eta)),
        }
        # M is in the zeros of W0 with a low rank, else a byte for each weight
        return items | ({"pruned weights": owned * width} if rank else {"mask": owned})

    def micro(self) -> tuple[int, int]:
        """Return the number of windows in a micro-batch, and their length in tokens."""
        config = self.options
        share = config.batch // self.processes
        return max(1, min(share, config.micro_tokens // config.seqlen)), config.seqlen

    def seconds(self) -> float:
        """Estimate the duration of all steps and held-out measurements, from a probe."""
        config, rate = self.options, self.product_rate()
        linears = find_linears(self.model)
        weights = self.used(linears) + self.hidden() * self.vocabulary()
        tokens = config.batch * config.seqlen / self.processes
        # 6 operations per weight and token: 2 forward, 4 backward; 2 more for the teacher
        teacher = 2 if config.eta else 0
        step = (6 + teacher) * weights * tokens / rate + self._update(linears)
        held_out = config.held_out * config.seqlen / self.processes
        evaluations = config.steps // config.eval_every + 1
        evaluation = 2 * weights * held_out / rate
        # the teacher's hidden states of the held-out windows are computed once
        return config.steps * step + (evaluations + bool(teacher)) * evaluation

    def _update(self, linears: Sequence[Linear]) -> float:
        """Return the seconds of an update of all kept weights by Adam."""
        if self.options.rank:
            return 0.0
        value = torch.zeros(_PROBE, device=self.device)
        value.grad = torch.zeros_like(value)
        optimizer = torch.optim.Adam([value], lr=0.0, fused=True)
        owned = sum(self.rows(linear) * linear.in_features for linear in linears)
        return self.timed(optimizer.step) * owned / _PROBE
