"""The contract of a pruning method: what it needs, what it returns, what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from prunebench.models.gradients import Norm
from prunebench.models.removal import Removal
from prunebench.models.source import CatalogEntry
from prunebench.models.walker import BlockWalker
from prunebench.models.weight_grid import WeightGrid
from prunebench.pruners.training import TrainingNeeds, TrainingReport
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue

BEYOND_TARGET = "zeros beyond the target"


@dataclass(frozen=True)
class Needs:
    """What a method or an allocator needs; may depend on its options.

    Attributes:
        calibration: Statistics of the inputs over the calibration windows.
        hessian: The Gram matrix of the inputs too, not only their norms.
        gradients: Which norm of the dense model's gradients over the same windows, if any.
        training: Windows to learn from.
        masks: Name of masks to read, see `models.masks`.
        whole_model: Whether all weights must be in memory, because the model is run repeatedly
            from any block to its end.
    """

    calibration: bool = False
    hessian: bool = False
    gradients: Norm | None = None
    training: TrainingNeeds | None = None
    masks: str | None = None
    whole_model: bool = False

    @property
    def tokens(self) -> bool:
        """Whether calibration tokens are read at all."""
        return self.calibration or self.gradients is not None


@dataclass(frozen=True)
class LayerEvent:
    """A per-layer anomaly (e.g. a singular Hessian), recorded in the result."""

    layer: str
    kind: str
    value: float | None = None


@dataclass(frozen=True)
class Pruned:
    """A new weight with its loss and events.

    Attributes:
        weight: float32, zeros where pruned.
        loss: The layer's reconstruction error 1/2 tr(D H D^T), D the change of the weight and H
            the damped Hessian; None for a method that does not compute it.
        events: Anomalies of this layer.
    """

    weight: Float[Tensor, "out in"]
    loss: float | None = None
    events: tuple[LayerEvent, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """What a method reports at the end.

    Attributes:
        events: Anomalies of all layers; empty if there were none.
        losses: Reconstruction error of each layer, by name, see `Pruned.loss`.
        learned: Training curve and best step, for methods that train.
        removal: The blocks that are gone, for methods that remove blocks.
        block_scores: What such a method measured for each block, by index in the dense model.
    """

    events: tuple[LayerEvent, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    learned: TrainingReport | None = None
    removal: Removal | None = None
    block_scores: Mapping[int, float] = field(default_factory=dict)

    @property
    def zeros_beyond(self) -> dict[str, int]:
        """Zeros beyond the target (e.g. from quantization), by layer."""
        return {e.layer: int(e.value or 0) for e in self.events if e.kind == BEYOND_TARGET}


@runtime_checkable
class Pruner(Protocol):
    """Zeroes weights in place, block by block, until `sparsity` is met.

    An implementation is a frozen dataclass whose fields are its options.
    """

    @property
    def needs(self) -> Needs:
        """What the method needs; a class attribute, unless it depends on options."""

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Prune every linear of `walker` to its sparsity, by name."""


@runtime_checkable
class ClaimsGrid(Protocol):
    """A pruner that says which values its weights may hold; a run checks the weights for it."""

    @property
    def grid(self) -> WeightGrid | None:
        """The form of the quantized weights; None if nothing is rounded."""


def grid_of(pruner: Pruner) -> WeightGrid | None:
    """Return the form that a pruner claims for its weights, if it claims one."""
    return pruner.grid if isinstance(pruner, ClaimsGrid) else None


@runtime_checkable
class DependsOnModel(Protocol):
    """A pruner whose option defaults depend on the model."""

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> Any:
        """Return the pruner with all options filled in.

        Args:
            entry: The catalog's row of the model, if it has one.
            calibration: The calibration text of the run.
        """

    def options(self) -> dict[str, OptionValue]:
        """Return the options that matter, filled in."""

    def check(self, sparsity: Sparsity) -> None:
        """Refuse a sparsity that the method cannot reach, before anything is loaded."""
