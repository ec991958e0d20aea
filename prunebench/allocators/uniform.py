"""The same ratio for every layer: what every paper of a pruning method starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunebench.allocators.allocation import Allocation
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs


@dataclass(frozen=True)
class Uniform:
    """Gives every layer the target."""

    needs: ClassVar[Needs] = Needs()

    def check(self, target: float) -> None:
        """Accept any target."""

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Return the target for every layer."""
        return Allocation({one.name: target for one in walker.linears})
