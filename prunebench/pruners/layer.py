"""The contract of a pruner, and the base of nearly every one-shot method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.models.blocks import BlockWalker
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Needs:
    """What a method needs. `calibration`: token windows, from which input statistics are made."""

    calibration: bool = False


@dataclass(frozen=True)
class Event:
    """Something a method had to work around in one layer, for the result to show."""

    layer: str
    kind: str
    value: float | None = None


@dataclass(frozen=True)
class PruneReport:
    """What a method has to say of its work; no events means nothing unusual happened."""

    events: tuple[Event, ...] = ()


@runtime_checkable
class Pruner(Protocol):
    """Zeroes weights in place, block by block, until `sparsity` is met.

    An implementation is a frozen dataclass whose fields are its options.
    """

    needs: ClassVar[Needs]

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Prune every linear of `walker` to its sparsity, by name."""


class LayerPruner(ABC):
    """A method that decides about one matrix at a time, from its weight and input statistics."""

    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return the new weight.

        Args:
            weight: float32, finite; must not be changed in place.
            stats: Statistics of the inputs, or None for a method that needs none.
            sparsity: The target of this matrix.

        Returns:
            float32; zeros where pruned.
        """

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Walk the model and replace every weight by `prune_weight` of it."""
        events: list[Event] = []
        with closing(walker.groups(stats=self.needs.calibration)) as groups:
            for group in groups:
                if group.stats is not None and group.stats.tokens == 0:
                    events += [Event(one.name, "no calibration token") for one in group.linears]
                for linear in group.linears:
                    weight = linear.read()
                    linear.write(self.prune_weight(weight, group.stats, sparsity[linear.name]))
        return PruneReport(tuple(events))
