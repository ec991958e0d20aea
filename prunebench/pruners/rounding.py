"""Rounding to a grid of 2^bits values: the grid of some columns, and the nearest values on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.errors import UsageError
from prunebench.models.source import CatalogEntry
from prunebench.models.weight_grid import WeightGrid
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue

_SMALLEST_STEP = 2.0**-24  # of float16; a group whose range needs a smaller one rounds to 0
_LARGEST_STEP = 65504.0


@dataclass(frozen=True)
class Grid:
    """One group of columns: 2^bits values per output, 0 among them, over the range of its weights.

    Attributes:
        step: Distance of two values, a float16 number as float32.
        zero: The code of 0, an integer as float32.
        largest: The largest code.
    """

    step: Float[Tensor, " out"]
    zero: Float[Tensor, " out"]
    largest: int

    @classmethod
    def of(cls, columns: Float[Tensor, "in out"], form: WeightGrid) -> Grid:
        """Compute the grid of every output from its weights, by their minimum and maximum."""
        largest = 2**form.bits - 1
        # The range always includes 0, so that a pruned weight is on the grid. [outputs]
        low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
        if form.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        step = (high - low) / largest
        # what is stored beside the codes has 16 bits: round with that, not with a finer one
        step = step.clamp(_SMALLEST_STEP, _LARGEST_STEP).half().float()
        if form.symmetric:
            return cls(step, torch.full_like(step, 2 ** (form.bits - 1)), largest)
        return cls(step, (-low / step).round().clamp(0, largest), largest)

    def round(self, values: Float[Tensor, "*columns out"]) -> Float[Tensor, "*columns out"]:
        """Round to the nearest value of the grid."""
        steps = (values / self.step).round_().add_(self.zero).clamp_(0, self.largest)
        return steps.sub_(self.zero).mul_(self.step)


def round_to_nearest(weight: Float[Tensor, "out in"], form: WeightGrid) -> Float[Tensor, "out in"]:
    """Round every weight by itself, without regard to the inputs."""
    rounded = torch.empty_like(weight)
    width = form.width(weight.shape[1])
    for start in range(0, weight.shape[1], width):
        columns = weight[:, start : start + width].T  # [width, out]
        rounded[:, start : start + width] = Grid.of(columns, form).round(columns).T
    return rounded


class OnlyRounds:
    """What methods share that round all weights and prune none; a dataclass of options, too.

    Attributes:
        name: Of the method, for messages.
    """

    name: ClassVar[str]

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> Any:
        """Return itself: no option depends on the model."""
        return self

    def options(self) -> dict[str, OptionValue]:
        """Return all options."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # a dataclass

    def check(self, sparsity: Sparsity) -> None:
        """Refuse to prune.

        Raises:
            UsageError: The sparsity is not 0.
        """
        if sparsity.ratio:
            raise UsageError(
                f"{self.name} does not prune",
                fix="leave --sparsity out; --method sparsegpt --set quantize_bits=4 does both",
            )
