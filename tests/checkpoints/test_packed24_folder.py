"""Folders of packed weights: what is written, what is read, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.derived import read_tensor
from prunebench.checkpoints.packed24 import dense_tensors
from prunebench.results.store import ResultStore
from prunebench.sparse24.packed import unpack24
from prunebench.testing import tiny_model
from tests.factories import random_24


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder, eval_file):
    """A tiny Llama pruned to 2:4 in bfloat16: `ck`, its result in `results`, and `packed`."""
    from typer.testing import CliRunner

    from prunebench.cli import app

    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNEBENCH_CACHE", str(folder / "cache"))
        for line in (
            f"run -M {tiny_folder} --ppl file:{eval_file} --ppl-seqlen 64 -m magnitude "
            f"--sparsity 2:4 --dtype bfloat16 --save-model {folder}/ck "
            f"--results-dir {folder}/results",
            f"export {folder}/ck -o {folder}/packed --to packed24",
        ):
            outcome = CliRunner().invoke(app, line.split())
            assert outcome.exit_code == 0, outcome.output
    return folder


@pytest.fixture
def checkpoint(cli, built, tmp_path):
    """The folder `ck`, to be changed at will, and its result."""
    shutil.copytree(built / "ck", "ck")
    shutil.copytree(built / "results", tmp_path / "results")
    return Path("ck")


@pytest.fixture
def packed(checkpoint, built):
    """The folder `packed`, to be changed at will."""
    shutil.copytree(built / "packed", "packed")
    return Path("packed")


def weights(folder):
    return {name: read_tensor(tensor) for name, tensor in dense_tensors(Path(folder)).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_packed_folder_and_back(cli, checkpoint, tmp_path):
    outcome = cli("export", "ck", "-o", "packed", "--to", "packed24")
    assert "21 matrices are packed" in outcome.stdout
    assert "stays dense: model.embed_tokens.weight" in outcome.stdout
    stored = load_file("packed/packed24.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored[f"{name}.values24"].shape == (32, 32)
    assert stored[f"{name}.codes24"].shape == (32, 8)
    assert same(weights("packed"), load_file("ck/model.safetensors"))
    card = Path("packed/README.md").read_text()
    assert "2:4 matrices are packed" in card and "zeros are stored in place" not in card
    cli("export", "packed", "-o", "back", "--to", "dense")
    assert same(load_file("back/model.safetensors"), load_file("ck/model.safetensors"))
    names = [{path.name for path in Path(folder).iterdir()} for folder in ("back", "packed")]
    packed_names = {"packed24.json", "packed24.safetensors", "packed24.safetensors.index.json"}
    assert names[0] ^ names[1] == packed_names | {"model.safetensors"}
    assert Path("back/config.json").read_text() == Path("ck/config.json").read_text()
    again = cli("export", "packed", "-o", "again", "--json").stdout
    assert json.loads(again)["linked"] == ["packed24.safetensors"]
    for path in Path("packed").iterdir():
        if path.name != "README.md":  # its code names the folder
            assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name


def test_the_bytes_are_said(cli, checkpoint):
    document = json.loads(cli("export", "ck", "-o", "p", "--to", "packed24", "--json").stdout)
    packing = document["packing"]
    linears = sum(w.numel() for n, w in weights("ck").items() if n in packing["packed"])
    assert packing["dense_bytes"] - packing["packed_bytes"] == 2 * linears * (1 - 0.5625)
    assert document["sizes"] if "sizes" in document else document["files"]["packed24.json"]


def test_in_shards(cli, packed, checkpoint, monkeypatch):
    import prunebench.checkpoints.packed24 as module

    monkeypatch.setattr(module, "_SHARD_BYTES", 30_000)
    cli("export", "ck", "-o", "shards", "--to", "packed24")
    assert len(list(Path("shards").glob("packed24-*-of-*.safetensors"))) > 2
    assert same(weights("shards"), weights("packed"))
    cli("export", "shards", "-o", "dense", "--to", "dense")
    assert Path("dense/model.safetensors.index.json").is_file()
    assert same(weights("dense"), weights("ck"))


def test_a_run_and_inspect_take_it(cli, tiny_run, packed, tmp_path):
    rest = tiny_run[3:]
    cli("run", "--model", "packed", *rest, "-m", "dense", "--dtype", "bfloat16")
    results, _ = ResultStore(tmp_path / "results").read()
    pruned = next(r for r in results if r.spec.method == "magnitude")
    loaded = next(r for r in results if r.spec.method == "dense")
    assert loaded.model.evaluated_sha256 == pruned.model.evaluated_sha256
    assert loaded.scores[0].value == pruned.scores[0].value
    outcome = cli("inspect", "packed", "--pattern", "2:4")
    assert "2:4 holds in 21 of 21 matrices" in outcome.stdout
    assert "stored as packed24" in outcome.stdout
    same_rows = [json.loads(cli("inspect", x, "--json").stdout)["pruned"] for x in ("ck", "packed")]
    assert same_rows[0] == same_rows[1]


# ---------------------------------------------------------------- what is refused


def test_float32_is_refused(cli, tiny_run):
    cli(*tiny_run, *["-m", "magnitude", "--sparsity", "2:4", "--save-model", "f32"])
    output = cli("export", "f32", "-o", "p", "--to", "packed24", code=4).output
    assert "is float32, and 2:4 is packed in 16 bits" in output and "--dtype bfloat16" in output
    assert not Path("p").exists()


def test_what_is_not_2_4_is_refused_with_layer_and_group(cli, tiny_run):
    arguments = ["-m", "magnitude", "--sparsity", "0.5", "--dtype", "bfloat16"]
    cli(*tiny_run, *arguments, "--save-model", "half")
    output = cli("export", "half", "-o", "p", "--to", "packed24", code=4).output
    assert "model.layers.0.mlp.down_proj.weight is not 2:4: row 0, columns" in output
    assert not Path("p").exists()


def test_a_wrong_format_is_refused(cli, checkpoint):
    assert (
        "did you mean 'packed24'?" in cli("export", "ck", "-o", "x", "--to", "pack", code=2).output
    )


def broken(change):
    path = Path("packed/packed24.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{NAME}.codes24"), f"misses 1 tensors, the first is {NAME}.codes24"),
        (lambda t: t.pop("model.norm.weight"), "misses 1 tensors, the first is model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "has more than its index: 1 tensors"),
        (
            lambda t: t.update({f"{NAME}.values24": torch.zeros(4, 4, dtype=torch.bfloat16)}),
            f"{NAME}.values24 is bfloat16 [4, 4], packed24.json says bfloat16 [32, 32]",
        ),
        (
            lambda t: t.update({f"{NAME}.codes24": t[f"{NAME}.codes24"] * 0}),
            f"{NAME} is not a packed 2:4 matrix",
        ),
        (
            lambda t: t.update({f"{NAME}.codes24": t[f"{NAME}.codes24"].to(torch.int16)}),
            f"{NAME}.codes24 is int16",
        ),
    ],
)
def test_a_damaged_folder(cli, packed, change, says):
    broken(change)
    assert says in cli("inspect", "packed", code=4).output


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "packed24", "version": 2, "tensors": {}}', '{"tensors": 3}']
)
def test_a_damaged_index(cli, packed, text):
    Path("packed/packed24.json").write_text(text)
    assert "packed24.json" in cli("inspect", "packed", code=4).output


def test_the_weights_of_another_model(cli, tiny_run, packed):
    config = json.loads(Path("packed/config.json").read_text()) | {"num_hidden_layers": 4}
    Path("packed/config.json").write_text(json.dumps(config))
    arguments = ["run", "--model", "packed", *tiny_run[3:], "-m", "dense", "--dtype", "bfloat16"]
    output = cli(*arguments, code=4).output
    assert "lacks 9 tensors of the model" in output and "layers.3" in output


def test_other_weights_than_those_scored_are_not_exported(cli, packed):
    broken(lambda t: t[f"{NAME}.values24"].mul_(2))
    output = cli("export", "packed", "-o", "x", "--to", "dense", code=4).output
    assert "are not those that were scored" in output


# ---------------------------------------------------------------- GPT-2, and sparse-24-bitmask


def test_matrices_stored_as_in_out_are_packed_across(cli, tmp_path, byte_tokenizer):
    model = tiny_model("gpt2").to(torch.bfloat16)
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.data = random_24(weight.shape[1], weight.shape[0] // 4).T.contiguous()
    model.save_pretrained("gpt2")
    byte_tokenizer.save_pretrained("gpt2")
    outcome = cli("export", "gpt2", "-o", "packed", "--to", "packed24")
    assert "1 matrices are packed" in outcome.stdout
    assert "nothing says how it was made" in outcome.stdout
    assert same(weights("packed"), load_file("gpt2/model.safetensors"))


def as_bitmask(source, target):
    """Write a checkpoint as compressed-tensors does, by another formula than ours."""
    import numpy as np

    shutil.copytree(source, target)
    tensors = {}
    for name, weight in load_file(Path(target, "model.safetensors")).items():
        if "layers" not in name or "norm" in name:
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        keep = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
        keep.scatter_(1, weight.float().abs().view(-1, 4).topk(2, dim=1).indices, True)
        keep = keep.view(weight.shape)
        tensors[f"{module}.compressed"] = weight[keep].reshape(weight.shape[0], -1)
        tensors[f"{module}.bitmask"] = torch.from_numpy(
            np.packbits(keep.numpy(), axis=-1, bitorder="little")
        )
        tensors[f"{module}.shape"] = torch.tensor(weight.shape).reshape(-1, 1)
    save_file(tensors, Path(target, "model.safetensors"), {"format": "pt"})
    config = json.loads(Path(target, "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    }
    Path(target, "config.json").write_text(json.dumps(config))
    Path(target, "prunebench.json").unlink()


def test_a_checkpoint_of_compressed_tensors(cli, tiny_run, checkpoint, tmp_path):
    as_bitmask("ck", "bitmask")
    assert same(weights("bitmask"), weights("ck"))
    assert "stored as sparse-24-bitmask" in cli("inspect", "bitmask", "--pattern", "2:4").stdout
    cli("run", "--model", "bitmask", *tiny_run[3:], "-m", "dense", "--dtype", "bfloat16")
    results, _ = ResultStore(tmp_path / "results").read()
    assert len({result.model.evaluated_sha256 for result in results}) == 1
    cli("export", "bitmask", "-o", "packed", "--to", "packed24")
    assert same(weights("packed"), weights("ck"))
    settings = json.loads(Path("packed/config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "packed24", "version": 1, "dtype": "bfloat16"}


def test_damaged_checkpoints_of_compressed_tensors(cli, checkpoint):
    as_bitmask("ck", "bitmask")
    config = json.loads(Path("bitmask/config.json").read_text())
    tensors = load_file("bitmask/model.safetensors")
    module = NAME.removesuffix(".weight")
    lacking = {name: tensor for name, tensor in tensors.items() if name != f"{module}.bitmask"}
    save_file(lacking, "bitmask/model.safetensors")
    output = cli("inspect", "bitmask", code=4).output
    assert f"{NAME} cannot be read: {module}.bitmask is missing" in output
    save_file(
        tensors | {f"{module}.bitmask": tensors[f"{module}.bitmask"] | 255},
        "bitmask/model.safetensors",
    )
    assert "places for" in cli("inspect", "bitmask", code=4).output
    save_file(tensors | {f"{module}.shape": torch.tensor([32, 32])}, "bitmask/model.safetensors")
    assert "is not 2:4 in sparse-24-bitmask" in cli("inspect", "bitmask", code=4).output
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    Path("bitmask/config.json").write_text(json.dumps(config))
    assert "is quantized too" in cli("inspect", "bitmask", code=4).output


def test_unpacking_is_exact_for_the_packed_form_itself(packed):
    stored = load_file(packed / "packed24.safetensors")
    from prunebench.sparse24.packed import Packed24

    dense = unpack24(Packed24(stored[f"{NAME}.values24"], stored[f"{NAME}.codes24"]))
    assert torch.equal(dense, weights("ck")[NAME])
