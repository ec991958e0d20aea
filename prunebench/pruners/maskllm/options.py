"""What can be chosen about a training of masks, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunebench.errors import UsageError, nearest
from prunebench.pruners.maskllm.moments import StateDtype
from prunebench.pruners.maskllm.optimise import Kind
from prunebench.pruners.maskllm.presets import PRESETS

PRIORS = ("scratch", "magnitude", "wanda", "sparsegpt", "gblm", "ria", "alps")

_LEAST = {
    "steps": 1,
    "batch": 1,
    "train_seqlen": 2,
    "held_out": 1,
    "eval_every": 1,
    "noise_samples": 1,
    "micro_tokens": 1,
    "save_every": 0,
    "prior_strength": 0,
    "prior_noise": 0,
    "noise": 0,
    "last_rate": 0,
    "weight_decay": 0,
    "clip": 0,
    "reward": 0,
    "curvature": 0,
}


@dataclass(frozen=True)
class Options:
    """The options of `maskllm`.

    An option left out has the value of the preset.

    Attributes:
        preset: `laptop`, `lite` or `paper`, see `presets`.
        masks: Masks to apply instead of learning: FILE.npz, a checkpoint's folder, or hub:REPO.
        train: Whether to learn although masks of the model have been published.
        train_data: Text to learn from, a name as --calibration takes it; None is that of the run.
        steps: Optimizer steps.
        batch: Windows in a step, over all processes.
        train_seqlen: Tokens in a window.
        held_out: Windows that decide which mask is kept.
        eval_every: Steps between two scores of the hard mask.
        prior: A method whose mask is begun with (its weights are not), masks by name, or
            `scratch`.
        prior_strength: How far the prior's choice is ahead, in units of `logit_std`.
        prior_noise: Spread of the first logits, in the same units (1 in the paper).
        logit_std: Unit of the first logits.
        noise: Factor of the Gumbel noise.
        noise_samples: Draws of the noise a step; more than one needs memory like the logits.
        temperature, last_temperature: tau at the first and last step.
        scale, last_scale: kappa at the first and last step.
        optimizer: `adamw`, `momentum` or `mirror`.
        rate: Learning rate at the first step.
        last_rate: Share of it that is left at the last step.
        beta1, beta2: Decay of the moments.
        weight_decay: Of the logits (`adamw`).
        clip: Largest norm of the gradient (`adamw`), 0 for none.
        outlier: Largest gradient in units of the layer's root mean square (`momentum`, `mirror`).
        reward: Of large kept weights.
        curvature: What the change of a whole weight costs beyond the slope, see `relax`; 0 in the
            paper.
        logit_dtype: float32, or bfloat16 with random rounding.
        state_dtype: Of the optimizer's moments: float32, bfloat16 or int8.
        micro_tokens: Tokens whose activations exist at a time, in each process.
        save_every: Steps between two saved states, for resuming; 0 for never.
        seed: Of noise and order.
    """

    preset: str = "laptop"
    masks: str | None = None
    train: bool = False
    train_data: str | None = None
    steps: int | None = None
    batch: int | None = None
    train_seqlen: int | None = None
    held_out: int | None = None
    eval_every: int | None = None
    prior: str | None = None
    prior_strength: float | None = None
    prior_noise: float | None = None
    logit_std: float | None = None
    noise: float | None = None
    noise_samples: int = 1
    temperature: float | None = None
    last_temperature: float | None = None
    scale: float | None = None
    last_scale: float | None = None
    optimizer: Kind | None = None
    rate: float | None = None
    last_rate: float | None = None
    beta1: float | None = None
    beta2: float = 0.95
    weight_decay: float | None = None
    clip: float | None = None
    outlier: float | None = None
    reward: float | None = None
    curvature: float | None = None
    logit_dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: StateDtype = "float32"
    micro_tokens: int = 4096
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}: {nearest(self.preset, PRESETS)}")
        if self.masks and self.train:
            raise ValueError("masks are given, and train=true wants to learn others")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least {least}")
        for name in (
            "temperature",
            "last_temperature",
            "scale",
            "last_scale",
            "logit_std",
            "rate",
            "outlier",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1)")

    def require_no_training(self, masks: str) -> None:
        """Refuse options that would not be read, as `masks` are applied.

        Raises:
            UsageError: One is set.
        """
        apart = ("masks", "train", "seed")
        for one in dataclasses.fields(self):
            if one.name not in apart and getattr(self, one.name) != one.default:
                fix = f"leave --set {one.name} out"
                raise UsageError(
                    f"{one.name} is an option of a training, and nothing is trained",
                    where=f"the masks of {masks} are applied",
                    fix=fix if self.masks else f"{fix}, or add --set train=true",
                )


def require_prior(name: str) -> None:
    """Refuse a name that looks like a method's and is none that gives a prior.

    Raises:
        UsageError: The nearest names are named.
    """
    looks_like_masks = name.startswith("hub:") or "." in name or Path(name).expanduser().exists()
    if name not in PRIORS and not looks_like_masks:
        raise UsageError(
            f"there is no prior {name!r}",
            where=nearest(name, PRIORS),
            fix="use one of these, or masks: FILE.npz, a checkpoint's folder, or hub:REPO",
        )
