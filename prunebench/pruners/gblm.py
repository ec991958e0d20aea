"""GBLM-Pruner: Wanda's score with the gradient of the loss beside the norm of the inputs.

Paper: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
https://arxiv.org/abs/2311.04902: S_ij = |W_ij| * (||X_j||_2 + alpha * ||G_ij||_p), compared over
each output row. G is the gradient of the dense model's loss, one calibration window at a time.
Original code: https://github.com/VILA-Lab/GBLM-Pruner, read for its conventions.

`paper_compat` (the default) takes ||X_j|| as Wanda does, divided by the root of the number of
windows, and ||G_ij||_p as a sum over the windows, as the code and so the published figures do; off,
the gradients are averaged too, and alpha does not depend on the number of windows.

What differs from the code: gradients are float32 (theirs underflow in float16, without loss
scaling), in evaluation mode; counts are exact; N of N:M counts kept weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.models.gradients import Norm
from prunebench.models.walker import LinearGroup
from prunebench.pruners.keep import keep_rows
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.protocol import LayerEvent, Needs, Pruned
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class Gradient(GroupPruner):
    """Prunes each output row (or N:M group) by |W| * gradient norm alone.

    Attributes:
        norm: `l1` (the published figures) or `l2`, over the calibration windows.
    """

    norm: Norm = "l1"

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # it depends on an option
        """Gradients in the chosen norm."""
        return Needs(gradients=self.norm)

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Prune every linear of the group by its gradient norm."""
        assert group.gradients is not None
        for linear in group.linears:
            weight = linear.read()
            gradient = group.gradients.read(linear.name).to(weight.device)
            scale = self.scale(gradient, group.stats, group.gradients.samples)
            keep = keep_rows(weight.abs() * scale, sparsity[linear.name])
            # with statistics, the tokens are counted for the whole group
            unreached = group.stats is None and not gradient.any()
            events = (LayerEvent(linear.name, "no calibration token"),) if unreached else ()
            yield Pruned(torch.where(keep, weight, 0), events=events)

    def scale(
        self, gradient: Float[Tensor, "out in"], stats: InputStats | None, samples: int
    ) -> Float[Tensor, "out in"]:
        """Return the factor of |W| in the score; 1 for an expert that no token reached.

        Args:
            gradient: Gradient norm of every weight over the calibration windows.
            stats: Statistics of the inputs, if the method needs them.
            samples: Number of calibration windows.
        """
        # With all scores 0, ties would be pruned by position: use the magnitude.
        return gradient if gradient.any() else torch.ones_like(gradient)


@dataclass(frozen=True)
class Gblm(Gradient):
    """Prunes each output row (or N:M group) by |W| * (input norm + alpha * gradient norm).

    Attributes:
        alpha: Weight of the gradient.
        paper_compat: Whether gradients are summed over the windows, not averaged.
    """

    alpha: float = 100.0
    paper_compat: bool = True

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # it depends on an option
        """Input norms, and gradients in the chosen norm."""
        return Needs(calibration=True, gradients=self.norm)

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError("alpha must be at least 0")

    def scale(
        self, gradient: Float[Tensor, "out in"], stats: InputStats | None, samples: int
    ) -> Float[Tensor, "out in"]:
        """Return input norm + alpha * gradient norm."""
        assert stats is not None
        if not stats.tokens:
            return torch.ones_like(gradient)
        # The mean of |g| is the sum / n; the root mean square is the l2 norm / sqrt(n).
        by = samples if self.norm == "l1" else samples**0.5
        alpha = self.alpha if self.paper_compat else self.alpha / by
        return stats.norms() + alpha * gradient  # [in] + [out, in], arXiv 2311.04902
