"""GPTQ against its mathematics: rounding to nearest, a slow second opinion, the loss identity."""

import pytest
import torch

from prunebench.calibration.hessian import damped_hessian
from prunebench.calibration.stats import InputStats
from prunebench.errors import UsageError
from prunebench.models.linears import find_linears
from prunebench.models.measure import count_violations
from prunebench.models.walker import BlockWalker
from prunebench.models.weight_grid import WeightGrid, count_off_grid
from prunebench.pruners import METHODS
from prunebench.pruners.gptq import Gptq
from prunebench.pruners.rounding import Grid, round_to_nearest
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.sparsity import Sparsity
from prunebench.testing import check_pruner, tiny_model
from tests.factories import inputs, stats_of, weights

DENSE = Sparsity(0.0)


def solve(pruner, weight, stats, sparsity=DENSE):
    return pruner.solve([weight], stats, [sparsity], ["w"])[0]


def error(weight, other, stats):
    """The reconstruction error 1/2 tr(D H D^T) with the exact Hessian, in float64."""
    change = (other - weight).double()
    hessian = damped_hessian(stats, damping=0.01)[0].double()
    return 0.5 * torch.trace(change @ hessian @ change.T).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 40, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_beats_rounding_to_nearest_and_reports_its_error(bits, group_size, symmetric):
    weight, stats = weights(), stats_of(inputs())
    pruner = Gptq(quantize_bits=bits, group_size=group_size, symmetric=symmetric)
    quantized = solve(pruner, weight, stats)
    nearest = round_to_nearest(weight, pruner.grid)
    assert quantized.loss == pytest.approx(error(weight, quantized.weight, stats), rel=1e-3)
    assert quantized.loss < 0.75 * error(weight, nearest, stats)
    assert count_off_grid(quantized.weight, pruner.grid) == 0
    assert count_off_grid(nearest, pruner.grid) == 0


def test_eight_bits_lose_next_to_nothing_and_fewer_lose_more():
    weight, stats = weights(), stats_of(inputs())
    nothing_left = error(weight, torch.zeros_like(weight), stats)
    losses = [solve(Gptq(quantize_bits=bits), weight, stats).loss for bits in (8, 4, 3)]
    assert losses[0] < 1e-4 * nothing_left
    assert losses == sorted(losses)


def slow(weight, stats, form):
    """Algorithm 1 of the paper, row by row in float64, with the inverse of every submatrix."""
    hessian = damped_hessian(stats, damping=0.01)[0].double()
    width = form.width(weight.shape[1])
    w, rounded = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if j % width == 0:
                # of the weights as the columns before have left them
                grid = Grid.of(w[row, j : j + width, None].float(), form)
            rounded[row, j] = grid.round(w[row, j].float()[None]).double().item()
            inverse = torch.linalg.inv(hessian[j:, j:])
            w[row, j:] -= (w[row, j] - rounded[row, j]) / inverse[0, 0] * inverse[0]
    return rounded


@pytest.mark.parametrize("group_size", [-1, 16, 20])
def test_a_slow_second_opinion(group_size):
    weight, stats = weights(6, 48), stats_of(inputs(width=48))
    pruner = Gptq(group_size=group_size, block_size=24)
    quantized = solve(pruner, weight, stats).weight
    expected = slow(weight, stats, pruner.grid)
    # near a tie float32 and float64 may choose two neighbors, and the columns behind follow
    same = (quantized.double() - expected).abs() < 1e-3
    assert same.float().mean() > 0.97


def test_a_diagonal_hessian_is_rounding_to_nearest():
    sums = torch.rand(64, generator=torch.Generator().manual_seed(0)).double() + 0.1
    stats = InputStats(4, 100, sums, torch.diag(sums).float())
    weight = weights(12, 64)
    pruner = Gptq(group_size=16, damping=0.0)
    assert torch.equal(solve(pruner, weight, stats).weight, round_to_nearest(weight, pruner.grid))


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest():
    weight, stats = weights(), InputStats(4, 0, torch.zeros(96).double(), None)
    pruner = Gptq(group_size=32)
    quantized = solve(pruner, weight, stats)
    assert torch.equal(quantized.weight, round_to_nearest(weight, pruner.grid))
    zeros = int((quantized.weight == 0).sum())
    assert zeros and [e.value for e in quantized.events] == [zeros]


def test_pruned_and_quantized_weights_keep_the_pattern_and_the_grid():
    weight, stats, pattern = weights(), stats_of(inputs()), Sparsity.parse("2:4")
    both = SparseGPT(quantize_bits=4, group_size=32)
    joint = solve(both, weight, stats, pattern)
    assert count_violations(joint.weight == 0, kept=2, group=4) == 0
    assert count_off_grid(joint.weight, both.grid) == 0
    # rounding the pruned weights afterwards does not compensate
    after = round_to_nearest(solve(SparseGPT(), weight, stats, pattern).weight, both.grid)
    assert joint.loss < error(weight, after, stats)


def test_without_quantization_the_options_are_those_of_older_results():
    resolved = METHODS.resolve_options("sparsegpt", {"group_size": -1}, seed=0)
    assert resolved == {"damping": 0.01, "block_size": 128, "quantize_bits": None}
    grouped = METHODS.resolve_options("sparsegpt", {"quantize_bits": 4, "group_size": 64}, seed=0)
    assert grouped["group_size"] == 64 and "symmetric" not in grouped
    assert METHODS.resolve_options("gptq", {}, seed=0)["group_size"] == 128


def test_it_keeps_the_contract_of_what_does_not_prune():
    outcomes = check_pruner(Gptq(group_size=16), architectures=("llama",))
    assert {"holds 4-bit weights", "reaches 0, joint"} <= {o.check for o in outcomes}
    assert [str(o) for o in outcomes if not o.passed] == []


def test_the_contract_notices_a_wrong_grid():
    class Claims(Gptq):
        @property
        def grid(self):
            return WeightGrid(self.quantize_bits - 1, self.group_size)

        def solve(self, *given):
            return Gptq(group_size=self.group_size).solve(*given)

    outcomes = check_pruner(Claims(group_size=16), architectures=("llama",))
    failed = [o for o in outcomes if not o.passed]
    assert [o.check for o in failed] == ["holds 3-bit weights"]
    assert "groups hold other values" in failed[0].failure


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"quantize_bits": None}), ("gptq", {"quantize_bits": 9}),
        ("gptq", {"group_size": 0}), ("sparsegpt", {"group_size": 64}),
        ("sparsegpt", {"symmetric": True}),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(method, options):
    given = METHODS.resolve_options(method, options, seed=0)
    with pytest.raises(UsageError, match=f"{method} refuses its options"):
        METHODS.make(method, given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "gptq", "--sparsity", "2:4"], "gptq does not prune"),
        (["-m", "gptq", "--allocation", "owl"], "--allocation owl does not go with gptq"),
        (["-m", "gptq", "--recover", "block"], "--recover block does not go with the method gptq"),
        (["-m", "sparsegpt", "--sparsity", "2:4", "--set", "quantize_bits=4", "--set",
          "group_size=30"], "group_size=30 does not go with --sparsity 2:4"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(cli, words, message):
    outcome = cli("run", *words, "--calibration", "c4@wheel", "--ppl", "wiki@wheel", code=2)
    assert message in " ".join(outcome.output.split())


def test_rounding_to_nearest_is_a_method_without_data():
    pruner = METHODS.make("rtn", {"quantize_bits": 4, "group_size": 8})
    model, dense = tiny_model("llama"), tiny_model("llama")
    walker = BlockWalker(model)
    pruner.prune(walker, dict.fromkeys((x.name for x in walker.linears), DENSE))
    for ours, theirs in zip(find_linears(model), find_linears(dense), strict=True):
        assert torch.equal(ours.read(), round_to_nearest(theirs.read(), pruner.grid))
        assert count_off_grid(ours.read(), pruner.grid) == 0


@pytest.mark.parametrize("options", [{"quantize_bits": 9}, {"group_size": 1}])
def test_rounding_to_nearest_refuses_what_no_grid_has(options):
    with pytest.raises(UsageError, match="rtn refuses its options"):
        METHODS.make("rtn", options)
    with pytest.raises(UsageError, match="rtn does not prune"):
        METHODS.make("rtn", {}).check(Sparsity(0.5))
