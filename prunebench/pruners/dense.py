"""No pruning: the baseline that every method is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs, PruneReport
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Dense:
    """Leaves every weight as it is."""

    needs: ClassVar[Needs] = Needs()

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Return an empty report; no weight is changed."""
        return PruneReport()
