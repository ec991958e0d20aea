"""A writer that makes a mistake is caught: the folder is read again, and nothing is left."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.models.carried import write_index
from prunebench.models.safetensors_files import weight_files
from tests.factories import WAYS

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
    assert "e_score_correction_bias has changed" in save("resident", "buffer", code=5).output


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
        lambda *given: {f"other.{name}": tensor for name, tensor in plain(*given).items()},
    )
    output = save("resident", "mtp", code=4).output
    assert "cannot be saved with the 2 tensors that the text model does not use" in output
    assert "baseline" not in output
    save("disk", "mtp")
