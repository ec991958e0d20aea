"""What single methods read besides the statistics of the walk."""

from __future__ import annotations

from dataclasses import dataclass

from prunebench.calibration.training import Training
from prunebench.models.gradients import GradientNorms
from prunebench.models.masks import Masks


@dataclass(frozen=True)
class PrunerInputs:
    """What a method asked for by its `Needs`; the walker hands it on and reads none of it.

    Attributes:
        gradients: Norms of the dense model's gradients.
        training: Windows to learn from.
        masks: Masks to apply or to begin with.
    """

    gradients: GradientNorms | None = None
    training: Training | None = None
    masks: Masks | None = None
