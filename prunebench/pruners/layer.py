"""Base classes of one-shot methods: one group of linears, or one matrix, at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.models.walker import BlockWalker, LinearGroup
from prunebench.pruners.protocol import (
    BEYOND_TARGET,
    DependsOnModel,
    LayerEvent,
    Needs,
    Pruned,
    Pruner,
    PruneReport,
)
from prunebench.pruners.training import (
    CurvePoint,
    Forecast,
    Forecasts,
    TrainingNeeds,
    TrainingReport,
)
from prunebench.sparsity import Sparsity

# Plug-ins import all of these from here.
__all__ = [
    "BEYOND_TARGET",
    "CurvePoint",
    "DependsOnModel",
    "Forecast",
    "Forecasts",
    "GroupPruner",
    "LayerEvent",
    "LayerPruner",
    "Needs",
    "PruneReport",
    "Pruned",
    "Pruner",
    "TrainingNeeds",
    "TrainingReport",
]


class GroupPruner(ABC):
    """A method that prunes the linears of one input at a time (q, k and v; gate and up)."""

    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Return the new weights of linears that read one input, in the order of the group.

        Args:
            group: The linears and their statistics; do not change the weights here.
            sparsity: The target of every linear, by name.
        """

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Walk the model block by block and replace every weight by the result of `prune_group`."""
        needs = self.needs
        # `closing`: an error in here must still undo what the walker has set on the model.
        with closing(walker.groups(stats=needs.calibration, hessian=needs.hessian)) as groups:
            for group in groups:
                notes = walker.notes[-1]  # of the current block
                if group.stats is not None and group.stats.tokens == 0:
                    notes += [
                        asdict(LayerEvent(linear.name, "no calibration token"))
                        for linear in group.linears
                    ]
                for linear, pruned in zip(
                    group.linears, self.prune_group(group, sparsity), strict=True
                ):
                    linear.write(pruned.weight)
                    notes += map(asdict, pruned.events)
                    if pruned.loss is not None:
                        notes.append({"layer": linear.name, "loss": pruned.loss})
                del group, pruned  # free this Hessian before the next group allocates its own
        return _report(walker.notes)


def _report(notes: Iterable[Iterable[Mapping[str, Any]]]) -> PruneReport:
    """Collect the events and the losses by layer from the notes of all blocks."""
    rows = [row for block in notes for row in block]
    events = [LayerEvent(**row) for row in rows if "kind" in row]
    return PruneReport(tuple(events), {row["layer"]: row["loss"] for row in rows if "loss" in row})


class LayerPruner(GroupPruner):
    """A method that prunes one matrix at a time, from its weight and input statistics."""

    @abstractmethod
    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return the new weight.

        Args:
            weight: float32, finite; must not be changed in place.
            stats: Statistics of the inputs; None if `needs.calibration` is False.
            sparsity: The target of this matrix.

        Returns:
            float32; zeros where pruned.
        """

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Prune the linears of the group one by one with `prune_weight`."""
        for linear in group.linears:
            weight = self.prune_weight(linear.read(), group.stats, sparsity[linear.name])
            yield Pruned(weight)
