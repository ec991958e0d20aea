"""The relaxed mask of one layer and the gradient of its logits, in chunks that fit the cache.

With logits z (choices, groups), candidates S (choices, M), Gumbel noise g, temperature tau and
scale kappa (arXiv 2409.17481, section 3):

    y = softmax((kappa z + noise g) / tau)         the relaxed choice
    m = S^T y                                      the mask, in [0, 1]
    W~ = W * m                                     the weight in the forward pass

and with G = dL/dW~ and the reward lambda sum |W~|^2 for large kept weights:

    h = G * W - 2 lambda W^2 * m + c/2 C * W^2 * (1 - 2 m)
    s = S h,   dL/dz = kappa / tau * y * (s - <y, s>)

The last term of h is ours, and 0 in the paper: the hard mask p adds or removes whole weights.
Beyond the first order that costs c/2 C W^2 (p - m)^2, C the curvature of the loss along that
weight. As p is 0 or 1, this is linear in p.

No tensor of the size of the logits is allocated beside the logits and the moments. The choices are
the first dimension, so that a softmax over six values is six long vector operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from prunebench.pruners.maskllm.moments import PackedMoments
from prunebench.pruners.maskllm.noise import gumbel

_CHUNK_LOGITS = 3 << 17  # logits at a time: they and their temporaries stay in cache
_DEVICE_LOGITS = 3 << 22  # on a GPU, where every chunk costs dozens of kernel launches


@dataclass(frozen=True)
class Relaxation:
    """The parameters of the relaxation in one draw of one step.

    Attributes:
        seed, step: Key of the noise.
        temperature: tau.
        scale: kappa.
        noise: Factor of the Gumbel noise; 0 is the mean field, which needs no samples.
        reward: lambda.
        curvature: c.
    """

    seed: int
    step: int
    temperature: float
    scale: float
    noise: float = 1.0
    reward: float = 0.0
    curvature: float = 0.0


@dataclass(frozen=True)
class WeightGradient:
    """The gradient, and the factors of the curvature, of the masked weight of some rows.

    Attributes:
        gradient: G = dL/dW~.
        rows, columns: Factors of the curvature C of the loss along each weight: the sums over the
            tokens of the squared gradients of the layer's outputs, and of its squared inputs (the
            diagonal of the empirical Fisher matrix, factored).
    """

    gradient: Float[Tensor, "out in"]
    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]


@dataclass
class LayerLogits:
    """The logits of one layer, or of some of its rows, and their optimizer state.

    Attributes:
        index: Index of the layer in the model, a key of the noise.
        logits: [choices, groups]; groups are consecutive inputs, row by row.
        table: The candidates S, [choices, M].
        width: Groups in a row; chunks are whole rows.
        first: Index of the first group in the whole layer, so that the noise of a group does not
            depend on the process that owns it.
        state: Moments of the optimizer, [choices, groups].
    """

    index: int
    logits: Float[Tensor, "choices groups"]
    table: Float[Tensor, "choices group"]
    width: int
    first: int = 0
    state: dict[str, PackedMoments] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of the layer that these logits cover."""
        return self.logits.shape[1] // self.width

    @functools.cached_property
    def pattern(self) -> int:
        """The candidates as one integer: bit k * M + j is set if candidate k keeps weight j."""
        bits = (self.table > 0).flatten().tolist()
        return sum(1 << place for place, bit in enumerate(bits) if bit)

    def chunks(self) -> Iterator[slice]:
        """Return slices of groups, each of whole rows."""
        choices, total = self.logits.shape
        most = _CHUNK_LOGITS if self.logits.device.type == "cpu" else _DEVICE_LOGITS
        # Whole rows: the factor `rows` of the curvature and 8-bit scales belong to a row.
        size = max(1, most // choices // self.width) * self.width
        return (slice(start, min(start + size, total)) for start in range(0, total, size))

    def probabilities(self, part: slice, relaxation: Relaxation) -> Float[Tensor, "choices part"]:
        """Return y of some groups, float32."""
        # kappa scales the logits alone: the larger it is, the less the noise decides.
        scaled = self.logits[:, part].to(torch.float32) * relaxation.scale
        if relaxation.noise:
            groups = torch.arange(
                self.first + part.start, self.first + part.stop, device=scaled.device
            )
            drawn = gumbel(  # [choices, part]
                groups, len(scaled), seed=relaxation.seed, step=relaxation.step, layer=self.index
            )
            scaled.add_(drawn, alpha=relaxation.noise)
        # The maximum is subtracted before tau divides: at tau = 0.05, exp() would overflow without
        # it.
        scaled.sub_(scaled.amax(0)).div_(relaxation.temperature).exp_()
        return scaled.div_(scaled.sum(0))  # [choices, part] / [part]

    def soften(
        self, weight: Float[Tensor, "out in"], relaxation: Relaxation, out: Float[Tensor, "out in"]
    ) -> None:
        """Write W~ = W * m into `out`, which may be of another dtype.

        In plain PyTorch; `dispatch.soften` uses a kernel where there is one.
        """
        group = self.table.shape[1]
        flat, target = weight.reshape(-1, group), out.view(-1, group)  # [groups, M]
        for part in self.chunks():
            # m = S^T y: every position's total probability of being kept; a group sums to N.
            mask = self.table.T @ self.probabilities(part, relaxation)  # [M, part]
            torch.mul(flat[part], mask.T.to(flat.dtype), out=target[part])  # [part, M]

    def scores(
        self, weight: Float[Tensor, "out in"], slope: WeightGradient, relaxation: Relaxation
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield for each chunk its slice, y and s, both [choices, part].

        Args:
            weight: W.
            slope: dL/dW~.
            relaxation: That of the forward pass.
        """
        group = self.table.shape[1]
        flat, slopes = weight.reshape(-1, group), slope.gradient.view(-1, group)  # [groups, M]
        for part in self.chunks():
            # Made again from the same counters as in the forward pass, not stored: see `noise`.
            chosen = self.probabilities(part, relaxation)
            w = flat[part].T.to(torch.float32)  # [M, part]
            h = slopes[part].T * w  # [M, part]
            if relaxation.reward or relaxation.curvature:
                mask, squares = self.table.T @ chosen, w.square()  # [M, part]
                # d/dm of -lambda (W m)^2: large weights that are kept lower the loss (arXiv
                # 2409.17481, section 3.4).
                h -= (2 * relaxation.reward) * squares * mask
                rows = slice(part.start // self.width, part.stop // self.width)
                curved = slope.rows[rows, None] * slope.columns  # C: [rows, in]
                curved = curved.view(-1, group).T * squares  # C * W^2: [M, part]
                h += curved.mul_(mask.mul_(-2).add_(1)).mul_(relaxation.curvature / 2)
            yield part, chosen, self.table @ h  # s: [choices, part]

    def certainty(self, relaxation: Relaxation) -> float:
        """Return the sum over the groups of the largest probability, without noise."""
        noiseless = replace(relaxation, noise=0.0)
        return math.fsum(
            float(self.probabilities(part, noiseless).amax(0).sum()) for part in self.chunks()
        )

    def choices(self) -> Integer[Tensor, " groups"]:
        """Return the most probable candidate of every group, uint8."""
        # Without noise: kappa and tau do not change the order.
        return self.logits.argmax(0).to(torch.uint8)


def slope_of_logits(
    chosen: Float[Tensor, "choices part"],
    scores: Float[Tensor, "choices part"],
    relaxation: Relaxation,
) -> Float[Tensor, "choices part"]:
    """Return dL/dz = kappa / tau * y * (s - <y, s>); `scores` is overwritten."""
    scores -= (chosen * scores).sum(0)  # [part]: the mean of s under y
    return scores.mul_(chosen).mul_(relaxation.scale / relaxation.temperature)
