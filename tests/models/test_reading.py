"""Reading a model: all of it and nothing else by every way in, or it is refused by name."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunebench
from prunebench.checkpoints.packed24 import unpacked, write_packed
from prunebench.errors import IncompatibleData, PrunebenchError
from prunebench.models.checkpoint_keys import check_tensors, find_places
from prunebench.models.complete import is_harmless
from prunebench.models.hashing import hash_weights
from prunebench.models.load import load_config, skeleton
from prunebench.models.safetensors_files import stored_tensors, weight_files
from prunebench.models.source import LocalModel, ModelSource, fetch_model, find_model
from prunebench.progress import Silent
from prunebench.testing.tiny_models import _LLAMA_LIKE, tiny_model
from tests.gguf_files import (
    gguf_tensors,
    split_gguf,
    write_gguf,
)
from tests.ways_in import disk, resident, to_fp8

PACKAGE = Path(__file__).parents[2] / "prunebench"


def skeleton_alone(folder: Path, tmp_path: Path):
    model = skeleton(load_config(folder))
    check_tensors(model, stored_tensors(weight_files(folder)))
    return None


def from_shards(folder: Path, tmp_path: Path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ("model-1.safetensors", "model-2.safetensors")
    where = {name: files[place % 2] for place, name in enumerate(names)}
    for file in files:
        save_file(
            {n: tensors[n] for n in names if where[n] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return resident(folder, tmp_path)


def packed(folder: Path, tmp_path: Path):
    tensors = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.o_proj.weight"].view(-1, 4)[:, 1::2] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    target = tmp_path / "packed"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    write_packed(stored_tensors(weight_files(folder)), target, progress=Silent())
    local = LocalModel(ModelSource("p", "folder", str(target)), target, "sha256:0")
    resident(unpacked(local, Silent()).path, tmp_path)


def fp8(folder: Path, tmp_path: Path):
    to_fp8(folder)
    local = LocalModel(ModelSource("f", "folder", str(folder)), folder, "sha256:1")
    resident(unpacked(local, Silent()).path, tmp_path)


def gguf(folder: Path, tmp_path: Path, *, parts: int = 1):
    config = load_config(folder)
    tensors = gguf_tensors(config, load_file(folder / "model.safetensors"))
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors)
    if parts > 1:
        file = split_gguf(file, parts=parts)[1]
    local = fetch_model(find_model(str(file)), Silent())
    return resident(local.path, tmp_path)


def gguf_in_parts(folder: Path, tmp_path: Path):
    return gguf(folder, tmp_path, parts=3)


def by_python(folder: Path, tmp_path: Path):
    return prunebench.load(folder)


WAYS = (resident, disk, skeleton_alone, from_shards, packed, fp8, gguf, gguf_in_parts, by_python)


def lose_one(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add_a_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def add_a_block(tensors):
    fourth = {k.replace(".2.", ".3."): v for k, v in tensors.items() if ".layers.2." in k}
    tensors |= {name: tensor.clone() for name, tensor in fourth.items()}


def cut_one(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:60].contiguous()


MISFITS = {
    lose_one: r"lacks 1 tensors.*(layers\.1\.mlp\.up_proj|blk\.1\.ffn_up)",
    add_a_bias: r"holds 1 tensors that the model has no place for.*q(_proj)?\.bias",
    add_a_block: r"holds 9 tensors that the model has no place for.*(layers|blk)\.3\.",
    cut_one: r"does not fit its config.*up_proj.weight is \[60, 32\], the model has \[64, 32\]",
}


def changed(tiny_folder, tmp_path, change):
    """A copy of the tiny Llama with other tensors in its file."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda one: one.__name__)
def test_no_way_in_makes_up_or_leaves_out_a_tensor(way, misfit, tiny_folder, tmp_path):
    folder = changed(tiny_folder, tmp_path, misfit)
    with pytest.raises(IncompatibleData) as error:
        way(folder, tmp_path)
    assert re.search(MISFITS[misfit], str(error.value), re.DOTALL)


@pytest.mark.parametrize("way", WAYS, ids=lambda one: one.__name__)
def test_every_way_in_reads_a_whole_model(way, tiny_folder, tmp_path):
    model = way(changed(tiny_folder, tmp_path, lambda tensors: None), tmp_path)
    if model is not None:
        assert hash_weights(model) == hash_weights(tiny_model("llama"))


AUTO = re.compile(r"AutoModel\w*\.from_")


def test_few_modules_build_a_model_with_transformers():
    """A new one belongs into `WAYS`, and must end in `require_complete`."""
    having = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and AUTO.match(ast.unparse(node.func)):
                having.add(str(path.relative_to(PACKAGE)))
    ours = {
        "models/load.py",
        "models/disk.py",
        "models/gguf.py",
        "testing/tiny_models.py",
        "api/models.py",
    }
    assert having == ours


def test_a_run_refuses_what_the_model_has_no_place_for(cli, tiny_run, tiny_folder, tmp_path):
    folder = changed(tiny_folder, tmp_path, add_a_block)
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    for weights in ("resident", "disk"):
        outcome = cli(*tiny_run, "-m", "dense", "--weights", weights, code=4)
        assert "holds 9 tensors that the model has no place for" in outcome.output
        assert "load  " not in outcome.output  # seen at the check


def test_a_tensor_that_is_there_twice_is_refused(tiny_folder, tmp_path):
    def twice(tensors):
        tensors["layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] + 1

    folder = changed(tiny_folder, tmp_path, twice)
    for way in (resident, disk, skeleton_alone):
        with pytest.raises(IncompatibleData, match=r"holds model\.layers\.0\S* of the model twice"):
            way(folder, tmp_path)


def test_a_gap_in_a_row_of_experts_is_refused(tmp_path):
    """Experts 0, 1, 3, 4 would be stacked as 0, 1, 2, 3."""
    folder = tmp_path / "m"
    tiny_model("mixtral").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    moved = {k.replace("experts.3.", "experts.4.").replace("experts.2.", "experts.3."): v
             for k, v in tensors.items()}  # fmt: skip
    assert moved.keys() != tensors.keys()
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    for way in (resident, skeleton_alone):
        with pytest.raises(IncompatibleData, match=r"lacks \d tensors of the model") as error:
            way(folder, tmp_path)
        assert "experts.2." in error.value.where


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_are_not_read_as_weights(dtype, tiny_folder, tmp_path):
    def to_integers(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = torch.ones_like(tensors[name], dtype=dtype)

    folder = changed(tiny_folder, tmp_path, to_integers)
    for way in (resident, disk, skeleton_alone):
        with pytest.raises(IncompatibleData, match="is quantized"):
            way(folder, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 128, 128), "h.1.attn.masked_bias": ()}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": (1, 1, 128, 128)}),
        ("falcon", {"transformer.h.0.self_attention.rotary.inv_freq": (4,)}),
    ],
)
def test_buffers_that_are_computed_anyway_are_harmless(architecture, extra, tmp_path):
    folder = tmp_path / "m"
    model = tiny_model(architecture)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(shape) for name, shape in extra.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for way in (resident, disk):
        assert hash_weights(way(folder, tmp_path)) == hash_weights(model)
    stored = stored_tensors(weight_files(folder))
    assert find_places(model, stored).unused == {}
    assert set(extra) <= stored.keys()


def test_a_bias_is_no_causal_mask():
    assert is_harmless("h.0.attn.bias", (1, 1, 8, 8))
    assert not is_harmless("h.0.attn.bias", (32,))
    assert not is_harmless("h.0.attn.bias", None)
    assert not is_harmless("h.0.attn.c_attn.bias", (96,))


def tiny_qwen3_5(folder):
    """A text model whose class declares a vision tower and prediction blocks that it leaves out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        **_LLAMA_LIKE, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_5_text", **options)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def test_what_an_architecture_declares_unused_is_told_apart(tmp_path):
    folder = tmp_path / "m"
    model = tiny_qwen3_5(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "mtp.fc.weight": torch.ones(4, 4),
        "model.visual.blocks.0.attn.proj.bias": torch.ones(4),
    }
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    stored = stored_tensors(weight_files(folder))
    for way in (resident, disk):
        assert set(find_places(way(folder, tmp_path), stored).unused) == set(extra)
    places = find_places(model, stored)
    assert (places.missing, places.refused) == (set(), set())
    save_file(
        tensors | {"audio.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"}
    )
    for way in (resident, disk):
        with pytest.raises(IncompatibleData, match="the first one is audio"):
            way(folder, tmp_path)


@pytest.mark.slow
def test_no_architecture_of_transformers_is_refused_by_mistake(tmp_path):
    """Whatever a causal model saves, it is made of: nothing is missing, nothing has no place."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    small = {
        **_LLAMA_LIKE, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
        "n_layer": 3, "n_embd": 32, "n_head": 4, "ffn_dim": 64, "d_model": 32, "n_layers": 3,
    }  # fmt: skip
    checked, refused = 0, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
            text = config.get_text_config()
            for name in small.keys() & vars(text).keys():
                setattr(text, name, small[name])
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 20e6:
                continue
            model = AutoModelForCausalLM.from_config(config)
            model.save_pretrained(tmp_path / kind)
        except Exception:
            continue
        try:
            check_tensors(model, stored_tensors(weight_files(tmp_path / kind)))
            checked += 1
        except PrunebenchError as error:
            refused[kind] = str(error)
        shutil.rmtree(tmp_path / kind)
    assert refused == {}
    assert checked > 80
