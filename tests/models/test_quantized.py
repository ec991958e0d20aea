"""Quantised checkpoints and packages that are not there: seen at the check, told by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.packed24 import dense_tensors, kind_of
from prunebench.errors import IncompatibleData
from prunebench.models.hashing import hash_weights
from prunebench.models.load import load_model
from prunebench.models.stored_config import plain, quantization_of
from tests.gguf_files import (
    same_weights,
)
from tests.ways_in import CPU, dequantized, disk, resident, to_fp8, with_config

QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "a-method-of-tomorrow": {"quant_method": "a-method-of-tomorrow"},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_checkpoint_is_refused_by_the_name_of_its_method(
    method, tiny_folder, tmp_path, cli, tiny_run
):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    with_config(folder, quantization_config=QUANTIZED[method])
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    outcome = cli(*tiny_run, "-m", "dense", code=4)
    assert f"is quantized with {method}: give the unquantized checkpoint" in outcome.output
    assert "load  " not in outcome.output  # seen at the check
    with pytest.raises(IncompatibleData, match=f"quantized with {method}"):
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


@pytest.mark.parametrize("block", [(32, 32), (16, 8), (24, 20)])
def test_fp8_is_read_as_the_product_with_its_scales(block, tiny_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    dense = to_fp8(folder, block)
    assert kind_of(folder) == "fp8"
    path = dequantized(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(path, dtype=dtype, device=CPU)
        ours = dict(model.named_parameters())
        assert all(torch.equal(ours[name], dense[name].to(dtype)) for name in ours)
        assert not hasattr(model.config, "quantization_config")
    assert hash_weights(disk(path, tmp_path)) == hash_weights(resident(path, tmp_path))


def test_fp8_is_read_as_transformers_reads_it(tiny_folder, tmp_path):
    """A second reader: its own dequantization, where the blocks divide the matrix."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    to_fp8(folder)
    settings = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    other = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    )
    assert same_weights(resident(dequantized(folder), tmp_path), other)


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
        dtypes = {tensor.dtype for tensor in dense_tensors(Path(weights)).values()}
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
        dequantized(folder)


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

    from prunebench.cli.exit_codes import guarded

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


def test_a_damaged_tokenizer_is_no_bug(tiny_folder, tmp_path, cli, tiny_run):
    """The library tokenizers raises a plain Exception."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    broken = {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}
    document = {"version": "1.0", "added_tokens": [], "model": broken}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tiny_run[tiny_run.index("--model") + 1] = str(folder)
    outcome = cli(*tiny_run, "-m", "dense", code=3)
    assert "has no usable tokenizer" in outcome.output
    assert "out of vocabulary" in outcome.output
