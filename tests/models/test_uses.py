"""Which blocks and which linears: those that the forward pass runs, every use of them, or none.

What is right is said by `tests.oracle` and autograd, see `tests.oracle_checks`.
"""

import contextlib

import pytest
import torch
from torch import nn

from prunebench.allocators.sensitivity import Sensitivity
from prunebench.errors import IncompatibleData
from prunebench.models.disk import load_on_disk
from prunebench.models.gradients import gradient_norms
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_blocks, find_linears
from prunebench.models.replay import plain_inference
from prunebench.models.walker import BlockWalker
from prunebench.pruners.magnitude import Magnitude
from prunebench.pruners.wanda import Wanda
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens
from tests.oracle_checks import require_equal_gradients, require_equal_statistics
from tests.tiny_architectures import tiny_architecture

HALF = Sparsity.parse("0.5")
CPU = torch.device("cpu")
SHARED_KEYS = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}


def walk(model, **how):
    """Visit every linear with statistics."""
    return list(BlockWalker(model, token_ids=tiny_tokens(), **how).groups(stats=True, write=False))


# -------------------------------------------------------------------- which blocks


@pytest.mark.parametrize("method", [Magnitude(), Wanda()])
def test_the_text_model_is_pruned_and_not_a_vision_tower_that_is_larger(method):
    tower = {"model_type": "siglip_vision_model", "hidden_size": 96, "intermediate_size": 256,
             "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
             "patch_size": 14}  # fmt: skip
    model = tiny_architecture("gemma3", vision_config=tower)
    dense = {name: tensor.clone() for name, tensor in model.named_parameters()}
    walker = BlockWalker(model, token_ids=tiny_tokens())
    method.prune(walker, {linear.name: HALF for linear in walker.linears})
    changed = {name for name, tensor in model.named_parameters() if (tensor != dense[name]).any()}
    assert changed == {linear.parameter_name for linear in walker.linears}
    assert all("language_model.layers" in name for name in changed)


@pytest.mark.parametrize("stats", [True, False])
def test_a_block_that_does_not_run_is_refused_by_name(stats):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2  # the last of the three is left out
    walker = BlockWalker(model, token_ids=tiny_tokens())
    with pytest.raises(IncompatibleData, match="LlamaForCausalLM") as error:
        list(walker.groups(stats=stats))
    assert "block 2 does not run" in error.value.where


def looped(model):
    """Let a model run its stack twice."""
    inner, once = model.model, model.model.forward

    def twice(input_ids=None, **kwargs):
        hidden = once(input_ids=input_ids, **kwargs).last_hidden_state
        return once(**{**kwargs, "inputs_embeds": hidden})

    inner.forward = twice
    return model


def test_a_stack_that_is_looped_is_refused_where_statistics_are_needed():
    with pytest.raises(IncompatibleData, match="LlamaForCausalLM") as error:
        walk(looped(tiny_model("llama")))
    assert "[0, 1, 2, 0, 1, 2]" in error.value.where
    assert len(list(BlockWalker(looped(tiny_model("llama"))).groups(stats=False))) == 3


def test_a_second_list_of_blocks_is_refused_and_both_are_named():
    with pytest.raises(IncompatibleData, match="two lists of blocks") as error:
        find_linears(tiny_architecture("hrm_text"))
    assert "H_module.layers" in error.value.where
    assert "L_module.layers" in error.value.where


@pytest.mark.parametrize("model_type", ["hy_v4", "zaya"])
def test_what_blocks_hand_on_beside_the_hidden_state_is_refused(model_type):
    with pytest.raises(IncompatibleData, match="cannot be replayed") as error:
        walk(tiny_architecture(model_type))
    assert "tensors to later blocks" in error.value.where


# -------------------------------------------------------------------- every use


@pytest.mark.parametrize("devices", [(CPU,), (CPU, CPU)])
@pytest.mark.parametrize("model_type", ["zamba2", "gemma3n_text", "mamba", "mixtral", "git"])
def test_statistics_are_those_of_every_use(model_type, devices):
    model = tiny_architecture(model_type)
    assert require_equal_statistics(model, devices=devices, batch_tokens=48) == 0


def test_a_shared_block_counts_once_with_the_sum_of_its_uses():
    model = tiny_architecture(
        "zamba2", num_hidden_layers=6, num_mem_blocks=2,
        layers_block_type=["linear_attention", "hybrid"] * 3,
    )  # fmt: skip
    require_equal_statistics(model)
    shared = [
        linear for linear in find_linears(model) if "shared_transformer.self_attn" in linear.name
    ]
    assert {one.block_index for one in shared} == {1, 3}  # 5 has the weights of 1
    tokens = {
        group.linears[0].block_index: group.stats.tokens
        for group in walk(model)
        if group.linears[0] in shared or group.linears[0].name.endswith("self_attn.q_proj")
    }
    assert tokens[1] == 2 * tokens[3]
    Wanda().prune(
        walker := BlockWalker(model, token_ids=tiny_tokens()),
        {linear.name: HALF for linear in walker.linears},
    )
    for linear in find_linears(model):
        assert (linear.stored == 0).float().mean() == pytest.approx(0.5, abs=0.01), linear.name
    again = model.model.layers[5].shared_transformer.self_attn.q_proj.weight
    assert (again == 0).float().mean() == 0.5


def test_where_shared_weights_do_not_fit_they_are_named(tmp_path):
    model = tiny_architecture("zamba2")
    with pytest.raises(IncompatibleData, match="sequential does not fit"):
        walk(model, within_block="sequential")
    with pytest.raises(IncompatibleData, match=r"layers\.1\.shared_transformer.*q_proj"):
        gradient_norms(model, tiny_tokens(), norm="l1")
    model.save_pretrained(tmp_path)
    journal = RunJournal(tmp_path / "kept")
    with pytest.raises(IncompatibleData, match="read from disk") as error:
        load_on_disk(tmp_path, model.config, dtype=torch.float32, device=CPU, journal=journal)
    assert "blocks 1 and 3 share" in error.value.where


def test_a_linear_that_runs_twice_is_pruned_once_in_one_order_and_refused_in_the_other():
    model = tiny_architecture("gemma3n_text")
    router = "model.layers.0.altup.modality_router"
    groups = [group for group in walk(model) if router in [linear.name for linear in group.linears]]
    assert [len(group.linears) for group in groups] == [1]
    assert groups[0].stats.tokens == 2 * tiny_tokens().numel()
    with pytest.raises(IncompatibleData, match="sequential does not fit"):
        walk(model, within_block="sequential")


@pytest.mark.parametrize("model_type", ["mamba", "gemma3n_text", "falcon", "gpt2", "mixtral"])
def test_gradients_are_those_of_every_use(model_type):
    require_equal_gradients(tiny_architecture(model_type))


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_keys_that_layers_share_are_replayed_and_gradients_through_them_refused(model_type):
    model = tiny_architecture(model_type, **SHARED_KEYS)
    require_equal_statistics(model, batch_tokens=48)
    with pytest.raises(IncompatibleData, match="block by block") as error:
        gradient_norms(model, tiny_tokens(), norm="l1")
    assert "beside its hidden state" in error.value.where
    with pytest.raises(IncompatibleData, match="cannot be replayed"):
        Sensitivity().allocate(BlockWalker(model, token_ids=tiny_tokens()), 0.5)


def test_a_linear_that_gives_more_than_its_product_has_the_gradient_of_autograd():
    class Squashed(nn.Linear):
        def forward(self, inputs):
            return torch.tanh(super().forward(inputs))

    model = tiny_model("llama")
    for block in find_blocks(model)[1]:
        block.mlp.up_proj.__class__ = Squashed
    require_equal_gradients(model)


def test_gradients_of_the_same_weights_in_another_configuration_are_not_taken_from_the_cache():
    model = tiny_architecture("granite")
    first = gradient_norms(model, tiny_tokens(), norm="l1")
    other = tiny_architecture("granite", logits_scaling=4.0)
    second = gradient_norms(other, tiny_tokens(), norm="l1")
    name = find_linears(model)[0].name
    assert not torch.allclose(first.read(name), second.read(name))


# -------------------------------------------------------------------- every linear


def patched(use):
    """A Llama whose middle block has one linear more; `use(linear, x)` is added to its output."""
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.extra = nn.Linear(32, 32, bias=False).requires_grad_(False)
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + use(mlp.extra, x)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda linear, x: linear(input=x),
        lambda linear, x: x @ linear.weight.T,
        lambda linear, x: torch.nn.functional.linear(x, weight=linear.weight),
        lambda linear, x: (linear.weight @ x.transpose(1, 2)).transpose(1, 2),
        lambda linear, x: linear(linear(x)) + linear(2 * x),
        lambda linear, x: linear(x) + x @ linear.weight.T,
    ],
)
def test_however_a_linear_is_multiplied_its_statistics_are_exact(use):
    require_equal_statistics(patched(use), batch_tokens=48)


def test_a_matrix_in_another_dtype_is_still_that_matrix():
    def use(linear, x):
        return (x.double() @ linear.weight.double().T).float()

    stats = {one.name: group.stats for group in walk(patched(use)) for one in group.linears}
    extra, same = (stats[f"model.layers.1.mlp.{name}"] for name in ("extra", "up_proj"))
    assert extra.tokens == same.tokens
    torch.testing.assert_close(extra.sum_squares, same.sum_squares)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda linear, x: 0, "does not use it"),
        (lambda linear, x: x @ linear.weight, "used by matmul"),  # the other way round
        (lambda linear, x: linear(x) + linear.weight.abs().sum(), "used by abs"),
        (lambda linear, x: x @ linear.weight[:16].T @ torch.ones(16, 32), "used by matmul"),
        (lambda linear, x: torch.einsum("bsi,oi->bso", x, linear.weight), "used by einsum"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_by_name(use, reason):
    model = patched(use)
    with pytest.raises(IncompatibleData, match=r"model\.layers\.1\.mlp\.extra") as error:
        walk(model)
    assert reason in error.value.where


class Routed(nn.Module):
    """Two experts that are modules; only the first is ever chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


def test_an_expert_without_tokens_is_an_expert_only_beside_others_that_ran():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Routed().requires_grad_(False)
    idle = [group for group in walk(model) if group.stats.tokens == 0]
    assert [linear.name for group in idle for linear in group.linears] == [
        "model.layers.1.mlp.experts.1"
    ]
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(IncompatibleData, match=r"model\.layers\.1\.mlp\.experts\.0"):
        walk(model)


def test_no_hook_and_no_mode_is_left_behind():
    model = tiny_architecture("mamba")
    groups = BlockWalker(model, token_ids=tiny_tokens()).groups(stats=True)
    next(groups)
    groups.close()
    with contextlib.suppress(IncompatibleData), plain_inference(model):
        walk(patched(lambda linear, x: 0))
    assert not torch.overrides._get_current_function_mode_stack()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
