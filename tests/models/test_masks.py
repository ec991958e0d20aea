"""Mask files and checkpoints as masks: what fits is read bit for bit, all else is refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.export import export
from prunebench.checkpoints.packed24 import model_tensors
from prunebench.checkpoints.save import save_masks
from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.files import sha256_file
from prunebench.models.linears import find_linears
from prunebench.models.masks import open_masks
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.progress import Silent
from prunebench.pruners import METHODS
from prunebench.pruners.maskllm.method import MaskLLM
from prunebench.run.names import check_names
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup
from prunebench.testing import tiny_model
from tests.model_folders import with_a_tower

HALF = Sparsity.parse("2:4")


def pruned(architecture="llama", sparsity=HALF):
    model = tiny_model(architecture)
    walker = BlockWalker(model)
    METHODS.make("magnitude", {}).prune(
        walker, {linear.name: sparsity for linear in walker.linears}
    )
    return model


def opened(path, model):
    return open_masks(str(path), find_linears(model), Silent(), partial(model_tensors, model))


@pytest.fixture(scope="module")
def model():
    return pruned()


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "masks.npz"
    save_masks(find_linears(model), path)
    return path


# ------------------------------------------------------------ what fits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_mask_file_gives_back_the_masks(architecture, tmp_path):
    ours = pruned(architecture)
    save_masks(find_linears(ours), tmp_path / "m.npz")
    masks = opened(tmp_path / "m.npz", tiny_model(architecture))
    assert masks.origin.startswith("sha256:")
    for linear in find_linears(ours):
        keep = masks.read(linear)
        assert keep.dtype == torch.bool
        assert torch.equal(keep, linear.read() != 0), linear.name


def test_a_checkpoint_keeps_what_is_not_zero(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="40KB")
    masks = opened(tmp_path / "checkpoint", tiny_model("llama"))
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    for linear in find_linears(model):
        assert torch.equal(masks.read(linear), linear.read() != 0), linear.name


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt2"])
def test_every_kind_of_folder_holds_masks(architecture, tmp_path):
    """One with a tensor for each expert, and one whose matrices are packed."""
    ours = pruned(architecture).to(torch.bfloat16)
    ours.save_pretrained(tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "packed", replace=False, progress=Silent(), to="packed24")
    for folder in ("plain", "packed"):
        masks = opened(tmp_path / folder, tiny_model(architecture))
        for linear in find_linears(ours):
            assert torch.equal(masks.read(linear), linear.read() != 0), linear.name


def test_experts_of_another_number_are_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "ck")
    tensors = load_file(tmp_path / "ck" / "model.safetensors")
    left_out = [name for name in tensors if ".experts.1." in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    save_file(kept, tmp_path / "ck" / "model.safetensors", metadata={"format": "pt"})
    dense = tiny_model("mixtral")
    masks = opened(tmp_path / "ck", dense)
    expert = next(linear for linear in find_linears(dense) if linear.expert is not None)
    with pytest.raises(IncompatibleData, match="does not fit the model"):
        masks.read(expert)
    assert left_out


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_masks_are_applied_and_kept_weights_stay_as_they_are(kind, model, file, tmp_path):
    if kind == "checkpoint":
        model.save_pretrained(tmp_path / "checkpoint")
    name = file if kind == "file" else tmp_path / "checkpoint"
    dense = tiny_model("llama")
    walker = BlockWalker(dense, inputs=PrunerInputs(masks=opened(name, dense)))
    MaskLLM(masks=str(name)).prune(walker, {linear.name: HALF for linear in walker.linears})
    for ours, theirs in zip(find_linears(dense), find_linears(model), strict=True):
        assert torch.equal(ours.read(), theirs.read())


# ------------------------------------------------------------ what does not


def test_masks_of_another_model_name_the_first_parameter_that_is_missing(file):
    with pytest.raises(IncompatibleData, match="does not fit the model") as caught:
        opened(file, tiny_model("gpt2"))
    assert "transformer.h.0.attn.c_attn.weight" in caught.value.where


def test_a_mask_of_another_shape_is_refused(model, tmp_path):
    stored = {
        f"{linear.parameter_name}.mask": np.packbits(np.ones(linear.size, bool))
        for linear in find_linears(model)
    }
    last = find_linears(model)[-1]
    stored[f"{last.parameter_name}.mask"] = np.zeros(last.size // 8 + 1, np.uint8)
    np.savez(tmp_path / "m.npz", **stored)
    with pytest.raises(IncompatibleData, match="does not fit") as caught:
        opened(tmp_path / "m.npz", model)
    assert last.parameter_name in caught.value.where
    assert f"{last.size} bits" in caught.value.where
    stored[f"{last.parameter_name}.mask"] = np.zeros(last.size // 8, np.float32)
    np.savez(tmp_path / "f.npz", **stored)
    with pytest.raises(IncompatibleData, match="does not fit"):
        opened(tmp_path / "f.npz", model)


def test_masks_that_are_not_n_of_m_name_the_place(tmp_path):
    ours = pruned()
    second = find_linears(ours)[1]  # (out, 32)
    row = (second.read()[3] != 0).float()
    spoiled = second.read()
    spoiled[3, 8:12] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    second.write(spoiled)
    save_masks(find_linears(ours), tmp_path / "m.npz")
    dense = tiny_model("llama")
    walker = BlockWalker(dense, inputs=PrunerInputs(masks=opened(tmp_path / "m.npz", dense)))
    with pytest.raises(IncompatibleData, match="not 2:4") as caught:
        MaskLLM(masks="m.npz").prune(walker, {linear.name: HALF for linear in walker.linears})
    assert second.name in caught.value.where
    assert "row 3, columns 8 to 11 keep 3" in caught.value.where
    assert "1 groups" in caught.value.where
    assert row.sum() == 16


def test_pickled_objects_are_never_loaded(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    stored = {
        f"{linear.parameter_name}.mask": np.array([Bomb()], object)
        for linear in find_linears(model)
    }
    np.savez(tmp_path / "m.npz", **stored)
    (tmp_path / "exploded").unlink(missing_ok=True)
    with pytest.raises(IncompatibleData, match="damaged"):
        opened(tmp_path / "m.npz", model)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(share, model, file):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(IncompatibleData):
        opened(file, model)


def test_a_file_with_wrong_bits_is_refused_or_its_masks_are_the_same(model, file):
    """Every flip in the data breaks a checksum; in what describes it, it may not matter."""
    data = file.read_bytes()
    expected = {linear.name: linear.read() != 0 for linear in find_linears(model)}
    refused = 0
    for at in range(40, len(data), len(data) // 60):
        spoiled = bytearray(data)
        spoiled[at] ^= 0x10
        file.write_bytes(bytes(spoiled))
        try:
            masks = opened(file, model)
        except IncompatibleData:
            refused += 1
            continue
        for linear in find_linears(model):
            assert torch.equal(masks.read(linear), expected[linear.name])
    assert refused > 30


@pytest.mark.parametrize("content", ["array", "text"])
def test_what_is_no_mask_file_is_refused(content, model, tmp_path):
    path = tmp_path / "m.npz"
    if content == "array":
        with path.open("wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        path.write_text("not a mask")
    with pytest.raises(IncompatibleData, match="not a mask file"):
        opened(path, model)


def test_a_checkpoint_of_another_model_is_refused(model, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleData, match="does not fit"):
        opened(tmp_path / "other", model)
    file = next((tmp_path / "other").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(IncompatibleData):
        opened(tmp_path / "other", model)


def test_a_dense_checkpoint_has_no_masks_of_a_pattern(tmp_path):
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    walker = BlockWalker(dense, inputs=PrunerInputs(masks=opened(tmp_path / "dense", dense)))
    with pytest.raises(IncompatibleData, match="not 2:4"):
        MaskLLM(masks="dense").prune(walker, {linear.name: HALF for linear in walker.linears})


def test_names_that_are_no_masks(model, tmp_path):
    with pytest.raises(MissingResource, match="no masks at"):
        opened(tmp_path / "nope.npz", model)
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a mask file"):
        opened(tmp_path / "m.txt", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises((IncompatibleData, MissingResource)):
        opened(tmp_path / "empty", model)


# ------------------------------------------------------------ the command line


def named(model, **options):
    spec = RunSpec(method="maskllm", model=model, sparsity="2:4", method_options=options)
    return check_names(spec, Setup())


@pytest.mark.parametrize(
    ("model", "masks"),
    [
        ("llama2-7b", "hub:Vinnnf/LLaMA-2-7B-MaskLLM-C4"),
        ("llama3-8b", "hub:Vinnnf/LLaMA-3-8B-MaskLLM-C4"),
        ("llama3.1-8b", "hub:Vinnnf/LLaMA-3.1-8B-MaskLLM-C4"),
        ("smollm2-135m-q4", None),
    ],
)
def test_published_masks_are_the_default_where_there_are_some(model, masks):
    resolved = named(model)
    assert resolved.spec.method_options["masks"] == masks
    assert resolved.pruner.needs.masks == masks
    assert (resolved.pruner.needs.training is None) == (masks is not None)
    if masks:  # no calibration text is read
        assert resolved.spec.calibration is None


def test_train_learns_although_masks_have_been_published():
    resolved = named("llama2-7b", train=True)
    assert resolved.spec.method_options["masks"] is None
    assert resolved.pruner.needs.training.text == "c4"


def test_an_option_of_a_training_beside_masks_is_refused():
    with pytest.raises(UsageError, match="steps") as caught:
        named("llama2-7b", steps=100)
    assert "train=true" in caught.value.fix
    with pytest.raises(UsageError, match="rate") as caught:
        named("smollm2-135m-q4", masks="hub:a/b", rate=0.1)
    assert "train=true" not in caught.value.fix
    with pytest.raises(UsageError, match="refuses"):
        named("llama2-7b", masks="hub:a/b", train=True)


def test_without_the_hub_published_masks_are_a_missing_resource(cli, tiny_run):
    output = cli(
        *tiny_run, "-m", "maskllm", "--set", "masks=hub:Vinnnf/LLaMA-2-7B-MaskLLM-C4", code=3
    )
    assert "LLaMA-2-7B-MaskLLM-C4 mask_compressed.npz cannot be downloaded" in output.output
    assert "masks=PATH.npz" in output.output
    assert cli(*tiny_run, "-m", "maskllm", "--set", "masks=hub:nonsense/", code=3)


def test_the_summary_names_the_masks(cli, tiny_run, tmp_path, monkeypatch):
    """A file by its name and hash, a repository by its commit; masks of a training's prior too."""
    from prunebench.models import masks as module

    file = tmp_path / "work" / "m.npz"
    save_masks(find_linears(pruned()), file)
    digest = sha256_file(file)
    output = cli(*tiny_run, "-m", "maskllm", "--set", "masks=m.npz").stdout
    assert f"  masks applied: m.npz (sha256:{digest})\n" in output
    monkeypatch.setattr(module, "_from_hub", lambda name, progress: (file, f"hub:{name}@c0ffee"))
    output = cli(*tiny_run, "-m", "maskllm", "--set", "masks=hub:org/masks").stdout
    assert "  masks applied: hub:org/masks@c0ffee\n" in output
    quick = [w for k in ("steps=1", "batch=2", "train_seqlen=24", "held_out=2", "prior=m.npz")
             for w in ("--set", k)]  # fmt: skip
    output = cli(*tiny_run, "-m", "maskllm", *quick).stdout
    assert f"  the training began with masks: m.npz (sha256:{digest})\n" in output
    assert "masks" not in cli(*tiny_run, "-m", "wanda").stdout


def test_the_masks_of_saved_folders_give_the_same_weights_again(
    cli, tiny_run, tmp_path, byte_tokenizer
):
    """Of a model of images and text: its files have other names than the text model."""
    folder = with_a_tower(tmp_path / "tower", byte_tokenizer)
    run = [str(folder) if word == tiny_run[2] else word for word in tiny_run]
    half = (*run, "--sparsity", "2:4", "--dtype", "bfloat16", "--json", "-q")
    first = json.loads(cli(*half, "-m", "magnitude", "--save-model", "ck").stdout)
    cli("export", "ck", "-o", "packed", "--to", "packed24")
    for name in ("ck", "packed"):
        again = json.loads(cli(*half, "-m", "maskllm", "--set", f"masks={name}").stdout)
        assert again["model"]["evaluated_sha256"] == first["model"]["evaluated_sha256"]


def test_saved_masks_give_the_same_weights_again(cli, tiny_run):
    quick = ("--set", "steps=2", "--set", "batch=2", "--set", "train_seqlen=24",
             "--set", "held_out=2", "--set", "prior=magnitude")  # fmt: skip
    learned = cli(*tiny_run, "-m", "maskllm", *quick, "--save-masks", "m.npz", "--json", "-q")
    applied = cli(*tiny_run, "-m", "maskllm", "--set", "masks=m.npz", "--json", "-q")
    learned, applied = json.loads(learned.stdout), json.loads(applied.stdout)
    assert learned["model"]["evaluated_sha256"] == applied["model"]["evaluated_sha256"]
    assert applied["spec"]["method_options"]["masks"].startswith("sha256:")  # content, not a path
    assert applied["training"] is None
    assert learned["training"]["curve"][-1]["step"] == 2
    assert learned["sparsity"]["realised_ratio"] == 0.5
    # as a prior, the mask is where a training begins: at step 0 nothing has changed
    again = cli(*tiny_run, "-m", "maskllm", *quick[:-2], "--set", "prior=m.npz", "--json", "-q")
    again = json.loads(again.stdout)
    assert again["training"]["curve"][0]["held_out_ppl"] == min(
        point["held_out_ppl"]
        for point in learned["training"]["curve"]
        if point["held_out_ppl"] is not None
    )
