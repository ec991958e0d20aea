"""ALPS and ADMM-Grad: the layer's reconstruction problem with a sparsity constraint, by ADMM.

ALPS: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models", https://arxiv.org/abs/2406.07831. ADMM-Grad: Boza, "Fast and Effective Weight
Update for Pruned Large Language Models", https://arxiv.org/abs/2401.02938. Their code was read for
what the papers leave open (schedules, tolerances).

Both minimize tr((B - B0) A (B - B0)^T) over sparse B, in a space where the Hessian has a unit
diagonal: A = H / (d d^T) with d = sqrt(diag H), B0 = W * d, and W = B / d at the end. ADMM splits B
from a sparse copy D, with V the dual variable and P the projection that keeps the largest entries:

    B = (B0 A - V + rho D) inv(A + rho I);   D = P(B + V / rho);   V += rho (B - D)

- ALPS raises rho as the support settles, then fixes the support and solves for the weights on it
  with conjugate gradients.
- ADMM-Grad has rho = 1, more damping, 20 steps, and no final solve.

What differs from the code: the support has an exact count, ties by position; the linears of one
input share the Hessian and its eigenvectors; ADMM-Grad has no ramp of the sparsity (nor has the
default path of the authors' code).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.hessian import damped_hessian
from prunebench.calibration.stats import InputStats
from prunebench.models.measure import count_sparser_groups
from prunebench.models.walker import LinearGroup
from prunebench.pruners.keep import keep_matrix, keep_rows
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.magnitude import smallest_dropped
from prunebench.pruners.protocol import LayerEvent, Needs, Pruned
from prunebench.sparsity import Sparsity

# The penalty schedule of ALPS, as in the authors' code. `changed` is the number of positions that
# entered or left the support since the last check, k the number of kept weights.
_CHECK_EVERY = 3  # steps
_LARGEST_RHO = 1e6
_MANY_CHANGES, _SOME_CHANGES = 0.1, 0.005  # shares of k
_MANY_GROWTH, _SOME_GROWTH, _FEW_GROWTH = 1.3, 1.2, 1.1  # of rho
_BACK_OFF = 5  # divides rho while the support has not yet moved
_STEADY_STEPS, _STEADY_CHANGES = 30, 3e-4  # stop from this step on below this share of k


class _Reconstruction(GroupPruner):
    """Sets up the scaled reconstruction problem and solves it for every linear of a group."""

    needs: ClassVar[Needs] = Needs(calibration=True, hessian=True)

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Solve the linears one by one; they share the Hessian and eigenvectors of their input."""
        stats = group.stats
        assert stats is not None
        if stats.tokens == 0:  # an expert that no calibration token reached: magnitude
            for linear in group.linears:
                yield Pruned(smallest_dropped(linear.read(), sparsity[linear.name]))
            return
        problem, dead = self.problem(stats)
        for linear in group.linears:
            weight, target = linear.read(), sparsity[linear.name]
            events = []
            if dead:
                events.append(LayerEvent(linear.name, "dead inputs", float(dead)))
            if target.ratio == 0:
                yield Pruned(weight, 0.0, tuple(events))
                continue
            dense = weight * problem.scale  # B0 = W * d
            sparse = self.solve(problem, dense, target)
            loss = problem.loss(sparse, dense)
            pruned = sparse / problem.scale  # W = B / d
            sparser = count_sparser_groups(pruned, target)
            if sparser:
                events.append(
                    LayerEvent(linear.name, "groups with fewer non-zeros than N", float(sparser))
                )
            yield Pruned(pruned, loss, tuple(events))

    @abstractmethod
    def problem(self, stats: InputStats) -> tuple[Problem, int]:
        """Return the scaled and damped problem of one input, and the number of dead inputs."""

    @abstractmethod
    def solve(
        self, problem: Problem, dense: Float[Tensor, "out in"], sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return the sparse weight in the scaled space.

        Args:
            problem: The scaled Hessian.
            dense: B0, the scaled dense weight.
            sparsity: The target.
        """


@dataclass(frozen=True)
class Problem:
    """The scaled Hessian of one input.

    Attributes:
        matrix: A, symmetric, with its damping, float32.
        scale: d, the root of the Hessian's diagonal.
        values: Eigenvalues of A.
        vectors: Eigenvectors of A, in columns.
    """

    matrix: Float[Tensor, "in in"]
    scale: Float[Tensor, " in"]
    values: Float[Tensor, " in"]
    vectors: Float[Tensor, "in in"]

    @classmethod
    def of(cls, hessian: Float[Tensor, "in in"], *, shift: float = 0.0) -> Problem:
        """Scale a Hessian to a unit diagonal, add `shift` to it, and decompose it, in float64."""
        scale = hessian.diagonal().sqrt()
        matrix = hessian / torch.outer(scale, scale)  # [in, in], diagonal 1
        matrix.diagonal().add_(shift)
        # float64: ADMM divides by small eigenvalues + rho, and rho starts at 0.1
        # Decomposed once: every new rho then costs one product, not a factorization.
        values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
        return cls(matrix, scale, values.to(torch.float32), vectors.to(torch.float32))

    def inverse(self, shift: float) -> Float[Tensor, "in in"]:
        """Return inv(A + shift I)."""
        # Q diag(1 / (L + shift)) Q^T: dividing the columns of Q is the diagonal factor.
        return (self.vectors / (self.values + shift)) @ self.vectors.T

    def loss(self, sparse: Float[Tensor, "out in"], dense: Float[Tensor, "out in"]) -> float:
        """Return the reconstruction error 1/2 tr(D H D^T)."""
        change = sparse - dense
        return 0.5 * float(((change @ self.matrix) * change).sum(dtype=torch.float64))


def largest(values: Float[Tensor, "out in"], sparsity: Sparsity) -> Bool[Tensor, "out in"]:
    """Return where the largest magnitudes are: of the whole matrix, or of each N:M group."""
    size = values.abs()
    return keep_rows(size, sparsity) if sparsity.is_pattern else keep_matrix(size, sparsity)


@dataclass(frozen=True)
class Alps(_Reconstruction):
    """Prunes by ADMM with a rising penalty, then solves for the weights on the support.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        rho: Initial penalty.
        steps: Maximum number of ADMM steps.
        solver_steps: Steps of the conjugate gradients on the final support.
    """

    damping: float = 0.01
    rho: float = 0.1
    steps: int = 300
    solver_steps: int = 10

    def __post_init__(self) -> None:
        if not self.damping >= 0 or not self.rho > 0 or self.steps < 1 or self.solver_steps < 0:
            raise ValueError("damping >= 0, rho > 0, steps >= 1 and solver_steps >= 0 are needed")

    def problem(self, stats: InputStats) -> tuple[Problem, int]:
        """Return the problem with the damping of SparseGPT, before it is scaled."""
        hessian, dead = damped_hessian(stats, damping=self.damping)
        return Problem.of(hessian), int(dead.sum())

    def solve(
        self, problem: Problem, dense: Float[Tensor, "out in"], sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Find a support by ADMM, then the best weights on it by conjugate gradients."""
        start = self._split(problem, dense, sparsity)
        return refine(problem, dense, start, largest(start, sparsity), steps=self.solver_steps)

    def _split(self, problem: Problem, dense: Tensor, sparsity: Sparsity) -> Tensor:
        """Return B after the last step of ADMM."""
        keep = largest(dense, sparsity)
        count = int(keep.sum())  # k
        image = dense @ problem.matrix  # B0 A
        sparse = torch.where(keep, dense, 0)
        dual = torch.zeros_like(dense)
        rho, moved, last = self.rho, False, keep
        inverse = problem.inverse(rho)
        for step in range(1, self.steps + 1):
            # The order matters: D needs the new B, and V the new B and D.
            free = torch.sub(image, dual).add_(sparse, alpha=rho) @ inverse  # B
            total = free + dual / rho  # [out, in]
            keep = largest(total, sparsity)
            sparse = torch.where(keep, total, 0)  # D = P(B + V / rho)
            dual.add_(free, alpha=rho).sub_(sparse, alpha=rho)  # V += rho (B - D)
            if step % _CHECK_EVERY:
                continue
            # int() waits for the GPU: once in `_CHECK_EVERY` steps, not in each.
            changed = int((keep != last).count_nonzero())
            last = keep
            if changed == 0 and moved:
                break
            if step >= _STEADY_STEPS and changed < _STEADY_CHANGES * count:
                break
            if changed > _SOME_CHANGES * count:
                rho *= _MANY_GROWTH if changed > _MANY_CHANGES * count else _SOME_GROWTH
                moved = True
            elif moved:
                rho *= _FEW_GROWTH
            else:  # the penalty pins the first support: restart with a smaller one
                rho /= _BACK_OFF
                if changed:
                    keep = largest(dense, sparsity)
                    sparse = torch.where(keep, dense, 0)
                    dual.zero_()
                    last = keep
            rho = min(rho, _LARGEST_RHO)
            inverse = problem.inverse(rho)
        return free


@dataclass(frozen=True)
class Admm(_Reconstruction):
    """Prunes by a fixed number of ADMM steps.

    Attributes:
        damping: Added to the unit diagonal of the scaled Hessian.
        rho: Penalty.
        steps: Steps of ADMM.
        mask_steps: Steps after which the support is fixed.
    """

    damping: float = 0.1
    rho: float = 1.0
    steps: int = 20
    mask_steps: int = 15

    def __post_init__(self) -> None:
        if not self.damping >= 0 or not self.rho > 0 or self.steps < 1 or self.mask_steps < 1:
            raise ValueError("damping >= 0, rho > 0, steps >= 1 and mask_steps >= 1 are needed")

    def problem(self, stats: InputStats) -> tuple[Problem, int]:
        """Return the problem with damping after it is scaled."""
        hessian, dead = damped_hessian(stats, damping=0.0)
        return Problem.of(hessian, shift=self.damping), int(dead.sum())

    def solve(
        self, problem: Problem, dense: Float[Tensor, "out in"], sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return the sparse copy after the last step."""
        image = dense @ problem.matrix  # B0 A
        inverse = problem.inverse(self.rho)
        # The dual is scaled here (U = V / rho): with rho constant that saves a division per step.
        free, dual = dense, torch.zeros_like(dense)  # W and U of the paper
        for step in range(self.steps):
            total = free + dual
            if step < self.mask_steps:
                keep = largest(total, sparsity)
            sparse = torch.where(keep, total, 0)
            # U += W - Z, as total is W + U already.
            dual = total - sparse
            free = torch.sub(sparse, dual).mul_(self.rho).add_(image) @ inverse
        # Z of the paper: W itself is dense after the last step.
        return torch.where(keep, free + dual, 0)


def refine(
    problem: Problem,
    dense: Float[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    *,
    steps: int,
    tolerance: float = 1e-4,
) -> Float[Tensor, "out in"]:
    """Minimize the reconstruction error over the weights on a support, by conjugate gradients.

    Args:
        problem: The scaled Hessian.
        dense: The dense weight, scaled.
        start: Initial weights; only those on the support are used.
        keep: The support.
        steps: Maximum number of steps; every output row has its own step length, as in the
            authors' code (the paper has one for the matrix).
        tolerance: Relative residual at which to stop.
    """
    image = dense @ problem.matrix
    sparse = torch.where(keep, start, 0)
    # Projected on the support, here and at each step: the solution never leaves it.
    residual = torch.where(keep, image - sparse @ problem.matrix, 0)
    direction = residual.clone()
    power = residual.square().sum(1, keepdim=True)  # [out, 1]
    # Squared norms are compared, over the whole matrix: no root in the loop.
    goal = tolerance**2 * float(power.sum())
    for _ in range(steps):
        pushed = torch.where(keep, direction @ problem.matrix, 0)  # [out, in]
        length = power / (direction * pushed).sum(1, keepdim=True).clamp(min=1e-30)  # [out, 1]
        sparse += length * direction  # [out, in]
        residual -= length * pushed
        new_power = residual.square().sum(1, keepdim=True)
        if float(new_power.sum()) <= goal:
            break
        # The clamp keeps a row that has converged (0 / 0) from turning into NaN.
        direction.mul_(new_power / power.clamp(min=1e-30)).add_(residual)
        power = new_power
    return sparse
