"""The options of `maskllm` and their validation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunebench.errors import UsageError, nearest
from prunebench.pruners.maskllm.moments import StateDtype
from prunebench.pruners.maskllm.optimize import Kind
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
_POSITIVE = (
    "temperature",
    "last_temperature",
    "scale",
    "last_scale",
    "logit_std",
    "rate",
    "outlier",
)


@dataclass(frozen=True)
class Options:
    """The options of `maskllm`.

    An option left out has the value of the preset.

    Attributes:
        preset: `laptop`, `lite` or `paper`, see `presets`.
        masks: Masks to apply instead of learning: FILE.npz, a checkpoint's folder, or hub:REPO.
        train: Whether to train even if masks of the model have been published.
        train_data: Training text, a name as --calibration takes it; None is that of the run.
        steps: Optimizer steps.
        batch: Windows per step, over all processes.
        train_seqlen: Tokens in a window.
        held_out: Held-out windows that select the best mask.
        eval_every: Steps between two held-out evaluations of the hard mask.
        prior: A method whose mask (not its weights) initializes the logits, masks by name, or
            `scratch` for no prior.
        prior_strength: Bias of the initial logits towards the prior, in units of `logit_std`.
        prior_noise: Standard deviation of the initial logits, in the same units (1 in the paper).
        logit_std: Unit of the initial logits.
        noise: Factor of the Gumbel noise.
        noise_samples: Noise draws per step; more than one takes as much memory as the logits.
        temperature, last_temperature: tau at the first and last step.
        scale, last_scale: kappa at the first and last step.
        optimizer: `adamw`, `momentum` or `mirror`.
        rate: Learning rate at the first step.
        last_rate: Final learning rate as a share of `rate`.
        beta1, beta2: Decay of the moments.
        weight_decay: Of the logits (`adamw`).
        clip: Maximum norm of the gradient (`adamw`), 0 for none.
        outlier: Maximum gradient in units of the layer's root mean square (`momentum`, `mirror`).
        reward: Factor of the reward for large kept weights (the paper's sparse weight
            regularization).
        curvature: Factor of the second-order term of the gradient, see `relaxation`; 0 in the
            paper.
        logit_dtype: float32, or bfloat16 with stochastic rounding.
        state_dtype: Of the optimizer's moments: float32, bfloat16 or int8.
        micro_tokens: Tokens of a micro-batch, in each process.
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
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1)")

    def require_no_training(self, masks: str) -> None:
        """Refuse options of a training if `masks` are applied instead.

        Raises:
            UsageError: An option of a training is set.
        """
        allowed = ("masks", "train", "seed")
        for option in dataclasses.fields(self):
            if option.name not in allowed and getattr(self, option.name) != option.default:
                fix = f"leave --set {option.name} out"
                raise UsageError(
                    f"{option.name} is an option of a training, and nothing is trained",
                    where=f"the masks of {masks} are applied",
                    fix=fix if self.masks else f"{fix}, or add --set train=true",
                )


def require_prior(name: str) -> None:
    """Refuse a prior that is neither a method with a mask nor looks like masks.

    Raises:
        UsageError: There is no such prior; the message names the nearest.
    """
    looks_like_masks = name.startswith("hub:") or "." in name or Path(name).expanduser().exists()
    if name not in PRIORS and not looks_like_masks:
        raise UsageError(
            f"there is no prior {name!r}",
            where=nearest(name, PRIORS),
            fix="use one of these, or masks: FILE.npz, a checkpoint's folder, or hub:REPO",
        )
