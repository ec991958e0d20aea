"""The contract of a recoverer, and the base class of those that train one block at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from prunebench.models.pruned_block import PrunedBlock, RecoveredBlock, Target
from prunebench.pruners.protocol import Needs

__all__ = ["BlockRecoverer", "PrunedBlock", "RecoveredBlock", "Recoverer", "RecoveryCost", "Target"]


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


@runtime_checkable
class Recoverer(Protocol):
    """Trains kept weights; an implementation is a frozen dataclass whose fields are its options."""

    needs: ClassVar[Needs]

    def check(self, *, samples: int) -> None:
        """Raise `UsageError`, before any work, if the calibration windows do not suffice."""

    def cost(self, *, samples: int) -> RecoveryCost:
        """Return what a recovery with so many calibration windows takes."""


class BlockRecoverer(ABC):
    """A recoverer that trains each block right after it is pruned.

    Attributes:
        target: What a block's output should be: `dense`, the output of the dense block on the dense
            model's hidden states; `local`, that of the dense block on the pruned model's.
    """

    needs: ClassVar[Needs] = Needs(calibration=True)
    target: Target = "dense"

    def check(self, *, samples: int) -> None:  # noqa: B027  (nothing to refuse is a default)
        """Accept any number of windows."""

    def cost(self, *, samples: int) -> RecoveryCost:
        """Return a guess: three epochs of forward and backward passes."""
        return RecoveryCost(passes=9, copies=3, batch=1)

    @abstractmethod
    def recover_block(self, pruned: PrunedBlock) -> RecoveredBlock:
        """Write new kept weights into the linears of a block; pruned places stay +0.0.

        Args:
            pruned: The block with its inputs and targets.
        """
