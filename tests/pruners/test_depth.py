"""Depth pruning: which blocks go, what is left, and what the saved folder is for others."""

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunebench
from prunebench.errors import CheckFailed, IncompatibleData, UsageError
from prunebench.models.hashing import hash_weights
from prunebench.models.removal import remove_blocks, same_logits
from prunebench.models.walker import BlockWalker
from prunebench.pruners.depth import Depth, block_influence
from prunebench.pruners.removal import BlockChoice, BlockRemover, count_of_blocks
from prunebench.results.schema import Result
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, check_pruner, tiny_model, tiny_tokens
from tests.models.test_oracle import model_types
from tests.tiny_architectures import NOT_BUILT, tiny_architecture


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def influence(model, tokens):
    """From transformers' own hidden states; the last of them is after the final norm, so a hook."""
    ends = []
    blocks = model.get_decoder().layers
    hooks = [b.register_forward_hook(lambda m, a, out: ends.append(out)) for b in blocks]
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    stream = [*states[:-1], ends[-1][0] if isinstance(ends[-1], tuple) else ends[-1]]
    scores = []
    for before, after in zip(stream, stream[1:], strict=False):
        x, y = before.double(), after.double()  # [samples, seqlen, hidden]
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        scores.append(1 - cosine.mean().item())
    return scores


# ---------------------------------------------------------------- which blocks


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe"])
def test_the_scores_are_those_of_the_hidden_states_of_transformers(architecture):
    model, tokens = tiny_model(architecture), tiny_tokens()
    expected = influence(model, tokens)
    scores = block_influence(BlockWalker(model, token_ids=tokens, batch_tokens=48))
    assert list(scores) == [0, 1, 2]
    assert list(scores.values()) == pytest.approx(expected, rel=1e-4)
    report = prunebench.prune(model, method="depth", sparsity=0.34, calibration=tokens)
    lowest = expected.index(min(expected))
    assert report.sparsity.removal.blocks == [lowest]
    assert f"blocks {lowest} of 3" in repr(report)


def test_iterative_scores_the_rest_again():
    dense, tokens = tiny_model("llama"), tiny_tokens()
    removed, left = [], [0, 1, 2]
    model = copy.deepcopy(dense)
    for _ in range(2):
        scores = influence(model, tokens)
        lowest = scores.index(min(scores))
        removed.append(left.pop(lowest))
        remove_blocks(model, [lowest], tokens)
    choice = Depth(order="iterative").choose_blocks(BlockWalker(dense, token_ids=tokens), 2)
    assert list(choice.blocks) == removed
    assert choice.scores[removed[-1]] == pytest.approx(min(scores), rel=1e-4)


def test_the_control_removes_the_deepest_but_the_last():
    walker = BlockWalker(tiny_model("llama"))
    assert Depth(score="last").choose_blocks(walker, 2).blocks == (1, 0)
    assert not Depth(score="last").needs.calibration


@pytest.mark.parametrize(
    ("ratio", "depth", "count"), [(0.1, 30, 3), (0.2, 32, 6), (0.25, 10, 3), (0.0, 5, 0)]
)
def test_the_share_is_rounded_to_whole_blocks(ratio, depth, count):
    assert count_of_blocks(Sparsity(ratio), depth) == count


# ---------------------------------------------------------------- what is left


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contract(architecture):
    outcomes = check_pruner(Depth(), architectures=(architecture,))
    assert len(outcomes) == 5
    assert [str(outcome) for outcome in outcomes if not outcome.passed] == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_the_smaller_model_loads_anywhere_and_generates_with_its_cache(architecture, tmp_path):
    model, tokens = tiny_model(architecture), tiny_tokens()
    remove_blocks(model, [1], tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    words = model.generate(tokens[:1, :20], use_cache=True, **how)
    assert torch.equal(words, loaded.generate(tokens[:1, :20], use_cache=False, **how))


def test_what_the_config_says_block_by_block_is_cut_too():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_architecture("gemma3_text", layer_types=kinds)
    remove_blocks(model, [0])
    assert model.config.layer_types == kinds[1:]
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    neo = tiny_architecture("gpt_neo")
    remove_blocks(neo, [1])
    assert neo.config.attention_layers == ["global", "global"]
    assert same_logits(neo, type(neo.config).from_dict(neo.config.to_dict()))


def test_nothing_removed_is_dense_bit_for_bit():
    model = tiny_model("llama")
    before = hash_weights(model)
    report = prunebench.prune(model, method="depth", sparsity=0, calibration=tiny_tokens())
    assert hash_weights(model) == before == report.weights_sha256
    assert report.sparsity.removal.blocks == []


@pytest.mark.parametrize(
    ("model_type", "removed", "reason"),
    [
        ("zamba2", [0], "is the same parameter as"),
        # its first block is dense, the others are mixtures, and the config counts from the first
        ("ernie4_5_moe", [0], "another model.layers.0.mlp.gate_proj.weight"),
        # a factor of its attention depends on the number of the block
        ("diffllama", [0], "compute otherwise"),
        ("gemma3n_text", [1], "another model.embed_tokens_per_layer.weight"),
    ],
)
def test_blocks_that_depend_on_others_or_on_their_place_are_refused(model_type, removed, reason):
    model = tiny_architecture(model_type)
    before = hash_weights(model)
    with pytest.raises(IncompatibleData, match=f"blocks of {type(model).__name__}") as error:
        remove_blocks(model, removed, tiny_tokens())
    assert reason in error.value.where
    assert hash_weights(model) == before


def test_keys_that_layers_share_are_refused():
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": None}
    model = tiny_architecture("gemma3n_text", **{**shared, "layer_types": ["full_attention"] * 4})
    with pytest.raises(IncompatibleData, match="cannot be removed") as error:
        remove_blocks(model, [0], tiny_tokens())
    assert "for later blocks" in error.value.where


@dataclass(frozen=True)
class TwiceTheSame(BlockRemover):
    """Chooses one block too few."""

    def choose_blocks(self, walker, count):
        return BlockChoice((0,) * count)


@dataclass(frozen=True)
class AlsoZeroes(Depth):
    """Removes blocks, and changes one of those that stay."""

    label: ClassVar[str] = "bad"

    def prune(self, walker, sparsity):
        report = super().prune(walker, sparsity)
        walker.blocks[0].mlp.up_proj.weight[0] = 0
        return report


def test_a_method_that_breaks_the_contract_is_found_by_the_check_and_by_a_run():
    failed = {o.check for o in check_pruner(AlsoZeroes(), architectures=("llama",)) if o.failure}
    assert "removes 0.34 of the blocks" in failed
    with pytest.raises(CheckFailed, match="were to be chosen"):
        walker = BlockWalker(tiny_model("llama"))
        TwiceTheSame().prune(walker, {"any": Sparsity(0.67)})
    with pytest.raises(CheckFailed, match="was to stay as it was"):
        prunebench.prune(
            tiny_model("llama"), method=AlsoZeroes, sparsity=0.34, calibration=tiny_tokens()
        )


# ---------------------------------------------------------------- the command


def test_a_run_saves_a_smaller_folder_with_its_share_beside_the_zeros(cli, tiny_run, tmp_path):
    folder = tmp_path / "smaller"
    command = (*tiny_run, "-m", "depth", "--sparsity", "0.34")
    out = cli(*command, "--save-model", str(folder), "--json").stdout
    row = Result.model_validate_json(out)
    removal = row.sparsity.removal
    assert len(removal.blocks) == 1 and removal.blocks_before == 3
    assert sorted(score.block for score in removal.scores) == [0, 1, 2]
    assert row.removed_ratio == pytest.approx(1 / 3) and row.sparsity.realised_ratio < 0.01
    assert row.spec.within_block is None and row.spec.calibration is not None
    config = json.loads((folder / "config.json").read_text("utf-8"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert config["num_hidden_layers"] == len(loaded.model.layers) == 2
    assert hash_weights(loaded) == row.model.evaluated_sha256
    left = sum(parameter.numel() for parameter in loaded.parameters())
    assert row.model.parameters - removal.removed_parameters == left
    assert "decoder blocks are removed" in (folder / "README.md").read_text("utf-8")
    # the saved folder is a model like any other, and gets the same score
    again = list(tiny_run)
    again[again.index("--model") + 1] = str(folder)
    dense = Result.model_validate_json(cli(*again, "-m", "dense", "--json").stdout)
    assert dense.scores[0].value == row.scores[0].value
    cli(*tiny_run, "-m", "magnitude", "--sparsity", "0.34")
    where = ("--results-dir", tiny_run[tiny_run.index("--results-dir") + 1])
    table = cli("compare", *where, "model=tiny-llama").stdout
    assert "0.34 of the blocks" in table and "removed" in table and "33.3%" in table
    # alone in its section: nothing to be better than
    assert not any(line.startswith("*") for line in table.splitlines())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sparsity", "2:4"), "2:4 is a pattern"),
        (("--sparsity", "0.01"), "removes none of 3 blocks"),
        (("--sparsity", "0.9"), "removes all of 3 blocks"),
        (("--weights", "disk"), "--weights disk does not go with depth"),
        (("--recover", "block"), "--recover block does not go"),
        (("--recover", "distill"), "--recover distill does not go"),
        (("--allocation", "owl"), "--allocation owl does not go"),
        (("--save-masks", "m.npz"), "--save-masks does not go"),
        (("--save-allocation", "a.json"), "--save-allocation does not go"),
        (("--execute", "sparse24", "--dtype", "bfloat16"), "--execute sparse24 does not go"),
        (("--set", "score=last", "--set", "order=iterative"), "order=iterative scores"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_a_weight_is_loaded(
    cli, tiny_run, options, words
):
    sparsity = () if "--sparsity" in options else ("--sparsity", "0.34")
    done = cli(*tiny_run, "-m", "depth", *sparsity, *options, code=2)
    assert words in done.stderr


def test_the_error_names_the_shares_that_there_are():
    with pytest.raises(UsageError) as error:
        count_of_blocks(Sparsity(0.001), 30)
    assert error.value.fix == "use --sparsity 0.033 to 0.97, or 0"


def test_a_dry_run_says_how_many_blocks_would_go(cli, tiny_run):
    out = cli(*tiny_run, "-m", "depth", "--sparsity", "0.67", "--dry-run").stdout
    assert "2 of 3 blocks would be removed" in out


def continued(model, tokens):
    """The logits of the last token, when the others are in the cache."""
    with torch.no_grad():
        first = model(input_ids=tokens[:, :-1], use_cache=True)
        return model(input_ids=tokens[:, -1:], past_key_values=first.past_key_values).logits[:, -1]


@pytest.mark.slow
def test_every_architecture_loses_a_block_and_keeps_its_cache_or_is_refused_by_name():
    tokens, smaller = tiny_tokens(samples=1), set()
    for model_type in sorted({*model_types()} - NOT_BUILT.keys()):
        model = tiny_architecture(model_type)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        try:
            dense_gap = (continued(model, tokens) - logits(model, tokens)[:, -1]).abs().max()
        except Exception:  # its cache does not work in its dense form, with these tiny shapes
            dense_gap = None
        try:
            removal = remove_blocks(model, [1], tokens)
        except IncompatibleData as error:
            assert error.where or "a block returns" in error.what, model_type
            after = dict(model.named_parameters())
            assert after.keys() == before.keys(), model_type
            assert all(torch.equal(before[name], after[name]) for name in before), model_type
            continue
        assert removal.parameters > 0, model_type
        if dense_gap is not None and dense_gap < 1e-4:
            gap = (continued(model, tokens) - logits(model, tokens)[:, -1]).abs().max()
            assert gap < 1e-4, (model_type, gap)
        smaller.add(model_type)
    dense = {"llama", "gpt2", "gpt_neo", "gemma2", "olmo3", "smollm3", "opt", "bloom", "falcon"}
    assert dense | {"phi3", "cohere2", "qwen2_moe", "deepseek_v3", "mamba", "lfm2"} <= smaller
    assert not smaller & {"zamba", "zamba2", "diffllama", "gemma3n_text", "jamba"}
