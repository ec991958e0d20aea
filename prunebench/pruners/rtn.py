"""Round to nearest: every weight by itself, without data. The control of GPTQ.

What GPTQ's paper (https://arxiv.org/abs/2210.17323, section 5) compares with, on the same grids:
asymmetric ones, from minimum and maximum, of a row or of groups of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from prunebench.models.walker import LinearGroup
from prunebench.models.weight_grid import WeightGrid
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.protocol import BEYOND_TARGET, LayerEvent, Pruned
from prunebench.pruners.rounding import OnlyRounds, round_to_nearest
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class RoundToNearest(OnlyRounds, GroupPruner):
    """Rounds every weight to the nearest value of its grid.

    Attributes:
        quantize_bits: Bits of a code, 2 to 8.
        group_size: Consecutive weights of a row that share a grid; -1: the whole row.
        symmetric: Whether the grids are symmetric around 0, without a zero point.
    """

    name: ClassVar[str] = "rtn"
    quantize_bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        _ = self.grid  # refuses its values

    @property
    def grid(self) -> WeightGrid:
        """The form of the rounded weights."""
        return WeightGrid(self.quantize_bits, self.group_size, self.symmetric)

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Round the weights of every linear."""
        for linear in group.linears:
            weight = round_to_nearest(linear.read(), self.grid)
            zeros = int((weight == 0).count_nonzero())
            events = [LayerEvent(linear.name, BEYOND_TARGET, float(zeros))] if zeros else []
            yield Pruned(weight, events=tuple(events))
