"""ALPS and ADMM-Grad against their mathematics, and SparseGPT on the same Hessian."""

import pytest
import torch

from prunebench.calibration.hessian import damped_hessian
from prunebench.errors import UsageError
from prunebench.models.measure import count_violations
from prunebench.pruners import METHODS
from prunebench.pruners.alps import Admm, Alps, Problem, largest, refine
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.sparsity import Sparsity
from tests.factories import inputs, stats_of, weights


def solved(pruner, weight, stats, sparsity):
    problem = pruner.problem(stats)[0]
    dense = weight * problem.scale
    pruned = pruner.solve(problem, dense, Sparsity.parse(sparsity))
    return pruned / problem.scale, problem.loss(pruned, dense)


def trace_loss(weight, pruned, hessian):
    change = (pruned - weight).double()
    return 0.5 * torch.trace(change @ hessian.double() @ change.T).item()


def test_the_problem_is_scaled_to_a_unit_diagonal():
    hessian = damped_hessian(stats_of(inputs()), damping=0.01)[0]
    problem = Problem.of(hessian, shift=0.5)
    assert torch.allclose(problem.matrix.diagonal(), torch.full((96,), 1.5))
    rebuilt = (problem.matrix - 0.5 * torch.eye(96)) * torch.outer(problem.scale, problem.scale)
    assert torch.allclose(rebuilt, hessian, rtol=1e-4, atol=1e-3)
    inverse = torch.linalg.inv((problem.matrix + 0.3 * torch.eye(96)).double())
    assert torch.allclose(problem.inverse(0.3).double(), inverse, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "2:4"])
@pytest.mark.parametrize("pruner", [Alps(), Admm()], ids=["alps", "admm"])
def test_the_loss_is_half_the_trace_and_the_count_is_exact(pruner, sparsity):
    weight, stats = weights(), stats_of(inputs())
    pruned, loss = solved(pruner, weight, stats, sparsity)
    if isinstance(pruner, Alps):
        hessian = damped_hessian(stats, damping=0.01)[0]
        assert loss == pytest.approx(trace_loss(weight, pruned, hessian), rel=1e-3)
    target = Sparsity.parse(sparsity)
    assert int((pruned == 0).sum()) == target.count(weight.numel())
    if target.is_pattern:
        assert count_violations(pruned == 0, kept=2, group=4) == 0


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "0.9", "2:4", "1:4"])
def test_alps_loses_no_more_than_sparsegpt_on_the_same_hessian(sparsity):
    for seed in range(4):
        weight, stats = weights(seed=seed), stats_of(inputs(seed=seed))
        other = SparseGPT().solve([weight], stats, [Sparsity.parse(sparsity)], ["w"])[0]
        assert solved(Alps(), weight, stats, sparsity)[1] <= other.loss


def test_admm_lies_between_dropping_and_alps():
    weight, stats = weights(), stats_of(inputs())
    hessian = damped_hessian(stats, damping=0.01)[0]
    admm = trace_loss(weight, solved(Admm(), weight, stats, "0.7")[0], hessian)
    dropped = torch.where(largest(weight * hessian.diagonal().sqrt(), Sparsity(0.7)), weight, 0)
    assert solved(Alps(), weight, stats, "0.7")[1] < admm
    assert admm < trace_loss(weight, dropped, hessian)


def test_refining_reaches_the_best_weights_on_a_support():
    """Row by row by a direct solve: H_SS x = (H w)_S."""
    weight, stats = weights(6, 32), stats_of(inputs(width=32))
    hessian = damped_hessian(stats, damping=0.01)[0]
    problem = Problem.of(hessian)
    dense = weight * problem.scale
    keep = largest(dense, Sparsity(0.5))
    refined = refine(problem, dense, dense, keep, steps=200, tolerance=1e-7) / problem.scale
    for row, w, support in zip(refined, weight, keep, strict=True):
        h = hessian.double()
        best = torch.linalg.solve(h[support][:, support], (h @ w.double())[support])
        assert torch.allclose(row[support].double(), best, rtol=2e-3, atol=1e-3)
        assert (row[~support] == 0).all()


def test_refining_never_makes_it_worse():
    weight, stats = weights(), stats_of(inputs())
    problem = Alps().problem(stats)[0]
    dense = weight * problem.scale
    keep = largest(dense, Sparsity(0.7))
    losses = [
        problem.loss(refine(problem, dense, dense, keep, steps=steps), dense)
        for steps in (0, 1, 2, 5, 10, 50)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_largest_by_hand():
    values = torch.tensor([[3.0, -1.0, 2.0, 0.5], [-4.0, 0.1, 0.2, 5.0]])
    keep = largest(values, Sparsity(0.5))
    assert keep.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert largest(values, Sparsity.parse("1:4")).tolist() == [
        [True, False, False, False], [False, False, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [("alps", {"rho": 0.0}), ("alps", {"steps": 0}), ("admm", {"damping": -1.0})],
)
def test_bad_options_are_refused(method, options):
    with pytest.raises(UsageError, match=f"{method} refuses its options"):
        METHODS.make(method, METHODS.resolve_options(method, options, seed=0))


# ------------------------------------------------------------ RIA and the variant of Wanda


def test_ria_by_hand():
    from prunebench.calibration.stats import InputStats

    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    stats = InputStats(1, 5, torch.tensor([256.0, 1.0]).double())  # norms 16 and 1, roots 4 and 1
    pruner = METHODS.make("ria", METHODS.resolve_options("ria", {}, seed=0))
    # both sums are 4: relative importance is 0.5 and 1.5 each; [[2, 1.5], [6, 0.5]]
    assert pruner.prune_weight(weight, stats, Sparsity(0.5)).tolist() == [[1.0, 0.0], [3.0, 0.0]]
    flat = METHODS.make("ria", METHODS.resolve_options("ria", {"power": 0.0}, seed=0))
    assert flat.prune_weight(weight, stats, Sparsity(0.5)).tolist() == [[0.0, 3.0], [3.0, 0.0]]


def test_the_variant_of_wanda_is_the_papers_bisection():
    from prunebench.calibration.stats import InputStats

    weight = weights(40, 64)
    stats = InputStats(2, 9, torch.rand(64, generator=torch.Generator().manual_seed(0)).double())
    pruned = METHODS.make("wanda-variant", {}).prune_weight(weight, stats, Sparsity(0.5))
    assert int((pruned == 0).sum()) == 40 * 32
    score = (weight.abs() * stats.norms()).double()
    ordered = score.sort(dim=1).values
    low, high = 0.0, 0.8
    for _ in range(60):
        alpha = (low + high) / 2
        count = (ordered.cumsum(1) <= alpha * ordered.sum(1, keepdim=True)).sum(1)
        low, high = (alpha, high) if count.sum() < 40 * 32 else (low, alpha)
    count = (ordered.cumsum(1) <= high * ordered.sum(1, keepdim=True)).sum(1)
    assert ((pruned == 0).sum(1) == count).all()
    assert len(count.unique()) > 1
