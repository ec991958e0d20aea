"""The walker: faithful on every architecture, in both orders, and it leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import find_blocks, find_linears, is_finite
from prunebench.models.plan import check_replay
from prunebench.models.replay import plain_inference, record_calls
from prunebench.models.walker import BlockWalker
from prunebench.pruners.wanda import Wanda
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, FUSED_EXPERTS, tiny_model, tiny_tokens

PLAIN = [name for name in ARCHITECTURES if name not in FUSED_EXPERTS]
HALF = Sparsity.parse("2:4")


def inputs_of(model, token_ids, names):
    """The inputs of some linears, caught by hooks of this test during a plain forward pass."""
    caught = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _, args, n=name: caught.__setitem__(n, args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=token_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_is_bit_for_bit(architecture):
    model = tiny_model(architecture)
    blocks = find_blocks(model)[1]
    by_block = [[x for x in find_linears(model) if x.block_index == i] for i in range(len(blocks))]
    tokens = tiny_tokens(samples=2)
    with plain_inference(model), torch.no_grad():
        plans = check_replay(model, blocks, by_block, tokens[:1])  # raises on any difference
        returns = [plan.returns for plan in plans]
        hidden, calls = record_calls(model, blocks, tokens, returns_tuple=returns)
        for call, block in zip(calls, blocks, strict=True):
            hidden = call.run(block, hidden)
        caught = []
        handle = blocks[-1].register_forward_hook(lambda m, a, out: caught.append(out))
        model(input_ids=tokens, use_cache=False)
        handle.remove()
    expected = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_a_block_is_covered(architecture):
    model = tiny_model(architecture)
    linears = find_linears(model)
    assert {x.block_index for x in linears} == set(range(len(find_blocks(model)[1])))
    covered = sum(x.size for x in linears)
    in_blocks = sum(p.numel() for p in find_blocks(model)[1].parameters() if p.ndim > 1)
    assert covered / in_blocks > (0.95 if architecture in FUSED_EXPERTS else 0.9999)


@pytest.mark.parametrize("architecture", PLAIN)
def test_wanda_in_the_last_block_equals_the_formula(architecture):
    """Joint order: the statistics of block b are those of the dense block b behind pruned ones."""
    model = tiny_model(architecture)
    tokens = tiny_tokens()
    walker = BlockWalker(model, token_ids=tokens, batch_tokens=48)
    last = len(walker.blocks) - 1
    dense = copy.deepcopy(walker.blocks[last].state_dict())
    Wanda().prune(walker, {x.name: HALF for x in walker.linears})
    pruned = {x.name: x.stored.clone() for x in walker.linears_of(last)}
    walker.blocks[last].load_state_dict(dense)  # pruned prefix, dense last block
    seen = inputs_of(model, tokens, pruned)
    for linear in walker.linears_of(last):
        norms = seen[linear.name].double().square().sum(0).div(len(tokens)).sqrt().float()
        weight = linear.weight
        score = weight.abs() * norms
        expected = torch.zeros_like(weight)
        for row in range(weight.shape[0]):
            for start in range(0, weight.shape[1], 4):
                ranked = sorted(range(start, start + 4), key=lambda j: (float(score[row, j]), j))
                for column in ranked[2:]:
                    expected[row, column] = weight[row, column]
        by_walker = pruned[linear.name].T if linear.transposed else pruned[linear.name]
        assert torch.equal(by_walker, expected), linear.name


@pytest.mark.parametrize("architecture", PLAIN)
def test_sequential_statistics_are_those_of_the_pruned_model(architecture):
    """Each linear's mask follows from the inputs that the finished pruned model really gives it."""
    model = tiny_model(architecture)
    tokens = tiny_tokens()
    dense = {x.name: x.read().clone() for x in find_linears(model)}
    walker = BlockWalker(model, token_ids=tokens, within_block="sequential", batch_tokens=48)
    Wanda().prune(walker, {x.name: HALF for x in walker.linears})
    seen = inputs_of(model, tokens, dense)
    for linear in walker.linears:
        norms = seen[linear.name].double().square().sum(0).div(len(tokens)).sqrt().float()
        score = (dense[linear.name].abs() * norms).reshape(-1, 4)
        zeros = (linear.read() == 0).reshape(-1, 4)
        survivors, lost = score.masked_fill(zeros, torch.inf), score.masked_fill(~zeros, -torch.inf)
        assert (survivors.amin(1) >= lost.amax(1) * (1 - 1e-5)).all(), linear.name


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma3"])
def test_the_batch_size_does_not_change_the_result(architecture, within_block):
    """Batches of one, of four and a rest, and all at once, agree."""
    weights = []
    for batch_tokens in (24, 96, 10_000):
        model = tiny_model(architecture)
        walker = BlockWalker(
            model, token_ids=tiny_tokens(), within_block=within_block, batch_tokens=batch_tokens
        )
        Wanda().prune(walker, {x.name: HALF for x in walker.linears})
        weights.append(torch.cat([x.read().flatten() for x in walker.linears]))
    for other in weights[1:]:
        assert (weights[0] != other).float().mean() < 1e-3  # a near tie may fall the other way


def test_linears_with_one_input_share_statistics():
    model = tiny_model("llama")
    walker = BlockWalker(model, token_ids=tiny_tokens())
    names = [
        [x.name.rpartition(".")[2] for x in group.linears]
        for group in walker.groups(stats=True)
        if group.linears[0].block_index == 0
    ]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_sequential_runs_each_block_once_and_joint_saves_the_last_linear():
    calls = {}
    for order in ("joint", "sequential"):
        model = tiny_model("llama")
        walker = BlockWalker(model, token_ids=tiny_tokens(), within_block=order, batch_tokens=24)
        counted = []
        block = walker.blocks[1]
        for groups in walker.groups(stats=True):
            if groups.linears[0].block_index == 0:  # hooks only after the self-check
                for module in (block.self_attn.q_proj, block.mlp.down_proj):
                    if not module._forward_hooks:
                        module.register_forward_hook(lambda m, a, o, c=counted: c.append(m))
        calls[order] = [counted.count(block.self_attn.q_proj), counted.count(block.mlp.down_proj)]
    assert calls == {"joint": [12, 6], "sequential": [6, 6]}  # six batches


@pytest.mark.parametrize("architecture", FUSED_EXPERTS)
def test_experts_are_pruned_with_the_tokens_that_reach_them(architecture):
    model = tiny_model(architecture)
    tokens = tiny_tokens()
    walker = BlockWalker(model, token_ids=tokens, batch_tokens=48)
    tokens_seen = {}
    for group in walker.groups(stats=True):
        for linear in group.linears:
            if linear.expert is not None and linear.attribute == "gate_up_proj":
                tokens_seen.setdefault(linear.block_index, []).append(group.stats.tokens)
    for counts in tokens_seen.values():
        assert sum(counts) == 2 * tokens.numel()  # two experts a token
        assert len(counts) == 4
    model = tiny_model(architecture)
    walker = BlockWalker(model, token_ids=tokens, within_block="sequential")
    with pytest.raises(IncompatibleData, match="which experts run depends on the text"):
        Wanda().prune(walker, {x.name: HALF for x in walker.linears})


def test_an_expert_that_no_token_reaches_is_reported_and_falls_back_to_magnitude():
    model = tiny_model("mixtral")
    tokens = tiny_tokens(samples=1, seqlen=1)  # one token chooses two of the four experts
    walker = BlockWalker(model, token_ids=tokens)
    report = Wanda().prune(walker, {x.name: HALF for x in walker.linears})
    unseen = {event.layer for event in report.events}
    assert len(unseen) == 3 * 2 * 2  # blocks, experts left out, matrices of an expert
    for linear in walker.linears:
        if linear.name in unseen:
            dense = {x.name: x for x in find_linears(tiny_model("mixtral"))}[linear.name]
            groups = dense.read().abs().reshape(-1, 4)
            zeros = (linear.read() == 0).reshape(-1, 4)
            assert (
                groups.masked_fill(zeros, 9).amin(1) >= groups.masked_fill(~zeros, 0).amax(1)
            ).all()
    assert all(event.kind == "no calibration token" for event in report.events)


class _Broken(Exception):
    pass


@pytest.mark.parametrize("within_block", ["joint", "sequential"])
def test_an_exception_leaves_no_hooks_and_restores_settings(within_block):
    model = tiny_model("llama")
    walker = BlockWalker(model, token_ids=tiny_tokens(), within_block=within_block)
    groups = walker.groups(stats=True)
    next(groups), next(groups)
    with pytest.raises(_Broken):
        groups.throw(_Broken)
    assert model.config.use_cache is True
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "forward" not in vars(module)
    with torch.no_grad():
        assert model(input_ids=tiny_tokens()).logits.isfinite().all()


def test_activations_may_wait_on_another_device_than_the_block(monkeypatch):
    """Every hidden state is taken to its waiting place and back; seen with a device that counts."""
    moves = []
    original = torch.Tensor.to

    def counting(self, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and self.ndim == 3:
            moves.append(args[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    model = tiny_model("llama")
    waiting = torch.device("cpu", 0)
    walker = BlockWalker(model, token_ids=tiny_tokens(), activation_device=waiting)
    for _ in walker.groups(stats=True):
        pass
    assert moves.count(waiting) >= len(walker.blocks)
    assert moves.count(torch.device("cpu")) >= len(walker.blocks)


def test_a_model_whose_blocks_hide_state_is_refused():
    class Hidden(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs) * self.calls

    model = tiny_model("llama")
    model.model.layers[1] = Hidden(model.model.layers[1])
    walker = BlockWalker(model, token_ids=tiny_tokens())
    with pytest.raises(IncompatibleData, match="LlamaForCausalLM cannot be replayed"):
        next(walker.groups(stats=True))


def test_a_block_of_unknown_matrices_is_refused_with_its_share():
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = nn.Parameter(torch.zeros(100, 100))
    with pytest.raises(IncompatibleData, match=r"only \d+\.\d% of its matrix parameters") as error:
        find_linears(model)
    assert "mlp.extra" in error.value.where


def test_not_finite_activations_name_the_place():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    walker = BlockWalker(model, token_ids=tiny_tokens())
    with pytest.raises(IncompatibleData, match="NaN or infinite"):
        for _ in walker.groups(stats=True):
            pass


def test_not_finite_weights_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[1, 2] = torch.nan
    walker = BlockWalker(model)
    with pytest.raises(IncompatibleData, match=r"layers\.2\.self_attn\.o_proj holds NaN"):
        for group in walker.groups(stats=False):
            for linear in group.linears:
                linear.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_seen(value, dtype):
    values = torch.full((64, 33), torch.finfo(dtype).max, dtype=dtype)  # their sum overflows
    assert is_finite(values) and is_finite(values.T)
    values[63, 32] = value
    assert not is_finite(values) and not is_finite(values.T)


def test_statistics_without_tokens_are_refused():
    with pytest.raises(UsageError, match="needs calibration data"):
        next(BlockWalker(tiny_model("llama")).groups(stats=True))


def test_a_written_zero_is_positive():
    linear = find_linears(tiny_model("llama"))[0]
    linear.write(torch.full((linear.out_features, linear.in_features), -0.0))
    assert not torch.signbit(linear.stored).any()


def test_what_does_not_fit_is_not_written():
    linear = find_linears(tiny_model("llama"))[0]
    before = linear.read().clone()
    with pytest.raises(IncompatibleData, match="the new weight is"):
        linear.write(torch.zeros(3, 3))
    with pytest.raises(IncompatibleData, match="NaN or infinity"):
        linear.write(torch.full_like(before, torch.inf))
    assert torch.equal(linear.read(), before)
