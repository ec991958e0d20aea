"""Round to nearest: every weight by itself, without data. The control of GPTQ.

What GPTQ's paper (https://arxiv.org/abs/2210.17323, section 5) compares with, on the same grids:
asymmetric ones, from minimum and maximum, of a row or of groups of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from prunebench.errors import UsageError
from prunebench.models.source import CatalogEntry
from prunebench.models.walker import LinearGroup
from prunebench.models.weight_grid import WeightGrid
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.protocol import BEYOND_TARGET, LayerEvent, Pruned
from prunebench.pruners.rounding import round_to_nearest
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue


@dataclass(frozen=True)
class RoundToNearest(GroupPruner):
    """Rounds every weight to the nearest value of its grid.

    Attributes:
        quantize_bits: Bits of a code, 2 to 8.
        group_size: Consecutive weights of a row that share a grid; -1: the whole row.
        symmetric: Whether the grids are symmetric around 0, without a zero point.
    """

    quantize_bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: A value is out of range.
        """
        if not 2 <= self.quantize_bits <= 8:
            raise ValueError("quantize_bits must be in 2..8")
        if self.group_size != -1 and self.group_size < 2:
            raise ValueError("group_size must be at least 2, or -1 for whole rows")

    @property
    def grid(self) -> WeightGrid:
        """The form of the rounded weights."""
        return WeightGrid(self.quantize_bits, self.group_size, self.symmetric)

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> RoundToNearest:
        """Return itself: no option depends on the model."""
        return self

    def options(self) -> dict[str, OptionValue]:
        """Return all options."""
        return asdict(self)

    def check(self, sparsity: Sparsity) -> None:
        """Refuse to prune.

        Raises:
            UsageError: The sparsity is not 0.
        """
        if sparsity.ratio:
            raise UsageError("rtn does not prune", fix="leave --sparsity out")

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Round the weights of every linear."""
        for linear in group.linears:
            weight = round_to_nearest(linear.read(), self.grid)
            zeros = int((weight == 0).sum())
            events = [LayerEvent(linear.name, BEYOND_TARGET, float(zeros))] if zeros else []
            yield Pruned(weight, events=tuple(events))
