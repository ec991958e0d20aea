"""Every registered method keeps the contract on every architecture: a new row enrols itself."""

import itertools

import pytest
import torch

from prunebench.models.hashing import hash_weights
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import BUILTIN, METHODS
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, check_pruner, tiny_model, tiny_tokens
from tests.conftest import KINDS, slow_beyond

# methods that remove blocks have a contract of their own: test_depth.py
APART = {"depth"}
ROWS = {n: row for n, row in BUILTIN.items() if row.patterns != "0" and n not in APART}
NAMES = list({row.target: name for name, row in reversed(ROWS.items())}.values())  # one a class


# What the contract asks for does not depend on these.
QUICK = {
    "alps": {"steps": 12},
    "maskllm": {"steps": 1, "batch": 1, "prior": "magnitude", "save_every": 0},
}
PATTERNS_ONLY = {"maskllm"}
BY_KIND = {"wanda", "sparsegpt", "gblm"}  # by statistics, by Hessians, by gradients


PLAIN = {"llama", "gpt2"}


def pruner_of(name, **options):
    given = {**QUICK.get(name, {}), **options}
    return METHODS.make(name, METHODS.resolve_options(name, given, seed=0))


def matrix():
    """Every method on every architecture; what follows from the others is slow by mark."""
    for method, architecture in itertools.product(NAMES, ARCHITECTURES):
        apart = method != "wanda" and architecture not in (KINDS if method in BY_KIND else PLAIN)
        yield pytest.param(method, architecture, marks=pytest.mark.slow if apart else ())


@pytest.mark.parametrize(("method", "architecture"), list(matrix()))
def test_contract(method, architecture):
    """At 2:4; ratios and other patterns are computed alike on every architecture, see below."""
    outcomes = check_pruner(pruner_of(method), architectures=(architecture,), sparsities=("2:4",))
    assert len(outcomes) >= 5
    assert [str(o) for o in outcomes if not o.passed] == []


ANY = ("0.5", "0.37", "0", "0.01", "0.9", "0.99", "1:4", "3:4", "4:8", "16:32", "1:2")


@pytest.mark.parametrize("method", slow_beyond({"wanda"}, NAMES))
def test_any_ratio_and_pattern(method):
    sparsities = ("1:4", "3:4", "4:8", "1:2") if method in PATTERNS_ONLY else ANY
    outcomes = check_pruner(pruner_of(method), architectures=("llama",), sparsities=sparsities)
    assert len(outcomes) >= len(sparsities) + 4
    assert [str(o) for o in outcomes if not o.passed] == []


def odd_model():
    """Widths that no ratio divides: 30 and 45."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=30, intermediate_size=45, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=10, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("ratio", [0.37, 0.5, 0.661])
@pytest.mark.parametrize("method", [name for name in NAMES if name not in PATTERNS_ONLY])
def test_every_layer_loses_its_exact_count_at_odd_widths(method, ratio):
    from prunebench.models.gradients import gradient_norms

    model, target, pruner = odd_model(), Sparsity(ratio), pruner_of(method)
    gradients = None
    if pruner.needs.gradients:
        gradients = gradient_norms(model, tiny_tokens(), norm=pruner.norm)
    walker = BlockWalker(model, token_ids=tiny_tokens(), inputs=PrunerInputs(gradients=gradients))
    report = pruner.prune(walker, {linear.name: target for linear in walker.linears})
    zeros = {linear.name: int((linear.stored == 0).sum()) for linear in walker.linears}
    assert zeros == {linear.name: target.count(linear.size) for linear in walker.linears}
    assert report.zeros_beyond == {}


def test_dense_changes_nothing():
    model = tiny_model("llama")
    before = hash_weights(model)
    pruner_of("dense").prune(BlockWalker(model), {})
    assert hash_weights(model) == before


def test_random_follows_its_seed():
    def pruned(seed):
        model = tiny_model("llama")
        walker = BlockWalker(model)
        pruner_of("random", seed=seed).prune(
            walker, {x.name: Sparsity(0.5) for x in walker.linears}
        )
        return hash_weights(model)

    assert pruned(1) == pruned(1) != pruned(2)


def test_wanda_with_equal_inputs_is_row_wise_magnitude():
    from prunebench.calibration.stats import InputStats
    from prunebench.pruners.keep import keep_rows

    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    stats = InputStats(
        samples=3, tokens=30, sum_squares=torch.full((16,), 7.0, dtype=torch.float64)
    )
    half = Sparsity(0.5)
    expected = torch.where(keep_rows(weight.abs(), half), weight, 0)
    assert torch.equal(pruner_of("wanda").prune_weight(weight, stats, half), expected)


def test_wanda_hand_worked():
    """|W| * norm = [[6, 2, 1, 2], [3, 8, .5, 4]]: each row loses its two smallest, ties first."""
    from prunebench.calibration.stats import InputStats

    weight = torch.tensor([[-2.0, 1.0, 2.0, 1.0], [1.0, -4.0, 1.0, 2.0]])
    sums = torch.tensor(
        [18.0, 8.0, 0.5, 8.0], dtype=torch.float64
    )  # norms 3, 2, .5, 2 of 2 samples
    stats = InputStats(samples=2, tokens=9, sum_squares=sums)
    got = pruner_of("wanda").prune_weight(weight, stats, Sparsity.parse("2:4"))
    assert got.tolist() == [[-2.0, 0.0, 0.0, 1.0], [0.0, -4.0, 0.0, 2.0]]


def test_wanda_mask_survives_rescaling_of_the_inputs():
    from dataclasses import replace

    from prunebench.calibration.stats import InputStats

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator)
    sums = torch.rand(16, generator=generator).double()
    stats = InputStats(samples=2, tokens=9, sum_squares=sums)
    wanda, half = pruner_of("wanda"), Sparsity(0.5)
    scaled = replace(stats, sum_squares=sums * 4.0)
    first, second = (wanda.prune_weight(weight, s, half) for s in (stats, scaled))
    assert torch.equal(first, second)


def test_magnitude_hand_worked():
    weight = torch.tensor([[-0.1, 3.0, 0.2, -4.0], [5.0, 0.3, -6.0, 0.4]])
    got = pruner_of("magnitude").prune_weight(weight, None, Sparsity(0.5))
    assert got.tolist() == [[0.0, 3.0, 0.0, -4.0], [5.0, 0.0, -6.0, 0.0]]


@pytest.mark.parametrize("method", list(BUILTIN))
def test_a_built_in_is_a_frozen_dataclass_whose_module_cites_what_its_row_cites(method):
    import sys

    cls = METHODS.load(method)
    assert cls.__dataclass_params__.frozen
    paper = BUILTIN[method].paper
    assert paper is None or paper in sys.modules[cls.__module__].__doc__
    needs = pruner_of(method).needs
    assert BUILTIN[method].data == (needs.tokens or needs.training is not None)


def test_the_contract_notices_a_bad_pruner():
    from dataclasses import dataclass
    from typing import ClassVar

    from prunebench.pruners.layer import LayerPruner, Needs

    @dataclass(frozen=True)
    class TooLittle(LayerPruner):
        needs: ClassVar[Needs] = Needs()

        def prune_weight(self, weight, stats, sparsity):
            return torch.where(weight.abs() > 1e-3, weight, 0)

    @dataclass(frozen=True)
    class TooMuch(LayerPruner):
        def prune_weight(self, weight, stats, sparsity):
            return torch.zeros_like(weight)

    @dataclass(frozen=True)
    class Meddler:
        needs: ClassVar[Needs] = Needs()

        def prune(self, walker, sparsity):
            report = pruner_of("magnitude").prune(walker, sparsity)
            walker.model.get_input_embeddings().weight.data.add_(1)
            walker.model.config.use_cache = False
            return report

    @dataclass(frozen=True)
    class FloorsEachRow(LayerPruner):
        def prune_weight(self, weight, stats, sparsity):
            drop = weight.abs().argsort(dim=1)[:, : int(weight.shape[1] * sparsity.ratio)]
            return weight.scatter(1, drop, 0.0)

    def failures(pruner, *sparsities):
        sparsities = sparsities or ("0.5", "2:4")
        outcomes = check_pruner(pruner, architectures=("llama",), sparsities=sparsities)
        return {o.check for o in outcomes if not o.passed}

    assert {"reaches 0.5, joint", "reaches 2:4, joint", "ratio 0 changes nothing"} <= failures(
        TooLittle()
    )
    assert "reaches 0.5, joint" in failures(TooMuch())
    assert failures(FloorsEachRow(), "0.5", "0.3") == {"reaches 0.3, joint"}
    assert {"leaves everything else alone", "puts hooks and settings back"} <= failures(Meddler())


def test_one_calibration_token_is_enough():
    model = tiny_model("llama")
    walker = BlockWalker(model, token_ids=tiny_tokens(samples=1, seqlen=2))
    pruner_of("wanda").prune(walker, {x.name: Sparsity(0.5) for x in walker.linears})
    assert all((x.stored == 0).sum() == x.size // 2 for x in walker.linears)
