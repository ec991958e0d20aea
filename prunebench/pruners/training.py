"""What training methods need, forecast and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class TrainingNeeds:
    """Windows that a method trains on.

    Attributes:
        text: A text name as `--calibration` takes it.
        samples: Number of windows; fewer if the text is short.
        seqlen: Tokens in a window.
        held_out: Additional windows for model selection.
        least: Minimum number of windows.
        steps: Training steps, for the progress bar.
        text_option: How the text is named in --set.
        seqlen_option: How the length is named in --set.
    """

    text: str
    samples: int
    seqlen: int
    held_out: int
    least: int
    steps: int
    text_option: str = "train_data"
    seqlen_option: str = "train_seqlen"


@dataclass(frozen=True)
class CurvePoint:
    """Metrics at the end of a training step; step 0 is the initial state.

    Attributes:
        step: Steps taken.
        tokens: Tokens trained on so far, over all processes.
        loss: Mean training loss of the step in nats a token, with soft masks; None at step 0.
        temperature, scale: tau and kappa of the step.
        certainty: Mean over the groups of the largest probability, without noise.
        changed: Share of the groups whose choice is not the prior's.
        held_out_ppl: Perplexity of the hard mask on the held-out windows; None if not measured.
        seconds: Since the start, over resumes.
    """

    step: int
    tokens: int
    loss: float | None
    temperature: float
    scale: float
    certainty: float
    changed: float
    held_out_ppl: float | None
    seconds: float


@dataclass(frozen=True)
class TrainingReport:
    """The result of a training.

    Attributes:
        best_step: The step whose mask is the result; 0 is the prior.
        processes: Number of processes.
        curve: One point per step.
        prior_scores: Scores of the model with the prior's mask; empty if not requested.
    """

    best_step: int
    processes: int
    curve: tuple[CurvePoint, ...]
    prior_scores: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """An estimate of what a training needs.

    Attributes:
        memory: Bytes by item, in each process.
        tokens: Training tokens, over all processes.
        seconds: Estimated duration; None if unknown.
    """

    memory: Mapping[str, int]
    tokens: int
    seconds: float | None


@runtime_checkable
class Forecasts(Protocol):
    """A pruner that can forecast its cost before anything is loaded."""

    def forecast(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        dtype: torch.dtype,
        device: torch.device,
        processes: int,
    ) -> Forecast | None:
        """Return the forecast, or None if nothing is trained.

        Args:
            model: On the meta device: shapes only.
            sparsity: The target.
            dtype: Of the weights.
            device: Where the training will run.
            processes: Number of processes.
        """
