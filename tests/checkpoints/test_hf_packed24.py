"""Packed folders in transformers: loaded in a fresh process, run, saved, and refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunebench
from prunebench.checkpoints.packed24 import (
    copy_companions,
    dense_tensors,
    write_dense,
    write_packed,
)
from prunebench.errors import IncompatibleData, PrunebenchError, UsageError
from prunebench.progress import Silent
from prunebench.sparse24.layer import Sparse24Linear
from tests.factories import peak_bytes, pruned

# A prompt after which every greedy token wins by 6% or more, in all three models: kernels that sum
# in another order give the same tokens.
PROMPT = torch.arange(171, 179)[None]
ARCHITECTURES = ("llama", "gpt2", "gemma2")  # plain; [in, out] and biases; tied embeddings


@pytest.fixture(scope="module")
def built(tmp_path_factory, byte_tokenizer):
    """`ARCHITECTURE/dense` and `ARCHITECTURE/packed`: tiny models whose linears are 2:4."""
    root = tmp_path_factory.mktemp("hf_packed24")
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for architecture in ARCHITECTURES:
        dense, packed = root / architecture / "dense", root / architecture / "packed"
        pruned(architecture).save_pretrained(dense)
        byte_tokenizer.save_pretrained(dense)
        packed.mkdir()
        pack(dense, packed)
    byte_tokenizer.chat_template = None
    return root


def pack(dense, packed):
    copy_companions(dense, packed)
    write_packed(dense_tensors(dense), packed, progress=Silent())


@pytest.fixture
def folder(built, tmp_path):
    """A packed Llama, to be changed at will."""
    return Path(shutil.copytree(built / "llama" / "packed", tmp_path / "packed"))


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def exact(path):
    """Load a packed folder with the backend that rounds as the dense product does."""
    return prunebench.load(path, backend="reference")


def generate(model, **options):
    mask = torch.ones_like(PROMPT)
    return model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)


def same_files(first, second):
    one, two = (load_file(Path(path, "packed24.safetensors")) for path in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, Sparse24Linear)]


# ---------------------------------------------------------------- a fresh process

FRESH = """
import sys
import prunebench
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(171, 179)[None]
mask = torch.ones_like(ids)
tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
print(tokens.tolist())
"""


def in_a_fresh_process(code, *arguments, code_expected=0, **options):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip
    assert done.returncode == code_expected, done.stderr
    return done


@pytest.mark.slow
def test_a_fresh_process_generates_the_tokens_of_the_masked_dense_model(built):
    done = in_a_fresh_process(FRESH, built / "llama" / "packed")
    assert json.loads(done.stdout) == generate(load(built / "llama" / "dense")).tolist()


@pytest.mark.slow
def test_without_prunebench_the_error_of_transformers_names_the_package(built):
    code = FRESH.replace("import prunebench\n", "").replace("assert not", "not")
    done = in_a_fresh_process(code, built / "llama" / "packed", code_expected=1)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "pip install prunebench" in last


# ---------------------------------------------------------------- running it


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_runs_as_the_dense_model_does_and_saves_the_same_bits(built, architecture, tmp_path):
    dense, packed = load(built / architecture / "dense"), exact(built / architecture / "packed")
    assert len(packed_layers(packed)) == (12 if architecture == "gpt2" else 21)
    assert torch.equal(generate(packed), generate(dense))
    static = [generate(model, cache_implementation="static") for model in (packed, dense)]
    assert torch.equal(*static)
    assert torch.equal(packed(PROMPT).logits, dense(PROMPT).logits)
    tied = packed.get_output_embeddings().weight is packed.get_input_embeddings().weight
    assert tied == (architecture != "llama")
    packed.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert "packed24.json" in names and "model.safetensors" not in names
    assert same_files(built / architecture / "packed", tmp_path / "again")
    assert torch.equal(generate(load(tmp_path / "again", device_map="auto")), generate(dense))
    write_dense(dense_tensors(tmp_path / "again"), tmp_path)
    first, second = load_file(tmp_path / "model.safetensors"), dense.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_shards(built, tmp_path, monkeypatch):
    import prunebench.checkpoints.packed24 as module

    monkeypatch.setattr(module, "_SHARD_BYTES", 30_000)
    source, shards = built / "llama" / "packed", tmp_path / "shards"
    shards.mkdir()
    pack(built / "llama" / "dense", shards)
    model = load(shards)
    assert len(list(shards.glob("packed24-*.safetensors"))) > 2
    assert torch.equal(generate(model), generate(load(source)))
    model.save_pretrained(shards, max_shard_size="20KB")  # over what was loaded
    assert torch.equal(generate(load(shards)), generate(model))
    model.save_pretrained(shards)
    assert [path.name for path in shards.glob("*.safetensors")] == ["packed24.safetensors"]
    assert same_files(source, shards)


def test_no_dense_matrix_is_ever_in_memory(built):
    """Loading allocates less than the dense weights are; the footprint is that of the files."""
    models = []
    peak = peak_bytes(lambda: models.append(exact(built / "llama" / "packed")))
    dense = load(built / "llama" / "dense").get_memory_footprint()
    layers = packed_layers(models[0])
    saved = sum(layer.dense_bytes for layer in layers) * (1 - 0.5625)
    assert models[0].get_memory_footprint() == dense - saved
    assert peak < dense


def test_pipeline_and_chat_template(built):
    # not above: it imports Triton, which tests of kernels import with the interpreter switched on
    from transformers import pipeline

    folder = str(built / "llama" / "packed")
    chat = [{"role": "user", "content": "Hello"}]
    options = {"max_new_tokens": 6, "do_sample": False}
    said = pipeline("text-generation", model=folder)(chat, **options)[0]["generated_text"][-1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    tokens = load(folder).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert said["content"] == tokenizer.decode(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_torch_compile_traces_it_without_a_break(built, architecture):
    model = exact(built / architecture / "packed")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(PROMPT).logits, model(PROMPT).logits)


def test_its_state_dict_goes_into_another_one(built):
    first, second = exact(built / "llama" / "packed"), exact(built / "llama" / "packed")
    expected = generate(first)
    for layer in packed_layers(second):
        layer.weight.form.packed().values.zero_()
    assert not torch.equal(generate(second), expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(generate(second), expected)


def test_it_moves_and_is_not_cast(built):
    model = load(built / "llama" / "packed")
    assert model.to("cpu") is model
    with pytest.raises(IncompatibleData, match="is bfloat16 and cannot become float32"):
        model.to(torch.float32)
    layer = packed_layers(load(built / "llama" / "packed"))[0]
    moved = layer.to("meta")
    assert {moved.weight.device.type, moved.policy.device.type} == {"meta"}
    assert all(buffer.is_meta for buffer in moved.buffers())


def test_it_is_loaded_from_the_cache_of_the_hub(built, tmp_path):
    """Of a repository transformers fetches the config, its index and the weights, no more."""
    revision = "a" * 40
    root = tmp_path / "models--org--packed"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    for name in ("config.json", "packed24.safetensors.index.json", "packed24.safetensors"):
        shutil.copy(built / "llama" / "packed" / name, snapshot)
    model = load("org/packed", cache_dir=tmp_path)
    assert torch.equal(generate(model), generate(load(built / "llama" / "packed")))


# ---------------------------------------------------------------- prunebench.load


def test_load_in_one_word(built, folder):
    dense = prunebench.load(built / "llama" / "dense")
    assert not packed_layers(dense)
    packed = prunebench.load(str(folder), backend="reference", device_map="cpu")
    assert {layer.policy.forced for layer in packed_layers(packed)} == {"reference"}
    assert torch.equal(generate(packed), generate(dense))
    packed.save_pretrained(folder)
    assert "backend" not in json.loads((folder / "config.json").read_text())["quantization_config"]
    assert prunebench.perplexity(packed, text=torch.arange(3, 67).view(2, 32)).value > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "referense"}, "there is no backend 'referense'"),
        ({"backend": "cslt"}, "the backend cslt cannot be used on cpu"),
    ],
)
def test_a_wrong_backend(folder, options, says):
    with pytest.raises(UsageError, match=says):
        prunebench.load(folder, **options)


def test_a_backend_for_what_is_not_packed(built):
    with pytest.raises(UsageError, match="is not packed, and only packed"):
        prunebench.load(built / "llama" / "dense", backend="reference")


def test_a_folder_that_was_packed_before(cli, folder, built):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"], config["transformers_weights"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "packed24.safetensors.index.json").unlink()
    with pytest.raises(IncompatibleData, match="was packed before") as caught:
        prunebench.load(folder)
    assert f"prunebench export {folder} -o NEW --to packed24" in caught.value.fix
    cli("export", folder, "-o", "new", "--to", "packed24")
    assert same_files("new", folder)
    assert torch.equal(generate(prunebench.load("new")), generate(load(built / "llama" / "packed")))


# ---------------------------------------------------------------- what is refused

NAME = "model.layers.1.mlp.down_proj.weight"


def with_config(**keys):
    def change(folder):
        document = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(document))

    return change


def with_tensors(change):
    def write(folder):
        tensors = load_file(folder / "packed24.safetensors")
        change(tensors)
        save_file(tensors, folder / "packed24.safetensors")

    return write


def with_version_in_the_index(folder):
    path = folder / "packed24.safetensors.index.json"
    document = json.loads(path.read_text())
    document["metadata"]["packed24"]["version"] = 2
    path.write_text(json.dumps(document))


def unchanged(folder):
    pass


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (
            with_config(quantization_config={"quant_method": "packed24", "version": 2}), {},
            "the model is packed24, version 2",
        ),
        (with_version_in_the_index, {}, "is not an index of packed24, version 1"),
        (
            with_tensors(lambda t: t.pop(f"{NAME}.codes24")), {},
            f"misses 1 tensors, the first is {NAME}.codes24",
        ),
        (
            with_tensors(lambda t: t.pop("model.norm.weight")), {},
            "misses 1 tensors, the first is model.norm.weight",
        ),
        (
            with_tensors(lambda t: t.update(extra=torch.zeros(2))), {},
            "has more than its index: 1 tensors, the first is extra",
        ),
        (
            with_tensors(lambda t: t.update({f"{NAME}.codes24": t[f"{NAME}.codes24"] * 0})), {},
            f"{NAME} is not a packed 2:4 matrix",
        ),
        (with_config(num_hidden_layers=4), {}, "lacks 9 tensors of the model"),
        (with_config(num_hidden_layers=2), {}, "holds 9 tensors that the model has no place for"),
        (unchanged, {"dtype": torch.float32}, "are bfloat16, and float32 is asked for"),
        (unchanged, {"device_map": "mps"}, "packed weights do not run on mps"),
        (
            unchanged, {"device_map": {"model": "cpu", "lm_head": "disk"}},
            "packed weights do not run on disk",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(folder, change, options, says):
    change(folder)
    with pytest.raises(PrunebenchError, match=re.escape(says)) as caught:
        load(folder, **options)
    assert caught.value.where and caught.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder):
    with pytest.raises(IncompatibleData, match="asks for cuda"):
        load(folder, device_map="cuda")


def test_a_matrix_of_no_linear_layer(tmp_path):
    model = pruned("llama")
    model.get_input_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(
        IncompatibleData, match="embed_tokens.weight is packed, and is not"
    ) as error:
        load(tmp_path / "packed")
    assert "--to dense" in error.value.fix


def test_options_of_saving_that_do_not_go(folder):
    with pytest.raises(UsageError, match="cannot be saved with push_to_hub"):
        load(folder).save_pretrained(folder, push_to_hub=True)


# ---------------------------------------------------------------- the model card


@pytest.mark.slow
@pytest.mark.parametrize("to", ["packed24", "dense"])
def test_the_first_code_block_of_the_card_works(cli, tiny_run, tmp_path, to):
    cli(*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16",
        "--save-model", "ck")  # fmt: skip
    cli("export", "ck", "-o", "out", "--to", to)
    code = re.search(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)[1]
    assert ("import prunebench" in code) == (to == "packed24")
    done = in_a_fresh_process(code, cwd=Path.cwd(), env=None)
    assert "Once upon a time" in done.stdout


def test_the_card_of_a_pushed_folder_names_the_repository(cli, tiny_run, monkeypatch):
    import prunebench.cli.export as module
    from prunebench.download.push import Repository

    repository = Repository("org/name", exists=False, private=False)
    monkeypatch.setattr(module, "_find_repository", lambda *_, **__: repository)
    monkeypatch.setattr("prunebench.download.push.push_folder", lambda *_, **__: None)
    cli(*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16",
        "--save-model", "ck")  # fmt: skip
    cli("export", "ck", "-o", "out", "--to", "packed24", "--push", "org/name", "--yes")
    assert "from_pretrained('org/name')" in Path("out/README.md").read_text()
