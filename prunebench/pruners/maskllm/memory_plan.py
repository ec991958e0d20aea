"""Forecast of a mask training from shapes alone: memory by item, tokens, and time.

Bytes of persistent tensors are exact; those of activations and of the graph of one block are
estimates (a test compares both with what a training allocates). Time is that of the matrix products
and mask passes of a step, at the speed of a small probe on random numbers; element-wise operations
between them, loading, the prior and scoring are not included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.models.linears import Linear, find_linears
from prunebench.pruners.maskllm import dispatch
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.config import TrainingConfig
from prunebench.pruners.maskllm.optimize import Optimizer
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.pruners.training import Forecast
from prunebench.sparsity import Sparsity
from prunebench.training.costs import TrainingCosts

_PIECE_BYTES = 48 << 20  # temporaries of one piece of the logits, with its random bits
_PROBE_ROWS, _PROBE_WIDTH = 512, 2048  # weights of the probe of a mask pass: a million
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class MemoryPlan(TrainingCosts):
    """Forecasts the cost of one training.

    Attributes:
        model: On the meta device, or real.
        options: The training's configuration.
        sparsity: N:M.
        dtype: Of the weights.
        device: Where the training will run.
        processes: Number of processes.
    """

    model: nn.Module
    options: TrainingConfig
    sparsity: Sparsity
    dtype: torch.dtype
    device: torch.device
    processes: int = 1

    def forecast(self) -> Forecast:
        """Return memory of one process, tokens of all processes, and time."""
        config = self.options
        return Forecast(
            memory=self.memory(),
            tokens=config.steps * config.batch * config.train_seqlen,
            seconds=self.seconds(),
        )

    # ------------------------------------------------------------ memory

    def memory(self) -> dict[str, int]:
        """Return the bytes of every item in memory during training, in one process."""
        linears = find_linears(self.model)
        experts = self.largest_block([linear for linear in linears if linear.expert is not None])
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "model": parameters * self.dtype.itemsize,
            "logits": self._choices * self._groups(linears) * self._logit_bytes,
            "moments": self._moments(linears),
            "noise draws": self._draws(linears),
            # uint8 each: the prior's choices and the best so far
            "masks kept": 2 * self._groups(linears),
            "gradients": self._gradients(linears) + experts * self.dtype.itemsize,
            "workspace": self.largest_block(linears) * self.dtype.itemsize,
            "activations": self.activations(linears),
            "pieces": _PIECE_BYTES,
        }

    @property
    def _choices(self) -> int:
        assert self.sparsity.kept is not None and self.sparsity.group is not None
        return math.comb(self.sparsity.group, self.sparsity.kept)

    @property
    def _logit_bytes(self) -> int:
        return _STATE_BYTES[self.options.logit_dtype]

    def _groups(self, linears: Sequence[Linear]) -> int:
        assert self.sparsity.group is not None
        group = self.sparsity.group
        return sum(self.rows(linear) * linear.in_features // group for linear in linears)

    def _moments(self, linears: Sequence[Linear]) -> int:
        # One number per candidate and group
        each = self._choices * self._groups(linears) * _STATE_BYTES[self.options.state_dtype]
        if self.options.state_dtype == "int8":
            # one float32 scale per choice and row
            each += 4 * self._choices * sum(self.rows(linear) for linear in linears)
        return int(each * (2 if self.options.optimizer == "adamw" else 1))

    def _draws(self, linears: Sequence[Linear]) -> int:
        return 4 * self._choices * self._groups(linears) if self.options.noise_samples > 1 else 0

    def _gradients(self, linears: Sequence[Linear]) -> int:
        """Return the bytes of the owned rows of all layers, and of one whole block in float32."""
        width = 4 if self.options.state_dtype == "float32" else 2
        owned = sum(self.rows(linear) * linear.in_features for linear in linears)
        return int(width * owned + 4 * self.largest_block(linears))

    def micro(self) -> tuple[int, int]:
        """Return the number of windows in a micro-batch, and their length in tokens."""
        config = self.options
        share = config.batch // self.processes // config.noise_samples
        windows = max(1, min(share, config.micro_tokens // config.train_seqlen))
        return windows, config.train_seqlen

    # ------------------------------------------------------------ time

    def seconds(self) -> float:
        """Estimate the duration of all steps and held-out evaluations, from a probe."""
        config = self.options
        rate, soften, update = self.product_rate(), *self._mask_seconds()
        linears = find_linears(self.model)
        weights = sum(linear.size for linear in linears)
        used = self.used(linears)
        head = self.hidden() * self.vocabulary()
        tokens = config.batch * config.train_seqlen / self.processes
        passes = math.ceil(tokens / math.prod(self.micro()))
        # 6 operations per weight and token: 2 forward, 4 backward
        step = 6 * (used + head) * tokens / rate
        # a block's mask is computed in the forward and again in the backward pass
        step += weights / self.processes * (2 * passes * soften + update)
        tokens = config.held_out * config.train_seqlen / self.processes
        evaluation = 2 * (used + head) * tokens / rate
        return config.steps * step + (config.steps // config.eval_every + 1) * evaluation

    def _mask_seconds(self) -> tuple[float, float]:
        """Return the seconds per weight of a soft mask, and of an update of its logits."""
        config = self.options
        assert self.sparsity.kept and self.sparsity.group
        table = candidates(self.sparsity.kept, self.sparsity.group).to(self.device)
        width = _PROBE_WIDTH // len(table[0])
        # Zeros do: the time of a mask pass does not depend on the values.
        logits = torch.zeros(
            len(table),
            _PROBE_ROWS * width,
            dtype=getattr(torch, config.logit_dtype),
            device=self.device,
        )
        layer = LayerLogits(0, logits, table, width)
        optimizer = Optimizer(config.optimizer, state_dtype=config.state_dtype)
        optimizer.prepare(layer)
        weight = torch.zeros(_PROBE_ROWS, _PROBE_WIDTH, dtype=self.dtype, device=self.device)
        out = torch.empty_like(weight)
        slope = WeightGradient(
            torch.zeros(weight.shape, device=self.device),
            torch.zeros(_PROBE_ROWS, device=self.device),
            torch.zeros(_PROBE_WIDTH, device=self.device),
        )
        relaxation = Relaxation(
            0, 0, temperature=1.0, scale=1.0, noise=config.noise, reward=config.reward,
            curvature=config.curvature,
        )  # fmt: skip
        has_norm = config.optimizer != "adamw" or bool(config.clip)

        def update() -> None:
            directions = optimizer.directions(layer, weight, slope, relaxation)
            optimizer.step(layer, directions, relaxation, count=1, rate=0.0, unit=1.0)
            if has_norm:  # computed in a pass of its own
                for _ in optimizer.directions(layer, weight, slope, relaxation):
                    pass

        size = weight.numel()
        soften = self.timed(lambda: dispatch.soften(layer, weight, relaxation, out)) / size
        return soften, self.timed(update) / size
