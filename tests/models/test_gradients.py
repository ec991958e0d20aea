"""Gradient norms against plain autograd, and the methods that read them."""

import copy

import pytest
import torch

from prunebench.calibration.stats import InputStats
from prunebench.errors import IncompatibleData
from prunebench.models.gradients import gradient_norms
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.pruners.gblm import Gblm
from prunebench.pruners.keep import keep_rows
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, tiny_model, tiny_tokens
from tests.conftest import KINDS, slow_beyond


def plain_sums(model, tokens, norm):
    """One backward pass of the whole model a window, with the model's own loss."""
    model = copy.deepcopy(model).requires_grad_(True)
    linears = find_linears(model)
    sums = {}
    for window in tokens.split(1):
        model.zero_grad()
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        for linear in linears:
            gradient = getattr(linear.module, linear.attribute).grad
            gradient = gradient if linear.expert is None else gradient[linear.expert]
            gradient = gradient.T if linear.transposed else gradient
            part = gradient.abs() if norm == "l1" else gradient**2
            sums[linear.name] = sums.get(linear.name, 0) + part
    return sums if norm == "l1" else {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("architecture", slow_beyond(KINDS, ARCHITECTURES))
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_they_are_those_of_autograd_on_every_architecture(architecture, norm):
    model = tiny_model(architecture)
    before = hash_weights(model)
    tokens = tiny_tokens(samples=3)
    norms = gradient_norms(model, tokens, norm=norm)
    expected = plain_sums(model, tokens, norm)
    for linear in find_linears(model):
        ours = norms.read(linear.name)
        assert torch.allclose(ours, expected[linear.name], rtol=1e-3, atol=1e-6), linear.name
    assert hash_weights(model) == before
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_second_call_reads_the_file():
    model, tokens = tiny_model("llama"), tiny_tokens(samples=3)
    calls = []
    first = gradient_norms(model, tokens, norm="l1", advance=calls.append)
    assert calls == [1, 1, 1]
    calls.clear()
    changed = first.path.stat().st_mtime_ns
    second = gradient_norms(model, tokens, norm="l1", advance=calls.append)
    assert calls == [3]
    assert second == first
    assert first.path.stat().st_mtime_ns == changed
    others = [
        gradient_norms(model, tokens, norm="l2"),
        gradient_norms(model, tokens[:2], norm="l1"),
        gradient_norms(tiny_model("llama", seed=1), tokens, norm="l1"),
    ]
    assert len({first.path, *(other.path for other in others)}) == 4
    assert [p for p in first.path.parent.iterdir() if p.suffix != ".safetensors"] == []


def test_a_gradient_that_is_not_finite_names_its_layer_and_leaves_no_file(monkeypatch):
    model = tiny_model("llama")
    model.lm_head.weight.data[7] = 3e38
    with pytest.raises(IncompatibleData, match=r"layers\.0\.self_attn\.q_proj is not finite"):
        gradient_norms(model, tiny_tokens(samples=2), norm="l1")
    from prunebench.files import cache_dir

    assert list((cache_dir() / "gradients").iterdir()) == []


def test_a_gradient_that_is_zero_names_its_layer():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()  # nothing reaches q, k and v
    with pytest.raises(IncompatibleData, match=r"layers\.1\.self_attn\.q_proj is zero everywhere"):
        gradient_norms(model, tiny_tokens(samples=2), norm="l1")


def pruned(method, sparsity, **options):
    model, tokens = tiny_model("llama"), tiny_tokens()
    pruner = METHODS.make(method, METHODS.resolve_options(method, options, seed=0))
    gradients = None
    if pruner.needs.gradients:
        gradients = gradient_norms(model, tokens, norm=pruner.norm)
    walker = BlockWalker(model, token_ids=tokens, inputs=PrunerInputs(gradients=gradients))
    pruner.prune(walker, {linear.name: Sparsity.parse(sparsity) for linear in walker.linears})
    return model


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_gblm_without_alpha_is_wanda_bit_for_bit(sparsity):
    ours = hash_weights(pruned("gblm", sparsity, alpha=0.0))
    assert ours == hash_weights(pruned("wanda", sparsity))
    assert ours != hash_weights(pruned("gblm", sparsity))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient_alone_is_the_formula(norm):
    dense = tiny_model("llama")
    sums = plain_sums(dense, tiny_tokens(), norm)
    after = pruned("gradient", "0.5", norm=norm)
    for linear, new in zip(find_linears(dense), find_linears(after), strict=True):
        keep = keep_rows(linear.read().abs() * sums[linear.name], Sparsity(0.5))
        assert torch.equal(new.read(), torch.where(keep, linear.read(), 0)), linear.name


@pytest.mark.parametrize(
    ("norm", "compat", "factor"),
    [("l1", True, 3.0), ("l2", True, 3.0), ("l1", False, 3.0 / 4), ("l2", False, 3.0 / 2)],
)
def test_paper_compat_sums_and_else_averages(norm, compat, factor):
    stats = InputStats(4, 10, torch.full((2,), 16.0).double())  # norm 2 of 4 windows
    gradient = torch.tensor([[1.0, 2.0]])
    scale = Gblm(norm=norm, alpha=3.0, paper_compat=compat).scale(gradient, stats, 4)
    assert scale.tolist() == [[2 + factor, 2 + 2 * factor]]


def test_a_run_of_gblm(cli, tiny_run):
    import json

    first = json.loads(cli(*tiny_run, "-m", "gblm", "--json").stdout)
    assert first["spec"]["method_options"] == {"norm": "l1", "alpha": 100.0, "paper_compat": True}
    assert "gradients" in first["cost"]["stage_seconds"]
    again = json.loads(cli(*tiny_run, "-m", "gblm", "--json").stdout)
    assert again["model"]["evaluated_sha256"] == first["model"]["evaluated_sha256"]
    alone = json.loads(cli(*tiny_run, "-m", "gradient", "--json").stdout)
    assert alone["calibration"] is not None
    assert alone["spec"]["within_block"] is None
