"""The options of `distill`, its presets, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from prunebench.errors import UsageError, nearest
from prunebench.spec import OptionValue

PRESETS: dict[str, dict[str, OptionValue]] = {
    # 49,152 tokens: the default model on two cores
    "laptop": {
        "steps": 24,
        "batch": 4,
        "seqlen": 512,
        "held_out": 8,
        "eval_every": 4,
        "save_every": 4,
    },
    # 8.4 million tokens
    "hour": {
        "steps": 256,
        "batch": 16,
        "seqlen": 2048,
        "held_out": 16,
        "eval_every": 16,
        "save_every": 32,
    },
    # 262 million tokens
    "long": {
        "steps": 2000,
        "batch": 64,
        "seqlen": 2048,
        "held_out": 32,
        "eval_every": 50,
        "save_every": 100,
    },
}

_LEAST = {
    "steps": 1,
    "batch": 1,
    "seqlen": 2,
    "held_out": 1,
    "eval_every": 1,
    "save_every": 0,
    "micro_tokens": 1,
    "rank": 0,
}


@dataclass(frozen=True)
class DistillConfig:
    """The options of a distillation after the preset is applied; `Options` explains each."""

    data: str | None
    steps: int
    batch: int
    seqlen: int
    held_out: int
    eval_every: int
    save_every: int
    eta: float
    temperature: float
    lr: float
    warmup: float
    rank: int
    micro_tokens: int
    seed: int

    def factor(self, step: int) -> float:
        """Return the factor of the rate at a step: it rises during `warmup`, then falls to 0."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        return (self.steps - step) / (self.steps - rise)

    def require_shares(self, world: int) -> None:
        """Raise `UsageError` unless processes get equal shares of a batch.

        Args:
            world: Number of processes.
        """
        # Unequal shares would weight the windows of a step unequally.
        if self.batch % world:
            raise UsageError(
                f"{self.batch} windows a step cannot be shared out equally",
                where=f"{world} processes",
                fix=f"use --set recover.distill.batch={world} or a multiple",
            )


@dataclass(frozen=True)
class Options:
    """The options of `distill`. One left out has the value of the preset.

    Attributes:
        preset: `laptop`, `hour` or `long`: tokens and windows.
        data: Training text, a name as --calibration takes it or several split by commas; None is
            that of the run.
        steps: Optimizer steps.
        batch: Windows per step, over all processes.
        seqlen: Tokens in a window.
        held_out: Held-out windows that choose the weights that stay.
        eval_every: Steps between two measurements on them.
        save_every: Steps between two saved states, for resuming; 0 for never.
        eta: Share of the KL divergence in the loss; the rest is cross-entropy. 0 is plain
            fine-tuning without a teacher.
        temperature: Softens both distributions of the divergence.
        lr: Highest learning rate, relative to the root mean square of a matrix's kept weights.
        warmup: Share of the steps in which the rate rises; it falls linearly to 0 then.
        rank: Train an update of this rank instead of all kept weights, merged under the mask: less
            memory. 0 trains all.
        micro_tokens: Tokens of a micro-batch, in each process.
        seed: Of the order of the windows.
    """

    preset: str = "laptop"
    data: str | None = None
    steps: int | None = None
    batch: int | None = None
    seqlen: int | None = None
    held_out: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    eta: float = 0.67
    temperature: float = 1.0
    lr: float = 0.003
    warmup: float = 0.1
    rank: int = 0
    micro_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: A value is out of range.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}: {nearest(self.preset, PRESETS)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be a number of at least {least}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0")
        if not 0 <= self.eta <= 1:
            raise ValueError("eta must be in [0, 1]")
        if not 0 <= self.warmup < 1:
            raise ValueError("warmup must be in [0, 1)")

    def filled(self) -> DistillConfig:
        """Return the configuration: options that are None come from the preset."""
        preset = PRESETS[self.preset]
        values: dict[str, Any] = {
            field.name: preset.get(field.name) if value is None else value
            for field in dataclasses.fields(DistillConfig)
            for value in (getattr(self, field.name),)
        }
        return DistillConfig(**values)
