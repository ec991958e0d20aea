"""Ratios from the divergence of the model's output when each group of linears is pruned alone.

A layer's reconstruction error ignores the effect of the later layers. Here each group of linears
with one input (q, k and v; o; gate and up; down) is pruned alone by SparseGPT at the target, in the
dense model, and the divergence of the next-token distribution is measured on a few calibration
windows:

    D_g = mean over tokens of KL(dense || pruned).

To second order D_g is quadratic in the change of the weights, so at another ratio it is taken to
grow as the group's estimated reconstruction error E_g does (`allocators.hessian`): D_g(s) =
D_g * E_g(s) / E_g(target). The ratios minimize the sum of all D_g(s_g) at the given mean: at the
optimum the marginal cost of one more weight is the same in every group.

No paper: the criterion is the usual sensitivity analysis of quantization, with the curve between
two ratios taken from the inverse Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunebench.allocators.allocation import Allocation, bisect, shifted
from prunebench.calibration.hessian import factorize
from prunebench.models.replay import TrueRun, resume, run_model
from prunebench.models.walker import BlockWalker, LinearGroup
from prunebench.pruners.protocol import Needs
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.sparsity import Sparsity

_STEPS = 64  # points of a curve between the least and the largest ratio
_ROWS = 128  # tokens whose distributions are compared at a time
_HIGHEST = 0.99


@dataclass(frozen=True)
class Sensitivity:
    """Prunes groups with little effect on the output more.

    Attributes:
        windows: Calibration windows on which the divergence is measured.
        width: Maximum distance of a ratio from the target.
        damping: As in SparseGPT.
    """

    needs: ClassVar[Needs] = Needs(calibration=True, hessian=True, whole_model=True)
    windows: int = 2
    width: float = 0.15
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.windows < 1 or not 0 <= self.width < 1:
            raise ValueError("windows must be at least 1, and width in [0, 1)")

    def check(self, target: float) -> None:
        """Accept any target."""

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Prune every group alone, measure, restore it, and balance the groups."""
        low, high = max(0.0, target - self.width), min(max(_HIGHEST, target), target + self.width)
        output = _Output(walker, self.windows)
        pruner = SparseGPT(damping=self.damping)
        curves: list[_Curve] = []
        # `joint` collects all statistics of a block before its first group is pruned.
        groups = walker.groups(stats=True, hessian=True, within_block="joint")
        with closing(groups):
            for group in groups:
                assert group.stats is not None
                weights = [linear.read() for linear in group.linears]
                if group.stats.tokens:
                    name = group.linears[0].name
                    upper = factorize(group.stats, damping=self.damping, name=name).upper
                else:  # experts that no token reached: by magnitude, with divergence 0
                    # U = I: the score is |w|.
                    upper = torch.eye(weights[0].shape[1], device=weights[0].device)
                slopes = loss_slopes(weights, upper, low, high, target)
                divergence = self._divergence(pruner, group, target, output)
                names = tuple(linear.name for linear in group.linears)
                size = sum(linear.size for linear in group.linears)
                curves.append(_Curve(names, size, divergence, slopes))
                del group, weights, upper
        ratios = balanced(curves, target, low, high)
        sizes = {linear.name: linear.size for linear in walker.linears}
        estimates = {name: curve.divergence for curve in curves for name in curve.names}
        exact = shifted(ratios, sizes, target=target, low=low, high=high)
        return Allocation(exact, estimates)

    def _divergence(
        self, pruner: SparseGPT, group: LinearGroup, target: float, output: _Output
    ) -> float:
        """Return D_g; the group's weights are restored."""
        # The stored dtype, so that the restored weights are bit for bit the same.
        dense = [linear.stored.clone() for linear in group.linears]
        sparsity = {linear.name: Sparsity(target) for linear in group.linears}
        try:
            for linear, new in zip(group.linears, pruner.prune_group(group, sparsity), strict=True):
                linear.write(new.weight)
            return output.divergence(group.linears[0].block_index)
        finally:
            for linear, weight in zip(group.linears, dense, strict=True):
                linear.stored.copy_(weight)


@dataclass(frozen=True)
class _Curve:
    """A group of linears.

    Attributes:
        names: Of its linears.
        size: Number of weights.
        divergence: D_g at the target.
        slopes: E'(s) / E(target) on the grid of ratios, see `loss_slopes`.
    """

    names: tuple[str, ...]
    size: int
    divergence: float
    slopes: np.ndarray


class _Output:
    """The dense model's next-token distributions on a few windows."""

    def __init__(self, walker: BlockWalker, windows: int) -> None:
        self.model: nn.Module = walker.model
        self.blocks = walker.blocks
        self.token_ids: Int[Tensor, "windows seqlen"] = walker.first_windows(windows)
        self.runs: list[TrueRun] = []
        self.dense: list[Float[Tensor, "seqlen vocabulary"]] = []
        for window in torch.split(self.token_ids, 1):
            run = run_model(self.model, self.blocks, window, to_end=not self.runs)
            self.runs.append(run)
            self.dense.append(self._log_probabilities(window, run, len(self.blocks) - 1))

    def divergence(self, index: int) -> float:
        """Return the mean KL(dense || now) over the tokens, run from block `index` on."""
        total = 0.0
        for window, run, dense in zip(
            torch.split(self.token_ids, 1), self.runs, self.dense, strict=True
        ):
            now = self._log_probabilities(window, run, index)
            # In rows: for all tokens at once, the temporaries of kl_div would be [seqlen,
            # vocabulary].
            for start in range(0, len(dense), _ROWS):
                rows = slice(start, start + _ROWS)
                kl = nn.functional.kl_div(now[rows], dense[rows], log_target=True, reduction="sum")
                total += float(kl)
        return total / self.token_ids.numel()

    def _log_probabilities(self, window: Tensor, run: TrueRun, index: int) -> Tensor:
        # [seqlen, vocabulary]; earlier blocks are unchanged and not run again
        logits = resume(self.model, self.blocks, window, index=index, run=run)[0]
        return logits.to(torch.float32).log_softmax(-1)


def loss_slopes(
    weights: Sequence[Tensor], upper: Tensor, low: float, high: float, target: float
) -> np.ndarray:
    """Return the derivative of the estimated error by the ratio, over the error at the target.

    The estimate is that of `allocators.hessian`, over all weights of the group at once.

    Returns:
        E'(s) / E(target) at `_STEPS` ratios from `low` to `high`; rising.
    """
    # E(s) sums the smallest s * count losses, so E'(s) is count times the next one.
    losses = torch.cat([(weight / upper.diagonal()).square().flatten() for weight in weights])
    ordered = losses.cpu().sort().values.to(torch.float64)  # [weights of the group]
    count = len(ordered)
    at_target = float(ordered[: max(1, math.floor(target * count))].sum())
    # [steps], indices of those next losses
    places = np.clip((np.linspace(low, high, _STEPS) * count).astype(int), 0, count - 1)
    slopes: np.ndarray = ordered[torch.from_numpy(places)].numpy() * count / (at_target or 1.0)
    return slopes


def balanced(
    curves: Sequence[_Curve], target: float, low: float, high: float
) -> Mapping[str, float]:
    """Return the ratios in [low, high] that minimize sum_g D_g(s_g), with mean `target`.

    At the minimum D_g'(s_g) / size_g (the price of a weight) is the same for all groups within the
    bounds; the price is found by bisection, in logarithms.
    """
    grid = np.linspace(low, high, _STEPS)
    prices = [
        # The floor keeps log() finite where the divergence or a loss is 0.
        np.log(np.maximum(curve.divergence * curve.slopes / curve.size, 1e-300))
        for curve in curves
    ]
    total = sum(curve.size for curve in curves)

    def at(price: float) -> list[float]:
        # Inverse of a rising curve: swap its axes. interp clamps to [low, high] outside.
        return [float(np.interp(price, curve_prices, grid)) for curve_prices in prices]

    def mean(price: float) -> float:
        return math.fsum(s * c.size for s, c in zip(at(price), curves, strict=True)) / total

    price = bisect(mean, target, float(np.min(prices)), float(np.max(prices)))
    return {
        name: ratio for curve, ratio in zip(curves, at(price), strict=True) for name in curve.names
    }
