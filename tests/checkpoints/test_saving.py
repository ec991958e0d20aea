"""What is saved is what was scored: read again after every save, else nothing is left."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunebench.checkpoints.packed24 as packed_folder
import prunebench.checkpoints.save as save_module
import prunebench.models.verify as verify
from prunebench.errors import SaveError
from prunebench.models.carried import clean_tokenizer_config, write_config, write_index
from prunebench.models.load import hash_weights, load_model
from prunebench.models.safetensors_files import check_weight_files, weight_files
from prunebench.progress import Silent
from prunebench.results.store import ResultStore
from tests.factories import line_of_run
from tests.model_folders import EXTRAS, MODELS, add_extras

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def built(tmp_path_factory, byte_tokenizer, eval_file):
    """Every model once: `model`, pruned as `ck`, packed as `packed`, its result in `results`."""
    from typer.testing import CliRunner

    from prunebench.cli import app

    @functools.cache
    def build(name):
        root = tmp_path_factory.mktemp(name)
        add_extras(MODELS[name](root / "model", byte_tokenizer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PRUNEBENCH_CACHE", str(root / "cache"))
            run = line_of_run(root / "model", root / "ck", eval_file)
            for line in (
                [*run, "--results-dir", root / "results"],
                ["export", root / "ck", "-o", root / "packed", "--to", "packed24"],
            ):
                outcome = CliRunner().invoke(app, [str(word) for word in line])
                assert outcome.exit_code == 0, outcome.output
        return root

    return build


def all_tensors(folder):
    tensors = {}
    for path in weight_files(Path(folder)):
        tensors |= load_file(path)
    return tensors


def bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
    )


def scored(root):
    return ResultStore(root / "results").read()[0][-1].model.evaluated_sha256


# ---------------------------------------------------------------- every way out


WAYS = ("resident", "disk", "export", "packed24", "dense", "packed24 of strangers",
        "dense of strangers")  # fmt: skip


@pytest.fixture
def save(cli, built, eval_file):
    """Write `out` in one of the ways in which a folder is written."""

    def invoke(way, name, code=0):
        root = built(name)
        if way in ("resident", "disk"):
            line = line_of_run(root / "model", "out", eval_file, "--weights", way, "--force")
            return cli(*line, code=code)
        kind, _, strange = way.partition(" of ")
        source = root / ("packed" if kind == "dense" else "ck")
        if strange:  # nothing says how it was made
            shutil.copytree(source, "stranger")
            source = Path("stranger")
            (source / "prunebench.json").unlink()
        to = () if kind == "export" else ("--to", kind)
        return cli("export", source, *to, "-o", "out", "--force", code=code)

    return invoke


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


# ---------------------------------------------------------------- faults of a writer


def change(folder, edit):
    """Rewrite the first weight file of a folder that has what `edit` looks for."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        before = dict(tensors)
        edit(tensors)
        if tensors.keys() != before.keys() or any(tensors[k] is not before[k] for k in tensors):
            path.unlink()  # it may be a hard link: its source must stay as it is
            save_file(tensors, path, {"format": "pt"})
            return
    raise AssertionError("nothing was changed")


def first(tensors, word):
    return next((key for key in sorted(tensors) if word in key), None)


def flip_a_bit(word):
    def edit(tensors):
        name = first(tensors, word)
        if name:
            tensors[name] = tensors[name].clone()
            flat = tensors[name].view(-1).view(torch.uint8)
            flat[0] ^= 1

    return lambda folder: change(folder, edit)


def drop_a_tensor(word):
    def edit(tensors):
        tensors.pop(first(tensors, word), None)

    def damage(folder):
        change(folder, edit)
        if (folder / "model.safetensors.index.json").exists():
            write_index(folder, [path.name for path in weight_files(folder)])

    return damage


def cast(word):
    def edit(tensors):
        name = first(tensors, word)
        if name:
            tensors[name] = tensors[name].to(torch.float32)

    return lambda folder: change(folder, edit)


def lose_the_tie(folder):
    edit_config(folder, tie_word_embeddings=False)


def part_the_tied(folder):
    def edit(tensors):
        name = first(tensors, "embed_tokens")
        if name:
            tensors["lm_head.weight"] = tensors[name] + 1

    change(folder, edit)
    if (folder / "model.safetensors.index.json").exists():
        write_index(folder, [path.name for path in weight_files(folder)])
    index = folder / "packed24.json"
    if index.exists():
        document = json.loads(index.read_text())
        rows = document["tensors"]
        rows["lm_head.weight"] = rows[first(rows, "embed_tokens")]
        index.write_text(json.dumps(document))


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_a_file(folder):
    save_file({"x": torch.zeros(2)}, folder / "stray.safetensors", {"format": "pt"})


FAULTS = {
    "a bit of a matrix": flip_a_bit("down_proj"),
    "a bit of a norm": flip_a_bit("norm"),
    "a tensor is dropped": drop_a_tensor("norm"),
    "a tensor is cast": cast("norm"),
    "the tie is lost": lose_the_tie,
    "tied tensors differ": part_the_tied,
}
CONFIG_FAULTS = {
    "the config says another dtype": lambda folder: edit_config(folder, dtype="float32"),
    "the config says fp8": lambda folder: edit_config(
        folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]}
    ),
    "the config has a block more": lambda folder: edit_config(folder, num_hidden_layers=4),
    "a file is beside them": add_a_file,
}


@pytest.fixture
def faulty(monkeypatch):
    """Let every writer make a fault: the folder is damaged after it was written."""

    def arm(damage):
        def check(folder):
            if folder.name.endswith(".part"):
                damage(folder)
            check_weight_files(folder)

        for module in (verify, packed_folder):
            monkeypatch.setattr(module, "check_weight_files", check)

    return arm


QUICK = {"a bit of a matrix", "a tensor is dropped", "tied tensors differ"}
FAULTY_PAIRS = [
    pytest.param(
        way, fault, marks=[] if "strangers" not in way or fault in QUICK else pytest.mark.slow
    )
    for way in WAYS
    for fault in {**FAULTS, **CONFIG_FAULTS}
]


@pytest.mark.parametrize(("way", "fault"), FAULTY_PAIRS)
def test_every_fault_of_every_writer_is_refused_and_nothing_is_left(
    save, faulty, built, way, fault
):
    built("tied")
    Path("out").mkdir()
    Path("out/old").write_text("old")
    faulty({**FAULTS, **CONFIG_FAULTS}[fault])
    assert "out was not saved: " in save(way, "tied", code=5).output
    assert [path.name for path in Path("out").iterdir()] == ["old"]  # not even with --force
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("way", ["resident", "disk", "export", "packed24", "dense"])
@pytest.mark.parametrize("name", ["mtp", pytest.param("tower", marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip_a_bit, drop_a_tensor])
def test_a_fault_in_what_is_carried_over_is_refused(save, faulty, built, way, name, damage):
    built(name)
    faulty(damage({"tower": "visual", "mtp": "mtp"}[name]))
    output = save(way, name, code=5).output
    assert "which the text model does not use, " in output or "misses 1 tensors" in output
    assert not Path("out").exists()
    assert not list(Path().glob(".*"))


def test_a_buffer_that_changes_is_refused(save, built, faulty):
    """What is no parameter is not in the hash, and is compared for itself."""
    built("buffer")
    faulty(flip_a_bit("e_score_correction_bias"))
    assert "e_score_correction_bias is another one" in save("resident", "buffer", code=5).output


def test_names_that_would_not_fit_what_is_carried_over_are_refused_before_the_work(
    save, built, monkeypatch
):
    """Should transformers one day save other names than it reads; --weights disk keeps them."""
    import transformers.core_model_loading as loading

    built("mtp")
    plain = loading.revert_weight_conversion
    monkeypatch.setattr(
        loading,
        "revert_weight_conversion",
        lambda *given: {f"other.{name}": one for name, one in plain(*given).items()},
    )
    output = save("resident", "mtp", code=4).output
    assert "cannot be saved with the 2 tensors that the text model does not use" in output
    assert "baseline" not in output
    save("disk", "mtp")


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

    from prunebench.testing import _LLAMA_LIKE

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
        if sum(one.numel() for one in model.parameters()) > 20e6:
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
