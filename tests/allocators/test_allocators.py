"""Allocators: exact means, bounds, the papers' formulas, and files that are passed on."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunebench.allocators import ALLOCATORS, BUILTIN
from prunebench.allocators.allocation import (
    Allocation,
    load_allocation,
    mean_ratio,
    require_sound,
    save_allocation,
    shifted,
    whole_counts,
)
from prunebench.allocators.hessian import automatic_range, layer_error, log_clusters, spread
from prunebench.allocators.sensitivity import _Curve, balanced
from prunebench.errors import CheckFailed, IncompatibleData, UsageError
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.walker import BlockWalker
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, tiny_model, tiny_tokens
from tests.conftest import KINDS, slow_beyond

OPTIONS = {"hessian": {"low": 0.55, "high": 0.85}, "sensitivity": {"windows": 1}}


def make(name, **options):
    given = {**OPTIONS.get(name, {}), **options}
    return ALLOCATORS.make(name, ALLOCATORS.resolve_options(name, given, seed=0))


@dataclass(frozen=True)
class Shape:
    """What allocations see of a linear."""

    name: str
    out_features: int
    in_features: int

    @property
    def size(self):
        return self.out_features * self.in_features


def walker_of(architecture="llama"):
    return BlockWalker(tiny_model(architecture), token_ids=tiny_tokens(), batch_tokens=48)


@pytest.mark.parametrize("architecture", slow_beyond(KINDS, ARCHITECTURES))
@pytest.mark.parametrize("name", list(BUILTIN))
def test_contract(name, architecture):
    """Every rule on every architecture: exact mean, ratios in [0, 1), the model as it was."""
    walker = walker_of(architecture)
    before = hash_weights(walker.model)
    allocation = make(name).allocate(walker, 0.7)
    assert hash_weights(walker.model) == before
    require_sound(allocation, walker.linears, 0.7)
    assert mean_ratio(allocation.ratios, walker.linears) == pytest.approx(0.7, abs=1e-9)
    hooks = [m for m in walker.model.modules() if m._forward_pre_hooks or "forward" in vars(m)]
    assert hooks == []
    spread_out = len(set(allocation.ratios.values())) > 1
    assert spread_out == (name != "uniform")
    assert make(name).allocate(walker, 0.7).ratios == allocation.ratios


@pytest.mark.parametrize("target", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name", ["uniform", "owl", "dlp", "sensitivity"])
def test_the_mean_is_exact_at_any_target(name, target):
    walker = walker_of()
    allocation = make(name).allocate(walker, target)
    require_sound(allocation, walker.linears, target)
    assert mean_ratio(allocation.ratios, walker.linears) == pytest.approx(target, abs=1e-9)


def block_scores(walker):
    """Wanda scores of the dense model by block, from hooks of this test's own."""
    sums, handles = {}, []
    for linear in walker.linears:

        def add(module, args, name=linear.name):
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)

        handles.append(linear.module.register_forward_pre_hook(add))
    with torch.no_grad():
        walker.model(tiny_tokens())
    for handle in handles:
        handle.remove()
    scores = {}
    for linear in walker.linears:
        norms = (sums[linear.name] / len(tiny_tokens())).sqrt().float()
        score = (linear.read().abs() * norms).flatten()
        scores.setdefault(linear.block_index, []).append(score)
    return {block: torch.cat(parts) for block, parts in scores.items()}


def test_owl_is_the_formula_of_the_paper():
    walker = walker_of()
    outliers = {
        b: 100 * (a > 3.0 * a.mean()).double().mean().item()
        for b, a in block_scores(walker).items()
    }
    low, high = min(outliers.values()), max(outliers.values())
    d = {b: 2 * 0.08 * (x - low) / (high - low) for b, x in outliers.items()}
    mean = sum(d.values()) / len(d)
    allocation = make("owl", outlier=3.0).allocate(walker, 0.7)
    for linear in walker.linears:
        expected = 0.7 + mean - d[linear.block_index]
        assert allocation.ratios[linear.name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_dlp_is_the_formula_of_the_paper(statistic):
    walker = walker_of()
    scores = block_scores(walker)
    s = {b: getattr(a, statistic)().item() for b, a in scores.items()}
    importance = {b: 1 - x / sum(s.values()) for b, x in s.items()}
    low, high = min(importance.values()), max(importance.values())
    d = {b: 2 * 0.15 * (x - low) / (high - low) for b, x in importance.items()}
    mean = sum(d.values()) / len(d)
    allocation = make("dlp", statistic=statistic).allocate(walker, 0.7)
    for linear in walker.linears:
        expected = 0.7 + mean - d[linear.block_index]
        assert allocation.ratios[linear.name] == pytest.approx(expected, abs=1e-5)


def test_dlp_of_a_model_that_is_half_zeros_is_uniform():
    """Its medians are all 0: nothing tells the blocks apart."""
    walker = walker_of()
    for linear in walker.linears:
        weight = linear.read()
        weight[:, ::2] = 0
        weight[:, 1] = 0
        linear.write(weight)
    allocation = make("dlp").allocate(walker, 0.7)
    assert {round(ratio, 6) for ratio in allocation.ratios.values()} == {0.7}


def test_hessian_keeps_range_and_order_and_follows_its_options():
    walker = walker_of()
    allocator = make("hessian", decades=0.1)
    allocation = allocator.allocate(walker, 0.7)
    assert min(allocation.ratios.values()) >= 0.55
    assert max(allocation.ratios.values()) <= 0.85
    sizes = {linear.name: linear.size for linear in walker.linears}
    per_weight = sorted(
        allocation.estimates, key=lambda name: allocation.estimates[name] / sizes[name]
    )
    ratios = [allocation.ratios[name] for name in per_weight]
    assert ratios == sorted(ratios, reverse=True)
    blocks = make("hessian", granularity="block", decades=0.1).allocate(walker, 0.7)
    by_block = {}
    for linear in walker.linears:
        by_block.setdefault(linear.block_index, set()).add(blocks.ratios[linear.name])
    assert all(len(ratios) == 1 for ratios in by_block.values())
    pinned = make("hessian", low=0.7, high=0.7).allocate(walker, 0.7)
    assert set(pinned.ratios.values()) == {0.7}


def test_estimates_bound_and_approach_the_loss():
    """Against float64 by hand; pruning everything is exact whatever the method."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 32, generator=generator)
    x = torch.randn(100, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    hessian = (x.T @ x).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    error = layer_error(weight, upper.float(), 0.5)
    w = weight.double()
    losses = (w / upper.diagonal()) ** 2
    assert error.prune_all == pytest.approx(0.5 * torch.trace(w @ hessian @ w.T).item(), rel=1e-4)
    assert error.mean_field == pytest.approx(0.25 * losses.sum().item(), rel=1e-4)
    least = losses.flatten().sort().values[:128].sum().item()
    assert error.sorted == pytest.approx(0.5 * least, rel=1e-4)


def test_clusters_are_decades():
    scores = {"a": 1e-6, "b": 3e-6, "c": 1.1e-5, "d": 1e-3, "e": 0.0}
    assert log_clusters(scores, decades=1.0) == {"a": 0, "b": 0, "c": 1, "d": 3, "e": 0}
    assert log_clusters(scores, decades=0.25)["b"] == 1
    assert log_clusters({"a": 2.0, "b": 2.0}, decades=1.0) == {"a": 0, "b": 0}


def test_six_decades_spread_as_in_the_trial_of_the_method_notes():
    clusters = {str(i): i % 6 for i in range(64)}
    sizes = dict.fromkeys(clusters, 10)
    ratios = spread(clusters, sizes, target=0.7, low=0.6, high=0.8)
    levels = [ratios[str(i)] for i in range(6)]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[5]) == (pytest.approx(0.8), pytest.approx(0.6))
    assert math.fsum(ratios.values()) / 64 == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("sizes", [{"a": 99, "b": 1}, {"a": 1, "b": 99}])
def test_a_mean_that_no_exponent_reaches_is_reached_by_a_shift(sizes):
    ratios = spread({"a": 0, "b": 1}, sizes, target=0.7, low=0.6, high=0.8)
    assert sum(ratios[k] * sizes[k] for k in sizes) / 100 == pytest.approx(0.7, abs=1e-12)
    assert ratios["a"] >= ratios["b"]
    assert all(0.6 <= r <= 0.8 for r in ratios.values())


def test_one_cluster_is_uniform():
    assert spread({"a": 0}, {"a": 5}, target=0.65, low=0.6, high=0.8) == {"a": 0.65}


@pytest.mark.parametrize(
    ("decades", "half"),
    [
        ([0, 0, 0, 0], 0),
        ([0, 1, 2, 3, 4], 0.1),
        ([0, 0.375, 0.75, 1.125, 1.5], 0.05),  # quartiles three quarters of a decade apart
        ([0, 0.25, 0.5, 0.75, 1], 0),  # half a decade
        ([0, 0.2, 0.25, 0.3, 9], 0),  # one layer far off
    ],
)
def test_the_automatic_range_opens_with_the_tail_of_the_scores(decades, half):
    low, high = automatic_range({str(i): 10.0**x for i, x in enumerate(decades)}, 0.7)
    assert high - 0.7 == pytest.approx(half)
    assert 0.7 - low == pytest.approx(half)
    if not half:
        assert low == high == 0.7
        clusters = {str(i): i for i in range(len(decades))}
        sizes = dict.fromkeys(clusters, 3)
        ratios = spread(clusters, sizes, target=0.7, low=low, high=high)
        assert set(ratios.values()) == {0.7}


def test_the_automatic_range_is_used_and_reported():
    allocation = make("hessian", range="auto", low=0.0, high=0.0, decades=0.1).allocate(
        walker_of(), 0.5
    )
    assert min(allocation.ratios.values()) >= allocation.facts["low"] >= 0.4
    assert max(allocation.ratios.values()) <= allocation.facts["high"] <= 0.6


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.75, 0.8, "cannot reach the mean 0.7"),
        (0.8, 0.6, "not a range"),
        (0.5, 1.0, "not a range"),
    ],
)
def test_a_range_that_cannot_be_is_refused(low, high, says):
    with pytest.raises(UsageError, match=says):
        make("hessian", low=low, high=high).allocate(walker_of(), 0.7)


def test_shifting_clips_and_keeps_the_mean():
    ratios = shifted(
        {"a": 0.1, "b": 0.9}, {"a": 1, "b": 3}, target=0.7, low=0.0, high=0.75
    )  # fmt: skip
    assert ratios["b"] == 0.75
    assert ratios["a"] == pytest.approx(0.55)


def test_balance_gives_equal_groups_equal_ratios_and_dear_groups_less():
    import numpy as np

    rising = np.linspace(1, 3, 64)
    same = [_Curve((n,), 10, 0.5, rising) for n in "ab"]
    assert balanced(same, 0.6, 0.4, 0.8) == pytest.approx({"a": 0.6, "b": 0.6})
    dear = [same[0], _Curve(("b",), 10, 0.7, rising)]
    ratios = balanced(dear, 0.6, 0.4, 0.8)
    assert ratios["b"] < 0.6 < ratios["a"]
    price = {n: np.interp(ratios[n], np.linspace(0.4, 0.8, 64), rising) for n in "ab"}
    assert price["a"] * 0.5 == pytest.approx(price["b"] * 0.7, rel=1e-2)


def test_a_file_gives_back_what_was_saved(tmp_path):
    walker = walker_of()
    ratios = make("owl").allocate(walker, 0.7).ratios
    save_allocation(tmp_path / "a.json", ratios, walker.linears)
    assert load_allocation(tmp_path / "a.json", walker.linears) == ratios


@pytest.mark.parametrize(
    ("break_it", "kind", "says"),
    [
        (lambda d: d["layers"].pop(), IncompatibleData, "another model"),
        (lambda d: d["layers"][0].update(shape=[1, 2]), IncompatibleData, "another model"),
        (
            lambda d: d["layers"].append({**d["layers"][0], "name": "x"}),
            IncompatibleData,
            "another",
        ),
        (lambda d: d.update(format="other"), UsageError, "is not an allocation"),
        (lambda d: d["layers"][0].pop("ratio"), UsageError, "is not an allocation"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, break_it, kind, says):
    walker = walker_of()
    path = tmp_path / "a.json"
    save_allocation(path, {linear.name: 0.5 for linear in walker.linears}, walker.linears)
    document = json.loads(path.read_text())
    break_it(document)
    path.write_text(json.dumps(document))
    with pytest.raises(kind, match=says):
        load_allocation(path, walker.linears)


def test_unsound_allocations_are_errors():
    walker = walker_of()
    names = [linear.name for linear in walker.linears]
    for ratios in (dict.fromkeys(names, 0.6), dict.fromkeys(names, 1.0), {names[0]: 0.7}):
        with pytest.raises(CheckFailed, match="the allocation is not sound|its mean is"):
            require_sound(Allocation(ratios), walker.linears, 0.7)


@pytest.mark.parametrize("name", [name for name in BUILTIN if BUILTIN[name].data])
def test_data_is_asked_for(name):
    with pytest.raises(UsageError, match="needs calibration data"):
        make(name).allocate(BlockWalker(tiny_model("llama")), 0.7)


@pytest.mark.parametrize(
    "options", [{"strength": 0.6}, {"strength": -1.0}, {"strength": float("nan")}], ids=str
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError, match="owl refuses its options"):
        make("owl", **options)


def test_layers_of_ordinary_size_keep_their_ratios():
    """A fraction of a weight is handed out only where it matters."""
    linears = [Shape(f"l{i}", 1000, 1001) for i in range(3)]
    ratios = {linear.name: 0.7 for linear in linears}
    assert whole_counts(ratios, linears, 0.7) == ratios
    small = [Shape(f"l{i}", 3, 3) for i in range(5)]
    handed = whole_counts({shape.name: 0.5 for shape in small}, small, 0.5)
    counts = [Sparsity(handed[shape.name]).count(9) for shape in small]
    assert counts == [5, 5, 4, 4, 4]  # 22 of 45, and 4 each would be 20


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(20, 90), min_size=1, max_size=8),
    ratio=st.sampled_from([0.1, 0.29, 0.5, 1 / 3, 0.66, 0.9]),
)
def test_whole_counts_add_up(sizes, ratio):
    linears = [Shape(str(i), 1, size) for i, size in enumerate(sizes)]
    handed = whole_counts({linear.name: ratio for linear in linears}, linears, ratio)
    counts = [Sparsity(handed[linear.name]).count(linear.size) for linear in linears]
    assert sum(counts) == Sparsity(ratio).count(sum(sizes))
    floors = [Sparsity(ratio).count(size) for size in sizes]
    assert all(0 <= c - f <= 1 for c, f in zip(counts, floors, strict=True))


def test_roundings_that_add_up_are_an_error():
    from prunebench.models.measure import Measured, require_total

    linear = find_linears(tiny_model("llama"))[0]
    linears = [replace(linear, name=str(i), out_features=10, in_features=1000) for i in range(10)]
    measured = [Measured(linear, 4998, 0, 0) for linear in linears]
    zeros = {linear.name: 0 for linear in linears}
    with pytest.raises(CheckFailed, match="the model was to be pruned to 0.5") as error:
        require_total(measured, zeros, Sparsity(0.5))
    assert "49,980 of 100,000 weights are zero (49.980%), not 50,000" in error.value.where
    require_total(measured, zeros, Sparsity(0.4998))
