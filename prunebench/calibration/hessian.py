"""Triangular factor of the inverse Hessian of a layer, as SparseGPT uses it.

H = (2 / n) X X^T is the Hessian of the layer's reconstruction error (Frantar and Alistarh,
https://arxiv.org/abs/2301.00774). With U upper triangular and inv(H) = U^T U, row j of U is the
update that pruning weight j causes in the weights after it, and U_jj^2 is the j-th diagonal entry
of the inverse of H restricted to {j, j+1, ...}.

The papers' code takes a Cholesky factor, inverts H with it, and factorizes the inverse. Here H is
factorized from its last column to its first, H = R R^T with R upper triangular, and U = inv(R):
half the work, and one rounding less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.stats import InputStats
from prunebench.errors import IncompatibleData

_DAMPING_STEP = 10.0
_MAX_RETRIES = 3


@dataclass(frozen=True)
class InverseFactor:
    """U with inv(H + damping * mean(diag H) * I) = U^T U.

    Attributes:
        upper: U, float32, upper triangular.
        dead: Inputs that were zero for every calibration token; their diagonal was set to 1.
        damping: The share of the mean diagonal that was added, after retries.
        retries: How often the damping was multiplied by ten.
    """

    upper: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float
    retries: int


def damped_hessian(
    stats: InputStats, *, damping: float
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, " in"]]:
    """Return the damped Hessian and the dead inputs, whose diagonal is set to 1 first."""
    hessian = stats.hessian()
    diagonal = hessian.diagonal()  # a view: what is written to it is written to H
    dead = diagonal == 0
    # In the order of SparseGPT's code: the ones of dead inputs count in the mean. They keep a row
    # of zeros from making H singular when nothing is damped.
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    return hessian, dead


def factorize(stats: InputStats, *, damping: float, name: str) -> InverseFactor:
    """Return the triangular factor of the inverse Hessian.

    Args:
        stats: Statistics with a Gram matrix.
        damping: Share of the mean diagonal that is added to the diagonal (SparseGPT: 0.01).
        name: The layer, for the error.

    Raises:
        IncompatibleData: H is singular, and stays so with a thousand times the damping.
    """
    tried = damping
    for retries in range(_MAX_RETRIES + 1):
        hessian, dead = damped_hessian(stats, damping=tried)
        # The Cholesky factor L of the flipped H, flipped back, is R of H = R R^T.
        flipped = hessian.flip(0, 1)  # [in, in]
        del hessian  # at most three such matrices at a time: BLOOM's widest takes 13 GB each
        # With J the reversal of rows and columns: J H J = L L^T, so H = (J L J)(J L J)^T = R R^T,
        # and inv(R) = J inv(L) J. cholesky_ex returns a failure, cholesky would raise.
        lower, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)  # inv(L)
            del lower, identity
            upper = inverse.flip(0, 1).contiguous()  # U = inv(R), [in, in]
            return InverseFactor(upper, dead, tried, retries)
        if retries < _MAX_RETRIES:
            # A damping of 0 times ten would stay 0.
            tried = max(tried, 1e-4) * _DAMPING_STEP
    raise IncompatibleData(
        f"the Hessian of {name} is singular",
        where=f"from {stats.tokens:,} calibration tokens, with damping up to {tried:g}",
        fix="use more --calibration-samples, or --set damping=VALUE",
    )
