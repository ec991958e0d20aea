"""Regional scores of a block's weights: by them the mask is chosen anew while the block is trained.

Paper: Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients",
https://arxiv.org/abs/2503.04992: S_ij = |W_ij| * (alpha * G_ij + ||X_j||_2), where G_ij is the root
mean square, over the calibration windows, of the gradient of ||f_l(x; W)||_2, the norm of the
block's output of a window. It needs no labels and no pass through the rest of the model.

What differs: the training between two masks is that of `block`, and the mask of the last epochs is
fixed; pruned weights begin at 0, as the method left them, not at their dense values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.stats import StatsAccumulator
from prunebench.models.linears import Linear
from prunebench.models.pruned_block import PrunedBlock
from prunebench.pruners.keep import keep_rows
from prunebench.recovery.masked_weights import MaskedWeights
from prunebench.sparsity import Sparsity

_ALPHA = 100.0  # the paper's weight of the gradient


class Refinement:
    """Chooses the masks of a block's matrices anew, by the scores of what they have become.

    The experts of a fused parameter have no inputs of their own here: their scores are those of the
    gradient alone.

    Args:
        pruned: The block.
        weights: Its masters.
        linears: The matrices; those that are not trained keep their mask.
        windows: Calibration windows; a forward and a backward pass of each.
    """

    def __init__(
        self,
        pruned: PrunedBlock,
        weights: MaskedWeights,
        linears: Sequence[Linear],
        windows: Sequence[int],
    ) -> None:
        self._weights = weights
        self._sparsity = pruned.sparsity
        squares = {name: torch.zeros_like(value) for name, value in weights.trained.items()}
        inputs: dict[Linear, StatsAccumulator] = {}
        with _watch_inputs(linears, inputs):
            for window in windows:
                call = pruned.call([window]).cast(torch.float32)
                with torch.enable_grad():
                    output = call.run(weights, pruned.inputs([window]).to(torch.float32))
                    torch.autograd.backward([output.to(torch.float32).norm()])
                for name, value in weights.trained.items():
                    if value.grad is not None:
                        squares[name] += value.grad.square()
                        value.grad = None
        self._scales: dict[Linear, Float[Tensor, "out in"]] = {}
        for linear in linears:
            master = weights.name_of(linear)
            if master is None:
                continue
            scale = _ALPHA * (weights.part(squares[master], linear) / len(windows)).sqrt()
            if linear in inputs:
                stats = inputs[linear].result(
                    samples=len(windows), width=linear.in_features, device=scale.device
                )
                scale = scale + stats.norms()  # [out, in] + [in]
            self._scales[linear] = scale

    def choose(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose all masks; pruned weights become 0, and their moments in the optimizer too."""
        for linear, scale in self._scales.items():
            keep = self._weights.keep_of(linear)
            weight = self._weights.matrix(linear)
            keep.copy_(keep_as_many(weight.abs() * scale, keep, self._sparsity[linear.name]))
            self._weights.prune(linear, optimizer)


@contextlib.contextmanager
def _watch_inputs(
    linears: Sequence[Linear], sums: dict[Linear, StatsAccumulator]
) -> Iterator[None]:
    """Collect the statistics of the inputs of each matrix that is a module of its own."""

    def hook(linear: Linear) -> torch.utils.hooks.RemovableHandle:
        sums[linear] = StatsAccumulator()
        return linear.module.register_forward_pre_hook(lambda _, args: sums[linear].add(args[0]))

    handles = [hook(linear) for linear in linears if linear.expert is None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_as_many(
    score: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], sparsity: Sparsity
) -> Bool[Tensor, "out in"]:
    """Return the keep mask of the largest scores, with as many zeros as another mask has.

    N:M keeps N of each group. Else each row keeps as many as it did: how the zeros are spread over
    the rows is the method's choice.

    Args:
        score: Of each weight.
        keep: The mask so far.
        sparsity: What the matrix was pruned to.
    """
    if sparsity.is_pattern:
        return keep_rows(score, sparsity)
    ranks = score.argsort(dim=1, stable=True).argsort(dim=1)  # 0 is the lowest of its row
    return ranks >= (~keep).sum(1, keepdim=True)
