"""The contract of a recoverer, and the base class of those that train one block at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunebench.calibration.training import Training
from prunebench.models.pruned_block import PrunedBlock, RecoveredBlock, Target
from prunebench.pruners.protocol import Needs
from prunebench.pruners.training import Forecast
from prunebench.spec import OptionValue

__all__ = [
    "BlockRecoverer",
    "DistillPoint",
    "HeldOut",
    "ModelRecoverer",
    "ModelRecovery",
    "PrunedBlock",
    "RecoveredBlock",
    "RecoveryCost",
    "Target",
]


@dataclass(frozen=True)
class RecoveryCost:
    """What a recovery takes, for the forecast.

    Attributes:
        passes: Forward passes of the blocks over the calibration set; a backward pass counts as
            two. The dense stream is not included.
        copies: float32 copies of a block's weights beside the gradient: master and moments.
        batch: Windows that run together with a graph.
    """

    passes: float
    copies: float
    batch: int


class BlockRecoverer(ABC):
    """Trains each block right after it is pruned; a frozen dataclass whose fields are its options.

    Attributes:
        target: What a block's output should be: `dense`, the output of the dense block on the dense
            model's hidden states; `local`, that of the dense block on the pruned model's.
    """

    needs: ClassVar[Needs] = Needs(calibration=True)
    target: Target = "dense"

    @property
    def moves_mask(self) -> bool:
        """Whether other weights than the method's may be 0 afterwards, as many in each matrix."""
        return False

    @property
    def trains_norms(self) -> bool:
        """Whether parameters of normalizations change too."""
        return False

    @property
    def weighs_channels_alike(self) -> bool:
        """Whether its loss counts all channels alike, however unequal they are in the target."""
        return True

    def check(self, *, samples: int) -> None:  # noqa: B027  (nothing to refuse is a default)
        """Raise `UsageError`, before any work, if the calibration windows do not suffice."""

    def cost(self, *, samples: int) -> RecoveryCost:
        """Return what it takes; a guess: three epochs of forward and backward passes."""
        return RecoveryCost(passes=9, copies=3, batch=1)

    @abstractmethod
    def recover_block(self, pruned: PrunedBlock) -> RecoveredBlock:
        """Write new kept weights into the linears of a block; pruned places stay +0.0.

        Args:
            pruned: The block with its inputs and targets.
        """


# ---------------------------------------------------------------- end to end


@dataclass(frozen=True)
class HeldOut:
    """What is measured on the held-out windows.

    Attributes:
        loss: What is minimized, nats a token; the weights with the lowest stay. None if it is not
            finite.
        ppl: Perplexity; None with the loss.
        kl: KL divergence from the dense model, nats a token; None without a teacher.
    """

    loss: float | None
    ppl: float | None
    kl: float | None


@dataclass(frozen=True)
class DistillPoint:
    """Metrics at the end of a training step; step 0 is the start.

    Attributes:
        step: Steps taken.
        tokens: Tokens trained on so far, over all processes.
        loss: Mean training loss of the step in nats a token; None at step 0.
        held_out: Where it was measured.
        seconds: Since the start, over resumes.
    """

    step: int
    tokens: int
    loss: float | None
    held_out: HeldOut | None
    seconds: float


@dataclass(frozen=True)
class ModelRecovery:
    """What an end-to-end recovery did.

    Attributes:
        best_step: The step whose weights stay; 0 is the start.
        processes: Number of processes.
        curve: One point per step.
        resumed: The step that the training resumed from; 0 if it did not.
        zeros: Weights that were kept and have become 0, by matrix.
    """

    best_step: int
    processes: int
    curve: tuple[DistillPoint, ...]
    resumed: int = 0
    zeros: Mapping[str, int] = field(default_factory=dict)


class ModelRecoverer(ABC):
    """A recoverer that trains the whole pruned model, after the last block."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The windows that it trains on."""

    @abstractmethod
    def for_run(self, calibration: str | None) -> ModelRecoverer:
        """Return the recoverer with all options filled in.

        Args:
            calibration: The calibration text of the run, the default text to train on.
        """

    @abstractmethod
    def options(self) -> dict[str, OptionValue]:
        """Return the options, filled in."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UsageError`, before any work, if this run cannot be."""

    def check_model(self, model: nn.Module, data: Training) -> None:  # noqa: B027
        """Raise `IncompatibleData`, before anything is pruned, if the model cannot be trained."""

    @abstractmethod
    def forecast(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device, processes: int
    ) -> Forecast:
        """Return what the training will need.

        Args:
            model: On the meta device: shapes only.
            dtype: Of the weights.
            device: Where the training will run.
            processes: Number of processes.
        """

    @abstractmethod
    def recover_model(
        self, model: nn.Module, dense: dict[str, Tensor], data: Training
    ) -> ModelRecovery:
        """Write new kept weights into a pruned model; pruned places stay +0.0.

        Args:
            model: The pruned model, all weights in memory.
            dense: The dense weights of its prunable matrices as stored, in host memory, by name;
                emptied.
            data: Windows, the folder of saved states, and callbacks.
        """
