"""Which files of a folder are the model: one rule for all readers, and ambiguous ones refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.export import export
from prunebench.checkpoints.inspect import inspect_checkpoint
from prunebench.errors import IncompatibleData
from prunebench.models.hashing import hash_weights
from prunebench.models.safetensors_files import other_files
from prunebench.models.source import fetch_model, find_model
from prunebench.progress import Silent
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model
from tests.ways_in import disk, resident


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
    assert "is ignored" in outcome.stderr
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
