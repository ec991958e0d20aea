"""Looking into checkpoint files: counts by hand, shards, wrong files, and little memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.inspect import inspect_checkpoint
from prunebench.errors import IncompatibleData
from prunebench.models.carried import write_index
from prunebench.models.safetensors_files import hash_stored, stored_tensors, weight_files
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, FUSED_EXPERTS, tiny_model
from tests.conftest import KINDS, slow_beyond

PATTERN = Sparsity.parse("2:4")


def facts(tmp_path, **tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return {row.name: row for row in inspect_checkpoint(tmp_path / "model.safetensors", PATTERN)}


def test_counts_by_hand(tmp_path):
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[1.0, 2, 0, 0, 1, 0, 0, 1], [0.0, 0, 1, 1, 3, 4, 5, -0.0]])
    row = facts(tmp_path, w=w, bad=torch.tensor([[nan, 0], [inf, -inf]]), ids=torch.arange(4))
    assert set(row) == {"w", "bad"}
    assert (row["w"].zeros, row["w"].negative_zeros, row["w"].non_finite) == (7, 1, 0)
    assert (row["w"].violations, row["w"].first_violation) == (1, (1, 4))
    assert (row["bad"].non_finite, row["bad"].zeros, row["bad"].violations) == (3, 1, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_every_floating_dtype(tmp_path, dtype):
    w = torch.tensor([[1.0, 0, -0.0, 2], [1.0, 3, 2, 0]]).to(getattr(torch, dtype))
    row = facts(tmp_path, w=w)["w"]
    assert (row.dtype, row.zeros, row.negative_zeros) == (dtype, 3, 1)
    assert (row.violations, row.first_violation) == (1, (1, 0))


def test_fused_experts_name_the_expert(tmp_path):
    w = torch.zeros(3, 2, 8)
    w[2, 1, 4:7] = 1
    row = facts(tmp_path, w=w)["w"]
    assert (row.violations, row.first_violation) == (1, (2, 1, 4))


def test_a_matrix_stored_as_in_out_is_checked_along_its_input(tmp_path):
    """GPT-2's layout: 2:4 along the first axis, and not along the last."""
    w = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0]]).repeat(2, 4)
    row = facts(tmp_path, w=w, t=w.T.contiguous(), dense=torch.ones(4, 4))
    assert (row["w"].axis, row["w"].violations, row["w"].first_violation) == (0, 0, None)
    assert (row["t"].axis, row["t"].violations) == (-1, 0)
    assert (row["dense"].axis, row["dense"].violations) == (-1, 4)


def test_pieces_do_not_change_the_counts(tmp_path, monkeypatch):
    """A piece of 1,000 bytes is 31 rows here: the first violation lies in a later one."""
    import prunebench.models.safetensors_files as module

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(500, 8, generator=generator)
    w[:, 1::2] = 0
    w[400, 5], w[450, 1] = 1.0, float("inf")
    whole = facts(tmp_path, w=w, across=w.T.contiguous())
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    assert facts(tmp_path, w=w, across=w.T.contiguous()) == whole
    assert (whole["w"].violations, whole["w"].first_violation) == (2, (400, 4))
    assert whole["w"].zeros == int((w == 0).sum())
    assert whole["w"].non_finite == 1
    assert whole["across"].axis == -1


def test_shards_of_an_index(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "many")) > 2
    single, sharded = (inspect_checkpoint(tmp_path / name, PATTERN) for name in ("one", "many"))
    assert sorted(single, key=lambda r: r.name) == sorted(sharded, key=lambda r: r.name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "gemma3"])
@pytest.mark.parametrize("shard", ["40KB", "1GB"])
def test_the_hash_of_files_is_that_of_the_loaded_model(tmp_path, architecture, shard):
    """Tied weights too: named_parameters counts them once, as the files do."""
    from prunebench.models.hashing import hash_weights

    model = tiny_model(architecture).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    tensors = stored_tensors(weight_files(tmp_path))
    names = [name for name, _ in model.named_parameters()]
    assert hash_stored(tensors, names) == hash_weights(model)


@pytest.mark.parametrize("architecture", slow_beyond(KINDS, ARCHITECTURES))
def test_files_hash_as_the_model_that_plain_transformers_loads(tmp_path, architecture):
    """Renamed, tied, and fused ones too, each of which transformers makes of several tensors."""
    from transformers import AutoModelForCausalLM

    from prunebench.models.hashing import hash_weights
    from prunebench.models.load import load_config, skeleton
    from prunebench.models.stored_model import Rebuilt, stored_model

    tiny_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    stored = stored_tensors(weight_files(tmp_path))
    model = stored_model(skeleton(load_config(tmp_path)), stored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hash_stored(model.tensors, model.parameters) == hash_weights(loaded)
    assert not model.missing and not model.unused
    fused = any(isinstance(tensor, Rebuilt) for tensor in model.tensors.values())
    assert fused == (architecture in FUSED_EXPERTS)


# ---------------------------------------------------------------- the command


def test_a_pruned_checkpoint(cli, tiny_run):
    cli(*tiny_run, "-m", "wanda", "--sparsity", "2:4", "--save-model", "out")
    outcome = cli("inspect", "out", "--pattern", "2:4")
    assert "50.00% of" in outcome.stdout
    assert "2:4 holds in 21 of 21 matrices" in outcome.stdout
    assert "model.embed_tokens.weight" in outcome.stdout.splitlines()[-1]
    assert "no:" not in outcome.stdout
    document = json.loads(cli("inspect", "out/model.safetensors", "--json").stdout)
    assert document["pruned"]["tensors"] == 21
    assert (document["pruned"]["broken"], document["pruned"]["negative_zeros"]) == (0, 0)
    assert document["all"]["broken"] == 2  # the embedding and the output layer
    assert len(document["tensors"]) > 23
    broken = cli("inspect", "out", "--pattern", "1:4", code=6)
    assert "1:4 does not hold in 21 of 21 matrices" in broken.output
    assert "the first at row 0, column" in broken.output
    assert "2:4 does not hold in 2 of 23" in cli("inspect", "out", "--pattern", "2:4", "--all",
                                                 code=6).output  # fmt: skip
    assert "not divisible by 5" in cli("inspect", "out", "--pattern", "2:5", code=6).output


def test_a_gpt2_checkpoint_holds_along_its_input(cli, tmp_path):
    from prunebench.models.linears import find_linears
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners.magnitude import Magnitude

    model = tiny_model("gpt2")
    Magnitude().prune(BlockWalker(model), {linear.name: PATTERN for linear in find_linears(model)})
    model.save_pretrained(tmp_path / "work" / "gpt2")
    assert "yes, stored as [in, out]" in cli("inspect", "gpt2", "--pattern", "2:4").stdout


def test_a_dense_checkpoint(cli, tiny_folder):
    assert "no matrix is pruned" in cli("inspect", tiny_folder).stdout
    assert "no matrix is pruned" in cli("inspect", tiny_folder, "--pattern", "2:4", code=6).output


def test_a_few_zeros_by_rounding_are_no_pruning(cli, tmp_path):
    w = torch.ones(16, 16)
    w[0, :13] = 0  # 5%
    pruned = torch.tensor([1.0, 0, 0, 1]).repeat(16, 4)
    save_file({"embed": w, "pruned": pruned}, tmp_path / "work" / "x.safetensors")
    outcome = cli("inspect", "x.safetensors", "--pattern", "2:4").stdout
    assert "2:4 holds in 1 of 1 matrices" in outcome
    assert "under 10% zeros: 1 matrices: embed" in outcome


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "buffer",
    ],
)
def test_nan_and_infinity_are_named_whatever_they_are_in_and_end_with_6(cli, tmp_path, name, value):
    folder = tmp_path / "work" / "moe"
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {"buffer": torch.zeros(())}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    output = cli("inspect", folder, code=6).output
    assert f"NaN or infinity in {name}\n  {name} (1)" in output
    assert output.count(name) == 3  # its row too, pruned or not
    document = json.loads(cli("inspect", folder, "--json", code=6).stdout)
    assert document["non_finite"] == {name: 1}
    assert f"  {name} (1)" in cli("inspect", folder, "--pattern", "2:4", code=6).output


@pytest.mark.parametrize("stored", ["shards", "packed24"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_nan_is_found_in_shards_and_in_packed_matrices(cli, tmp_path, stored, name):
    folder = tmp_path / "work" / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].view(-1, 2)[::2] = 0  # 2:4
    tensors[name].view(-1)[-1] = float("nan")
    if stored == "shards":
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        for file, part in ("a.safetensors", names[::2]), ("b.safetensors", names[1::2]):
            save_file({key: tensors[key] for key in part}, folder / file, {"format": "pt"})
        write_index(folder, ["a.safetensors", "b.safetensors"])
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        cli("export", "model", "-o", "packed", "--to", "packed24")
        folder = "packed"
    assert f"NaN or infinity in {name}\n" in cli("inspect", folder, code=6).output
    assert json.loads(cli("inspect", folder, "--json", code=6).stdout)["non_finite"] == {name: 1}


def test_what_torch_cannot_read_is_named(cli, tmp_path):
    header = json.dumps({"s": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "work" / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "not looked into: s, torch has no F8_E8M0" in cli("inspect", path).output
    assert json.loads(cli("inspect", path, "--json").stdout)["unread"] == {"s": "F8_E8M0"}


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("model.bin", b"x", 4, "pickled weights are never read"),
        ("notes.md", b"# x", 4, "is not a safetensors file"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{}", 4, "is damaged"),
        ("text.safetensors", b"not at all", 4, "is damaged"),
    ],
)
def test_wrong_files(cli, tmp_path, name, content, code, says):
    (tmp_path / "work" / name).write_bytes(content)
    assert says in cli("inspect", name, code=code).output


def test_wrong_words(cli, tmp_path):
    assert "there is no folder or file nowhere" in cli("inspect", "nowhere", code=3).output
    assert "models fetch opt-125m" in cli("inspect", "opt-125m", code=3).output
    assert "is not N:M" in cli("inspect", ".", "--pattern", "0.5", code=2).output
    assert "holds no safetensors" in cli("inspect", ".", code=4).output


def test_bytes_that_do_not_fit_the_shape_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(IncompatibleData, match="is damaged") as caught:
        inspect_checkpoint(path, PATTERN)
    assert "the bytes of w do not fit F32 [2, 2]" in str(caught.value)


@pytest.mark.slow
def test_memory_is_that_of_pieces(tmp_path):
    """A file of 512 MB (of holes: zeros) with one tensor, read within 150 MB."""
    rows, width = 1 << 15, 1 << 12
    size = rows * width * 4
    entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from prunebench.checkpoints.inspect import inspect_checkpoint\n"
        "from prunebench.models.safetensors_files import hash_stored, stored_tensors\n"
        "from prunebench.run.result import peak_rss_bytes\n"
        "from prunebench.sparsity import Sparsity\n"
        "before, path = peak_rss_bytes(), Path(sys.argv[1])\n"
        "(row,) = inspect_checkpoint(path, Sparsity.parse('2:4'))\n"
        "assert row.zeros == row.size\n"
        "hash_stored(stored_tensors([path]), ['w'])\n"
        "print(peak_rss_bytes() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150e6
