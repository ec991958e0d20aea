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
    """Windows that a method learns from.

    Attributes:
        text: A text name as `--calibration` takes it.
        samples: Windows wanted; fewer if the text is short.
        seqlen: Tokens in one.
        held_out: More windows, which only decide what is kept.
        least: Windows without which it cannot begin.
        steps: Training steps, for the progress bar.
    """

    text: str
    samples: int
    seqlen: int
    held_out: int
    least: int
    steps: int


@dataclass(frozen=True)
class CurvePoint:
    """What was measured at the end of a training step; step 0 is where it began.

    Attributes:
        step: Steps taken.
        tokens: Tokens trained on so far, over all processes.
        loss: Mean training loss of the step in nats a token, with soft masks; None at step 0.
        temperature, scale: Of the step.
        certainty: Mean over the groups of the largest probability, without noise.
        changed: Share of the groups whose choice is not the prior's.
        held_out_ppl: Perplexity of the hard mask on the held-out windows, where it was measured.
        seconds: Since the beginning.
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
    """How a training went.

    Attributes:
        best_step: The step whose mask was kept; 0 is the prior.
        processes: Processes that learned together.
        curve: One point a step.
        prior_scores: What the model got with the mask that was begun with; empty if it was not
            asked.
    """

    best_step: int
    processes: int
    curve: tuple[CurvePoint, ...]
    prior_scores: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What a training will need.

    Attributes:
        memory: Bytes by item, in each process.
        tokens: To learn from, over all processes.
        seconds: About how long it takes, if that could be estimated.
    """

    memory: Mapping[str, int]
    tokens: int
    seconds: float | None


@runtime_checkable
class Forecasts(Protocol):
    """A pruner that can say what it will need before anything is loaded."""

    def forecast(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        dtype: torch.dtype,
        device: torch.device,
        processes: int,
    ) -> Forecast | None:
        """Return what is needed, or None if nothing is trained.

        Args:
            model: On the meta device: shapes alone.
            sparsity: The target.
            dtype: Of the weights.
            device: Where it will run.
            processes: How many learn together.
        """
