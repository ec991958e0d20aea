"""Random pruning: the control that any method must beat.

The same comparison groups as Wanda (each output row, or each N:M group), with uniform random
scores from a seeded generator on the CPU, so the mask is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunebench.models.walker import BlockWalker
from prunebench.pruners.keep import keep_rows
from prunebench.pruners.protocol import Needs, PruneReport
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Random:
    """Prunes at random.

    Attributes:
        seed: Determines the mask, together with the order of the linears.
    """

    needs: ClassVar[Needs] = Needs()
    seed: int = 0

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Prune each row (or N:M group) of each matrix to its sparsity at random."""
        generator = torch.Generator().manual_seed(self.seed)
        with closing(walker.groups(stats=False)) as groups:
            for group in groups:
                for linear in group.linears:
                    weight = linear.read()
                    score = torch.rand(weight.shape, generator=generator)  # on the CPU, see above
                    keep = keep_rows(score, sparsity[linear.name]).to(weight.device)
                    linear.write(torch.where(keep, weight, 0))
        return PruneReport()
