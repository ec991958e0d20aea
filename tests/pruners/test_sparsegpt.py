"""SparseGPT against its mathematics: the loss identity, a slow second opinion, special cases."""

import json
import math

import pytest
import torch

from prunebench.calibration.hessian import damped_hessian, factorize
from prunebench.calibration.stats import InputStats
from prunebench.errors import IncompatibleData
from prunebench.models.measure import count_violations
from prunebench.models.weight_grid import WeightGrid, count_off_grid
from prunebench.pruners import METHODS, sparsegpt
from prunebench.pruners.keep import keep_group, keep_matrix, keep_rows
from prunebench.pruners.rounding import Grid
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.sparsity import Sparsity
from tests.factories import inputs, stats_of, weights


def solve(pruner, weight, stats, sparsity):
    return pruner.solve([weight], stats, [Sparsity.parse(sparsity)], ["w"])[0]


def test_the_gram_matrix_is_x_transposed_x():
    x = inputs(width=200)
    stats = stats_of(x)
    expected = x.double().T @ x.double()
    assert torch.allclose(stats.gram.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(stats.gram, stats.gram.T)
    assert torch.allclose(stats.sum_squares, x.double().square().sum(0), rtol=1e-5)
    assert torch.equal(stats.hessian(), stats.gram * 0.5)


def test_the_factor_is_that_of_the_papers():
    """inv(H) = U^T U by the original route: invert, then factorize."""
    stats = stats_of(inputs())
    hessian, dead = damped_hessian(stats, damping=0.01)
    inverse = torch.linalg.inv(hessian.double())
    expected = torch.linalg.cholesky(inverse, upper=True)
    factor = factorize(stats, damping=0.01, name="w")
    assert torch.allclose(factor.upper.double(), expected, rtol=1e-3, atol=1e-5)
    assert not dead.any()
    assert (factor.retries, factor.damping) == (0, 0.01)


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "1:4", "4:8"])
def test_the_reported_loss_is_half_the_trace_of_d_h_d(sparsity):
    weight, stats = weights(), stats_of(inputs())
    pruned = solve(SparseGPT(), weight, stats, sparsity)
    change = (pruned.weight - weight).double()
    hessian = damped_hessian(stats, damping=0.01)[0].double()
    expected = 0.5 * torch.trace(change @ hessian @ change.T).item()
    assert pruned.loss == pytest.approx(expected, rel=1e-4)


def test_a_block_is_bit_for_bit_what_python_numbers_give():
    """1 / U_jj stays on the device; copied to the host, it would be the same numbers."""
    columns = weights(96, 64).T.contiguous()  # [in, out]
    upper = factorize(stats_of(inputs(width=64)), damping=0.01, name="w").upper
    expected, errors = columns.clone(), torch.empty_like(columns)
    keep = torch.ones_like(columns, dtype=torch.bool)
    scales = (1 / upper.diagonal()).tolist()
    for first, last in ((0, 32), (32, 64)):
        for j in range(first, last):
            if j % 4 == 0:
                score = expected[j : j + 4].abs() * torch.tensor(scales[j : j + 4])[:, None]
                keep[j : j + 4] = keep_group(score, kept=2)
            column = torch.where(keep[j], expected[j], 0)
            errors[j] = (expected[j] - column) * scales[j]
            expected[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j], alpha=-1)
            expected[j] = column
        expected[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    part = sparsegpt._Part(slice(0, 96), Sparsity.parse("2:4"))
    actual = sparsegpt._prune_block(
        columns, torch.ones_like(keep), upper, parts=[part], inner=32, rounder=None
    )
    assert torch.equal(actual, errors)
    assert torch.equal(columns, expected)


def test_pruning_nearly_everything_costs_half_the_trace_of_w_h_w():
    weight, stats = weights(4000, 32), stats_of(inputs(width=32))
    pruned = solve(SparseGPT(), weight, stats, "0.99999")
    hessian = damped_hessian(stats, damping=0.01)[0].double()
    expected = 0.5 * torch.trace(weight.double() @ hessian @ weight.double().T).item()
    assert int((pruned.weight != 0).sum()) == 2  # of 128,000
    assert pruned.loss == pytest.approx(expected, rel=5e-3)


def slow(weight, stats, sparsity, *, damping=0.01, size=128):
    """The algorithm of the paper, row by row, in float64, with the inverse of every submatrix."""
    hessian = damped_hessian(stats, damping=damping)[0].double()
    width = weight.shape[1]
    w = weight.double().clone()
    for start in range(0, width, size):
        stop = min(start + size, width)
        diagonal = torch.tensor(
            [torch.linalg.inv(hessian[j:, j:])[0, 0].item() for j in range(start, stop)],
            dtype=torch.float64,
        )
        keep = torch.ones(len(w), stop - start, dtype=torch.bool)
        if not sparsity.is_pattern:
            score = (w[:, start:stop] ** 2 / diagonal).T.reshape(-1)
            count = math.floor(sparsity.ratio * score.numel())
            gone = score.argsort(stable=True)[:count]
            flat = keep.T.reshape(-1)
            flat[gone] = False
            keep = flat.view(stop - start, len(w)).T
        for j in range(start, stop):
            if sparsity.is_pattern and j % sparsity.group == 0:
                span = slice(j, j + sparsity.group)
                here = slice(j - start, j - start + sparsity.group)
                keep[:, here] = keep_rows(w[:, span] ** 2 / diagonal[here], sparsity)
            inverse = torch.linalg.inv(hessian[j:, j:])
            for row in range(len(w)):
                if not keep[row, j - start]:
                    w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                    w[row, j] = 0
    return w


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "1:4", "2:3"])
def test_a_slow_second_opinion(sparsity):
    weight, stats = weights(8, 48), stats_of(inputs(width=48))
    target = Sparsity.parse(sparsity)
    size = 30 if sparsity == "2:3" else 32  # blocks are multiples of M
    expected = slow(weight, stats, target, size=size)
    pruned = solve(SparseGPT(block_size=32), weight, stats, sparsity).weight
    assert torch.equal(pruned == 0, expected == 0)
    assert torch.allclose(pruned.double(), expected, rtol=2e-3, atol=2e-4)


def test_diagonal_hessian_is_wanda_squared_over_the_matrix_without_update():
    sums = torch.rand(64, generator=torch.Generator().manual_seed(0)).double() + 0.1
    stats = InputStats(4, 100, sums, torch.diag(sums).float())
    weight = weights(12, 64)
    pruned = solve(SparseGPT(block_size=64, damping=0.0), weight, stats, "0.5").weight
    keep = keep_matrix(weight.abs() * stats.norms(), Sparsity(0.5))
    assert torch.equal(pruned, torch.where(keep, weight, 0))


@pytest.mark.parametrize("sparsity", ["0.5", "0.37", "2:4", "16:32"])
def test_solving_a_group_together_changes_nothing(sparsity):
    stats = stats_of(inputs())
    parts = [weights(24, seed=1), weights(8, seed=2), weights(40, seed=3)]
    target = Sparsity.parse(sparsity)
    together = SparseGPT().solve(parts, stats, [target] * 3, ["a", "b", "c"])
    for part, pruned in zip(parts, together, strict=True):
        alone = SparseGPT().solve([part], stats, [target], ["x"])[0]
        assert torch.equal(pruned.weight == 0, alone.weight == 0)
        assert torch.allclose(pruned.weight, alone.weight, rtol=1e-4, atol=1e-5)
        assert pruned.loss == pytest.approx(alone.loss, rel=1e-4)


@pytest.mark.parametrize(("width", "ratio"), [(96, 0.37), (200, 0.5), (130, 0.7), (300, 0.01)])
def test_exact_counts(width, ratio):
    weight, stats = weights(24, width), stats_of(inputs(width=width))
    pruned = solve(SparseGPT(), weight, stats, str(ratio)).weight
    assert int((pruned == 0).sum()) == Sparsity(ratio).count(weight.numel())


def test_it_loses_less_than_dropping_the_same_weights():
    weight, stats = weights(), stats_of(inputs())
    pruned = solve(SparseGPT(), weight, stats, "0.5")
    hessian = damped_hessian(stats, damping=0.01)[0]
    change = torch.where(pruned.weight == 0, weight, 0)
    dropped = 0.5 * torch.trace(change @ hessian @ change.T).item()
    assert pruned.loss < 0.8 * dropped


def test_dead_inputs_are_pruned_and_reported():
    x = inputs()
    x[:, [3, 50]] = 0
    pruned = solve(SparseGPT(), weights(), stats_of(x), "2:4")
    assert (pruned.weight[:, [3, 50]] == 0).all()
    assert [(e.kind, e.value) for e in pruned.events] == [("dead inputs", 2)]
    x[:, 1] = x[:, 2] = 0  # of columns 0..3 one is left: fewer non-zeros than 2
    pruned = solve(SparseGPT(), weights(), stats_of(x), "2:4")
    assert pruned.events[1].kind == "groups with fewer non-zeros than N"
    assert pruned.events[1].value == 24
    assert count_violations(pruned.weight == 0, kept=2, group=4) == 0


def test_a_singular_hessian_gets_more_damping_and_says_so():
    x = inputs(tokens=5)  # rank 5 of 96
    pruned = solve(SparseGPT(damping=0.0), weights(), stats_of(x, samples=1), "0.5")
    assert torch.isfinite(pruned.weight).all()
    assert [e.kind for e in pruned.events] == ["Hessian damped more"]
    assert pruned.events[0].value >= 1e-3


def test_a_hessian_that_stays_singular_names_layer_and_tokens():
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1e6  # not a Gram matrix: indefinite whatever is added
    stats = InputStats(1, 77, torch.ones(8).double(), gram)
    with pytest.raises(IncompatibleData, match="the Hessian of blocks.3.q is singular") as error:
        factorize(stats, damping=0.01, name="blocks.3.q")
    assert "77 calibration tokens" in error.value.where


def test_dead_inputs_are_pruned_first_and_no_further_than_asked():
    """More inputs are dead than are to be pruned: the count stays exact, and nothing is lost."""
    data = inputs()
    data[:, : data.shape[1] * 3 // 4] = 0
    weight, stats = weights(), stats_of(data)
    pruned = solve(SparseGPT(), weight, stats, "0.5")
    assert int((pruned.weight == 0).sum()) == weight.numel() // 2
    assert pruned.loss == 0.0
    assert torch.equal(pruned.weight[pruned.weight != 0], weight[pruned.weight != 0])


def test_no_token_means_magnitude():
    stats = InputStats(4, 0, torch.zeros(96).double(), None)
    weight = weights()
    pruned = solve(SparseGPT(), weight, stats, "0.5").weight
    assert torch.equal(pruned, torch.where(keep_matrix(weight.abs(), Sparsity(0.5)), weight, 0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_survivors_lie_on_a_grid_that_holds_zero(bits):
    weight, stats = weights(), stats_of(inputs())
    pruned = solve(SparseGPT(quantize_bits=bits), weight, stats, "2:4").weight
    assert count_violations(pruned == 0, kept=2, group=4) == 0
    assert count_off_grid(pruned, WeightGrid(bits)) == 0
    worse = solve(SparseGPT(quantize_bits=bits), weight, stats, "2:4").loss
    assert worse > solve(SparseGPT(), weight, stats, "2:4").loss


def test_zeros_that_the_grid_makes_are_said_and_let_pass(cli, tiny_run):
    result = json.loads(
        cli(*tiny_run, "-m", "sparsegpt", "--sparsity", "0.3", "--set", "quantize_bits=3",
            "--json").stdout
    )  # fmt: skip
    beyond = {e["layer"]: e["value"] for e in result["method"]["events"]}
    assert {e["kind"] for e in result["method"]["events"]} == {"zeros beyond the target"}
    for layer in result["sparsity"]["layers"]:
        size = layer["out_features"] * layer["in_features"]
        extra = layer["zeros"] - Sparsity.parse(layer["requested"]).count(size)
        assert extra - beyond.get(layer["name"], 0) in (0, 1)  # 1: the share of a tiny layer


def test_the_grid_by_hand():
    grid = Grid.of(torch.tensor([[-1.0], [2.0]]), WeightGrid(2))  # steps of 1 from -1 to 2
    assert grid.round(torch.tensor([0.0])).tolist() == [0.0]
    assert [grid.round(torch.tensor([x])).item() for x in (-9.0, -0.6, 0.4, 1.4, 9.0)] == [
        -1.0, -1.0, 0.0, 1.0, 2.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"damping": -1.0}, {"block_size": 0}, {"quantize_bits": 1}], ids=str
)
def test_bad_options_are_refused(options):
    from prunebench.errors import UsageError

    given = METHODS.resolve_options("sparsegpt", options, seed=0)
    with pytest.raises(UsageError, match="sparsegpt refuses its options"):
        METHODS.make("sparsegpt", given)
