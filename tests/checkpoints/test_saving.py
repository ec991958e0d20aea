"""What is saved is what was scored: read again after every save, else nothing is left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunebench.checkpoints.save as save_module
import prunebench.models.verify as verify
from prunebench.errors import SaveError
from prunebench.models.carried import clean_tokenizer_config, write_config
from prunebench.models.hashing import hash_weights
from prunebench.models.load import load_model
from prunebench.progress import Silent
from tests.factories import WAYS, line_of_run
from tests.model_folders import EXTRAS, all_tensors, bits, scored

NAME = "model.layers.1.mlp.down_proj.weight"


PAIRS = [
    (way, name)
    for way in WAYS
    for name in ("tied", "tower", "mtp", "mixture")
    if (way, name) != ("disk", "mixture")  # --weights disk refuses what transformers rebuilds
]


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_every_way_out_keeps_the_weights_and_all_else_as_it_came(save, built, cli, way, name):
    save(way, name)
    model = built(name) / "model"
    folder = Path("out")
    if way.startswith("packed24"):
        cli("export", "out", "-o", "plain", "--to", "dense")
        folder = Path("plain")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert hash_weights(loaded) == scored(built(name))
    source, saved = all_tensors(model), all_tensors(folder)
    assert saved.keys() == source.keys()
    beside = [key for key in source if "mtp." in key or "visual." in key]
    assert all(bits(saved[key]) == bits(source[key]) for key in beside)
    config, before = (json.loads((d / "config.json").read_text()) for d in (folder, model))
    assert {k: v for k, v in config.items() if k != "text_config"} == {
        k: v for k, v in before.items() if k != "text_config"
    }
    for name in [*EXTRAS, "tokenizer.json", "tokenizer_config.json"]:
        assert (folder / name).read_bytes() == (model / name).read_bytes(), name


@pytest.mark.parametrize("weights", ["resident", "disk"])
def test_a_checkpoint_of_images_and_text_still_loads_as_one(save, built, weights):
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(built("tower") / "model").state_dict()
    outcome = save(weights, "tower")
    assert "33 tensors (0.0 MB) that the text model does not use were carried" in outcome.output
    saved, info = AutoModelForImageTextToText.from_pretrained("out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    changed = [k for k, v in saved.state_dict().items() if bits(v) != bits(whole[k])]
    assert changed and all("language_model.layers" in key for key in changed)


# ---------------------------------------------------------------- tokenizer, config


def test_a_tokenizer_of_a_gguf_file_says_nothing_of_how_it_was_read(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    before = json.loads(path.read_text())
    assert before["model_max_length"] > 1e29  # what transformers writes when it does not know
    marks = {"is_local": True, "local_files_only": True, "name_or_path": "/tmp/x"}
    path.write_text(json.dumps(before | marks))
    clean_tokenizer_config(tmp_path)
    del before["model_max_length"]
    assert json.loads(path.read_text()) == {
        key: value for key, value in before.items() if key not in marks
    }
    path.write_text(json.dumps({"model_max_length": 8192}))
    clean_tokenizer_config(tmp_path)
    assert json.loads(path.read_text()) == {"model_max_length": 8192}


def test_the_dtype_of_an_old_config_is_written_where_it_was(cli, eval_file, tmp_path, tiny_folder):
    """`torch_dtype` is what older versions and other programs read."""
    shutil.copytree(tiny_folder, "model")
    config = json.loads(Path("model/config.json").read_text())
    del config["dtype"]
    Path("model/config.json").write_text(json.dumps(config | {"torch_dtype": "float32", "my": 1}))
    cli(*line_of_run("model", "out", eval_file))
    saved = json.loads(Path("out/config.json").read_text())
    assert (saved["torch_dtype"], saved["my"], "dtype" in saved) == ("bfloat16", 1, False)


def test_a_folder_that_another_program_made_meanwhile_is_not_taken_for_ours(
    cli, eval_file, tiny_folder, faulty
):
    def another(folder):
        Path("out").mkdir()
        Path("out/theirs").write_text("x")

    faulty(another)
    output = cli(*line_of_run(tiny_folder, "out", eval_file), code=5).output
    assert "out exists already" in output and "while this program was at work" in output
    assert [path.name for path in Path("out").iterdir()] == ["theirs"]


def test_zeros_that_packing_would_change_are_not_packed_as_scored(cli, eval_file, tiny_folder):
    """-0.0 is packed as +0.0: the same product, and other bytes than those that were scored."""
    shutil.copytree(tiny_folder, "model")
    tensors = load_file("model/model.safetensors")
    tensors[NAME].view(-1, 4)[:, :2] = -0.0
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    line = line_of_run("model", "ck", eval_file)
    line[line.index("magnitude")] = "dense"
    at = line.index("--sparsity")
    del line[at : at + 2]
    cli(*line)
    output = cli("export", "ck", "-o", "out", "--to", "packed24", code=4).output
    assert "are -0.0, which is packed as +0.0" in output
    assert not Path("out").exists()


# ---------------------------------------------------------------- every architecture


def small_model(kind):
    """Build a tiny random model of a kind that transformers knows; None where it cannot be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunebench.testing.tiny_models import _LLAMA_LIKE

    small = {
        **_LLAMA_LIKE, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
        "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_layer": 3, "n_embd": 32,
        "n_head": 4, "ffn_dim": 64, "d_model": 32, "n_layers": 3,
    }  # fmt: skip
    try:
        config = AutoConfig.for_model(kind)
        text = config.get_text_config()
        for name in small.keys() & vars(text).keys():
            setattr(text, name, small[name])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > 20e6:
            return None
        return AutoModelForCausalLM.from_config(config)
    except Exception:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_architecture_of_transformers_is_refused_by_mistake(tmp_path, dtype):
    """Whatever plain transformers loads from a saved folder is what its files are hashed as."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name, checked, refused = str(dtype).removeprefix("torch."), 0, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        built = small_model(kind)
        if built is None:
            continue
        source, target = tmp_path / kind, tmp_path / f"{kind}-saved"
        try:
            built.save_pretrained(source)
            model = load_model(source, dtype=dtype, device=torch.device("cpu"))
            sha256 = hash_weights(model)
        except Exception:
            continue  # it could not be run either
        target.mkdir()
        save_module._save_resident(model, target)
        write_config(source, target, model, dtype=name)
        expected = verify.expected_of_model(model, sha256, name, {})
        try:
            verify.require_saved(target, expected, name=target, progress=Silent())
        except SaveError as error:
            refused[kind] = error.where
        loaded = AutoModelForCausalLM.from_pretrained(target)
        if (hash_weights(loaded) == sha256) != (kind not in refused):
            refused[kind] = "plain transformers loads something else"
        checked += 1
        shutil.rmtree(source)
        shutil.rmtree(target)
    assert refused == {}
    assert checked > 80
