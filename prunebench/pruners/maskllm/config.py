"""The configuration of a training with every option filled in, and the objects built from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prunebench.errors import UsageError
from prunebench.models.linears import Linear
from prunebench.models.walker import BlockWalker
from prunebench.pruners.maskllm.initial_logits import LogitInit
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.moments import StateDtype
from prunebench.pruners.maskllm.optimize import Kind, Optimizer
from prunebench.pruners.maskllm.relaxation import LayerLogits
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.training.shards import Shards


@dataclass(frozen=True)
class TrainingConfig:
    """The options of a training after the preset is applied; `Options` explains each of them.

    Only `train_data` may be None: the calibration text of the run is then used.
    """

    train_data: str | None
    steps: int
    batch: int
    train_seqlen: int
    held_out: int
    eval_every: int
    prior: str
    prior_strength: float
    prior_noise: float
    logit_std: float
    noise: float
    noise_samples: int
    temperature: float
    last_temperature: float
    scale: float
    last_scale: float
    optimizer: Kind
    rate: float
    last_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    clip: float
    outlier: float
    reward: float
    curvature: float
    logit_dtype: Literal["float32", "bfloat16"]
    state_dtype: StateDtype
    micro_tokens: int
    save_every: int
    seed: int

    @classmethod
    def of(cls, options: Any, preset: Mapping[str, Any]) -> TrainingConfig:
        """Take every field from `options`, or from `preset` where it is None there."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = getattr(options, field.name)
            values[field.name] = preset.get(field.name) if value is None else value
        return cls(**values)

    def require_shares(self, world: int) -> None:
        """Raise `UsageError` unless processes and noise draws get equal shares of a batch.

        Args:
            world: Number of processes.
        """
        # Unequal shares would weight the windows of a step unequally.
        if self.batch % (world * self.noise_samples):
            raise UsageError(
                f"{self.batch} windows a step cannot be shared out equally",
                where=f"{world} processes, {self.noise_samples} draws of the noise",
                fix=f"use --set batch={world * self.noise_samples} or a multiple",
            )

    def learner(
        self,
        walker: BlockWalker,
        prior: Mapping[str, Tensor] | None,
        table: Tensor,
        shards: Shards,
    ) -> Learner:
        """Return a learner with initial logits for the rows that this process owns.

        Args:
            walker: The model.
            prior: Choices of the prior's mask by linear, [groups], whole layers; None for none.
            table: The candidates, [choices, M].
            shards: This process among others.
        """
        optimizer = self._optimizer()
        init = LogitInit(self.logit_std, self.prior_noise, self.prior_strength)
        layers: dict[Linear, LayerLogits] = {}
        initial: dict[str, Tensor] = {}
        for index, linear in enumerate(walker.linears):
            device = linear.stored.device
            rows = shards.rows(linear.out_features)
            width = linear.in_features // table.shape[1]  # groups in a row
            groups = slice(rows.start * width, rows.stop * width)
            choices = prior[linear.name][groups].to(device) if prior else None
            logits = init.logits(
                choices, table.to(device), groups=groups, seed=self.seed, layer=index,
                dtype=getattr(torch, self.logit_dtype), device=device,
            )  # fmt: skip
            layer = LayerLogits(index, logits, table.to(device), width, first=groups.start)
            optimizer.prepare(layer)
            layers[linear] = layer
            initial[linear.name] = layer.choices() if choices is None else choices
        return Learner(
            walker.model,
            layers,
            initial,
            optimizer=optimizer,
            schedule=self._schedule(),
            seed=self.seed,
            noise_samples=self.noise_samples,
            micro_tokens=self.micro_tokens,
            shards=shards,
            gradient_dtype=torch.float32 if self.state_dtype == "float32" else torch.bfloat16,
        )

    def _optimizer(self) -> Optimizer:
        return Optimizer(
            self.optimizer,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
            clip=self.clip,
            outlier=self.outlier,
            state_dtype=self.state_dtype,
        )

    def _schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps,
            batch=self.batch,
            temperature=(self.temperature, self.last_temperature),
            scale=(self.scale, self.last_scale),
            noise=self.noise,
            reward=self.reward,
            curvature=self.curvature,
            peak_rate=self.rate,
            last_rate=self.last_rate,
        )
