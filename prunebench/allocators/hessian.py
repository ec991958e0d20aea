"""The layer-wise sparsity scheduler: ratios from estimated reconstruction errors, in clusters.

Paper: "Aggressive Post-Training Compression on Extremely Large Language Models",
https://arxiv.org/abs/2409.20094. Only its abstract and introduction were available; this is a
**reconstruction**. What they say: the pruning loss of every layer is estimated from its inverse
Hessian, the estimates are clustered on a logarithmic scale, and the clusters get ratios within
[0.6, 0.8]. What is mathematics: SparseGPT's loss is 1/2 sum w~^2 / U_jj^2 over the pruned weights,
w~ the weight when its column is reached and U the factor of the inverse Hessian, so with the dense
weight in its place

    estimate(s) = 1/2 * sum of the s smallest w_rj^2 / U_jj^2 in each block of 128 columns.

What is inferred, and an option each: the unit (`granularity`), the normalization (`normalize`), the
width of a cluster (`decades`), the rule from cluster to ratio (a power of the cluster's rank, found
so that the mean is exact).

`low` and `high` are the paper's range. Where it does not suit a model (in the paper OPT-6.7B, whose
scores have a short tail), `range=auto` chooses it from the scores, see `automatic_range`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.allocators.allocation import Allocation, bisect, require_range, shifted
from prunebench.calibration.hessian import factorize
from prunebench.models.linears import Linear
from prunebench.models.walker import BlockWalker
from prunebench.pruners.protocol import Needs

_COLUMNS = 128  # SparseGPT's block
_HALF_WIDTH = 0.1  # of the paper's range
_SHORT_TAIL, _LONG_TAIL = 0.5, 1.0  # decades between the quartiles of the scores
_HIGHEST = 0.99


@dataclass(frozen=True)
class Hessian:
    """Prunes layers with a large estimated error less.

    Attributes:
        estimator: `sorted` as above; `mean_field` takes the ratio times all of w^2 / U_jj^2;
            `prune_all` the exact loss of pruning everything, 1/2 tr(W H W^T).
        granularity: Whether a module or a whole block gets one ratio.
        normalize: The error per weight (`per_parameter`), as it is (`sum`), or relative to
            1/2 tr(W H W^T) (`relative`).
        decades: Width of a cluster in powers of ten.
        range: `fixed` uses low and high; `auto` finds them.
        low: Least ratio.
        high: Largest ratio.
        damping: As in SparseGPT.
    """

    needs: ClassVar[Needs] = Needs(calibration=True, hessian=True)
    estimator: Literal["sorted", "mean_field", "prune_all"] = "sorted"
    granularity: Literal["module", "block"] = "module"
    normalize: Literal["per_parameter", "sum", "relative"] = "per_parameter"
    decades: float = 1.0
    range: Literal["fixed", "auto"] = "fixed"
    low: float = 0.6
    high: float = 0.8
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.decades <= 0:
            raise ValueError("decades must be above 0")

    def check(self, target: float) -> None:
        """Refuse a fixed range that cannot reach the target."""
        if self.range == "fixed":
            require_range(self.low, self.high, target)

    def allocate(self, walker: BlockWalker, target: float) -> Allocation:
        """Estimate every layer's error at the target, cluster, and spread the ratios."""
        self.check(target)
        errors: dict[str, LayerError] = {}
        for group in walker.survey(hessian=True):
            assert group.stats is not None
            if group.stats.tokens == 0:  # experts that no token reached: lowest cluster
                errors |= {linear.name: LayerError(0.0, 0.0, 0.0) for linear in group.linears}
                continue
            factor = factorize(group.stats, damping=self.damping, name=group.linears[0].name)
            for linear in group.linears:
                errors[linear.name] = layer_error(linear.read(), factor.upper, target)
            # The next group's Hessian is allocated before these names are bound again.
            del group, factor
        scores = self._scores(errors, walker.linears)
        clusters = log_clusters(scores, decades=self.decades)
        low, high = self.low, self.high
        if self.range == "auto":
            low, high = automatic_range(scores, target)
        sizes = {linear.name: linear.size for linear in walker.linears}
        ratios = spread(clusters, sizes, target=target, low=low, high=high)
        estimates = {name: self._estimate(error) for name, error in errors.items()}
        facts = {"low": low, "high": high, "clusters": float(max(clusters.values()) + 1)}
        return Allocation(ratios, estimates, facts)

    def _estimate(self, error: LayerError) -> float:
        return {
            "sorted": error.sorted,
            "mean_field": error.mean_field,
            "prune_all": error.prune_all,
        }[self.estimator]

    def _scores(self, errors: Mapping[str, LayerError], linears: list[Linear]) -> dict[str, float]:
        """Return the figure of each layer by which it is clustered."""
        unit = {
            linear.name: linear.name if self.granularity == "module" else str(linear.block_index)
            for linear in linears
        }
        total: dict[str, float] = {}
        weight: dict[str, float] = {}
        for linear in linears:
            error, key = errors[linear.name], unit[linear.name]
            total[key] = total.get(key, 0.0) + self._estimate(error)
            by = {"per_parameter": float(linear.size), "sum": 0.0, "relative": error.prune_all}
            # `sum` has the weight 0: the division below is then by 1.
            weight[key] = weight.get(key, 0.0) + by[self.normalize]
        return {name: total[key] / (weight[key] or 1.0) for name, key in unit.items()}


@dataclass(frozen=True)
class LayerError:
    """Estimates of the reconstruction error of one layer, see `Hessian.estimator`."""

    sorted: float
    mean_field: float
    prune_all: float


def layer_error(
    weight: Float[Tensor, "out in"], upper: Float[Tensor, "in in"], ratio: float
) -> LayerError:
    """Estimate the reconstruction error of pruning a layer to `ratio`, without pruning it.

    Args:
        weight: The dense weight.
        upper: U, the factor of the inverse Hessian; H = inv(U) inv(U)^T.
        ratio: Share of weights to prune.
    """
    # The loss of each weight; SparseGPT has the updated w here, which is not known before it runs.
    losses = (weight / upper.diagonal()).square()  # [out, in]
    least = 0.0
    for start in range(0, weight.shape[1], _COLUMNS):
        block = losses[:, start : start + _COLUMNS].flatten()  # [out * columns]
        count = math.floor(ratio * block.numel())
        # All rows of the block compete, as in SparseGPT's mask.
        ordered = block.sort().values if count else block
        least += float(ordered[:count].sum(dtype=torch.float64))
    # tr(W H W^T) is the squared norm of W inv(U), as H = inv(U) inv(U)^T: no Hessian is needed
    # here.
    root = torch.linalg.solve_triangular(upper, weight, upper=True, left=False)  # W inv(U)
    return LayerError(
        sorted=least / 2,
        mean_field=ratio * float(losses.sum(dtype=torch.float64)) / 2,
        prune_all=float(root.square().sum(dtype=torch.float64)) / 2,
    )


def log_clusters(scores: Mapping[str, float], *, decades: float) -> dict[str, int]:
    """Return the cluster of each score: 0 for the least, one more for every `decades` above it.

    A score of 0 (a layer that no token reached) belongs to the lowest cluster.
    """
    positive = [score for score in scores.values() if score > 0]
    least = math.log10(min(positive)) if positive else 0.0
    return {
        name: math.floor((math.log10(score) - least) / decades + 1e-9) if score > 0 else 0
        for name, score in scores.items()
    }


def automatic_range(scores: Mapping[str, float], target: float) -> tuple[float, float]:
    """Return a range around the target whose width depends on the spread of the scores.

    The paper's 0.1 on either side is for scores that differ by powers of ten. The width grows
    linearly with the distance of the quartiles of log10(score): 0 up to half a decade, the paper's
    from a decade on. Why 0 and not a small width: a layer's error ignores the effect of the later
    layers, which may change it by more than a factor of three (half a decade). Why quartiles and
    not extremes: a few layers with hardly any error (often those of the first block) do not say how
    the others should differ.
    """
    logs = sorted(math.log10(score) for score in scores.values() if score > 0)
    if len(logs) < 2:
        return target, target
    lower, _, upper = statistics.quantiles(logs, n=4, method="inclusive")
    # 0 for a short tail, 1 for a long one, linear between
    opening = (upper - lower - _SHORT_TAIL) / (_LONG_TAIL - _SHORT_TAIL)
    half = _HALF_WIDTH * min(1.0, max(0.0, opening))
    return max(0.0, target - half), min(max(target, _HIGHEST), target + half)


def spread(
    clusters: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    target: float,
    low: float,
    high: float,
) -> dict[str, float]:
    """Give the clusters ratios from `high` (cluster 0) to `low` (the last), with an exact mean.

    The ratio is high - (high - low) * t^gamma, t = cluster / last cluster, with the gamma
    that gives the mean. Where no gamma does, the ratios for the nearest gamma are shifted.

    Raises:
        UsageError: The range cannot reach the mean.
    """
    require_range(low, high, target)
    top = max(clusters.values())
    # One cluster: nothing to tell the layers apart by.
    if top == 0:
        return dict.fromkeys(clusters, target)
    total = sum(sizes.values())

    def at(log_gamma: float) -> dict[str, float]:
        # The search is over log gamma: gamma is positive, and useful on both sides of 1.
        gamma = math.exp(log_gamma)
        return {name: high - (high - low) * (c / top) ** gamma for name, c in clusters.items()}

    def mean(log_gamma: float) -> float:
        return math.fsum(ratio * sizes[name] for name, ratio in at(log_gamma).items()) / total

    ratios = at(bisect(mean, target, -8.0, 8.0))
    return shifted(ratios, sizes, target=target, low=low, high=high)
