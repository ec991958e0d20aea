"""Inputs that some pruning methods need besides the statistics of the walk."""

from __future__ import annotations

from dataclasses import dataclass

from prunebench.calibration.training import Training
from prunebench.models.gradients import GradientNorms
from prunebench.models.masks import Masks


@dataclass(frozen=True)
class PrunerInputs:
    """The inputs that a method declares in its `Needs`; the walker passes them to the method.

    Attributes:
        gradients: Norms of the dense model's gradients.
        training: Training windows of a method that learns.
        masks: Masks to apply, or to initialize learning with.
    """

    gradients: GradientNorms | None = None
    training: Training | None = None
    masks: Masks | None = None
