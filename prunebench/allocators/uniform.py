"""The same ratio for every layer: the default of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunebench.allocators.allocation import Allocation
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs


@dataclass(frozen=True)
class Uniform:
    """Gives every layer the target ratio."""

    needs: ClassVar[Needs] = Needs()

    def check(self, target: float) -> None:
        """Accept any target."""

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Return the target for every layer."""
        return Allocation({linear.name: target for linear in walker.linears})
