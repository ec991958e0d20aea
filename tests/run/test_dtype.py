"""The dtype of a run: the checkpoint's own where the device has it; statistics stay float32."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunebench.models.source import ModelSource, find_model
from prunebench.models.stored_dtype import StoredDtype
from prunebench.results.store import ResultStore
from prunebench.run.dtype import choose_dtype
from prunebench.run_options import with_defaults
from prunebench.spec import RunSpec, Setup
from prunebench.sweep.recipe import read_recipe
from prunebench.sweep.sweep import Sweep
from prunebench.testing import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer):
    """A tiny Llama in each dtype."""
    root = tmp_path_factory.mktemp("models")
    for dtype in ("float32", "bfloat16", "float16"):
        tiny_model("llama").to(getattr(torch, dtype)).save_pretrained(root / dtype)
        byte_tokenizer.save_pretrained(root / dtype)
    return root


@pytest.fixture
def cpu(monkeypatch):
    """Say whether this CPU has no instructions for 16 bits: True, False, or None."""

    def emulates(answer):
        monkeypatch.setattr(
            "prunebench.run.dtype.is_emulated",
            lambda dtype, device: (
                answer if device.type == "cpu" and dtype != torch.float32 else False
            ),
        )

    return emulates


def run_on(tiny_run, folder):
    return [*tiny_run[:2], str(folder), *tiny_run[3:]]


def only_result(tmp_path):
    ((result,), damaged) = ResultStore(tmp_path / "results").read()
    assert damaged == []
    return result


def stored(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return StoredDtype.of(folder)


def source_of(folder):
    return find_model(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_read_in_its_own_dtype_and_saved_as_large(
    cli, tiny_run, folders, cpu, tmp_path, dtype
):
    cpu(False)
    outcome = cli(*run_on(tiny_run, folders / dtype), "-m", "magnitude", "--save-model", "out")
    result = only_result(tmp_path)
    assert (result.spec.dtype, result.model.dtype) == (dtype, dtype)
    assert "a saved model" not in outcome.output
    sizes = [(f / "model.safetensors").stat().st_size for f in (folders / dtype, Path("out"))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (True, "bfloat16 is emulated on this CPU"),
        (None, "this CPU does not say whether it has instructions for bfloat16"),
    ],
)
def test_where_it_is_emulated_float32_is_read_and_one_line_says_what_a_saved_model_will_have(
    cli, tiny_run, folders, cpu, tmp_path, answer, says
):
    cpu(answer)
    run = run_on(tiny_run, folders / "bfloat16")
    outcome = cli(*run, "-m", "magnitude", "--save-model", "out")
    assert only_result(tmp_path).spec.dtype == "float32"
    (line,) = [line for line in outcome.stderr.splitlines() if "float32" in line and says in line]
    match = re.search(
        r": reading as float32; a saved model will have ([\d.]+) MB instead of ([\d.]+) MB", line
    )
    sizes = [float(match[1]), float(match[2])]
    there = [Path("out"), folders / "bfloat16"]
    files = [(folder / "model.safetensors").stat().st_size / 1e6 for folder in there]
    assert sizes == pytest.approx(files, abs=0.06)
    assert "float32 is several times faster" not in outcome.stderr


def test_cuda_reads_every_checkpoint_in_its_own_dtype(folders, monkeypatch):
    for dtype in ("float32", "bfloat16", "float16"):
        choice = choose_dtype("auto", source_of(folders / dtype), folders / dtype, CUDA)
        assert (choice.dtype, choice.reason, choice.notes) == (dtype, "the checkpoint's own", ())


def test_the_headers_decide_and_not_the_config(folders, cpu, tmp_path):
    cpu(False)
    dtypes = stored(
        tmp_path / "m", {"model.layers.0.w": torch.zeros(4, 4).bfloat16()}, torch_dtype="float16"
    )
    assert (dtypes.dtype, dtypes.in_config) == ("bfloat16", "float16")
    source = ModelSource("m", "folder", str(tmp_path / "m"))
    choice = choose_dtype("auto", source, tmp_path / "m", CPU)
    assert choice.dtype == "bfloat16"
    assert choice.notes == ("config.json says float16, the block matrices are bfloat16",)


def test_where_dtypes_are_mixed_the_matrices_of_the_blocks_decide(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(500, 8),
        "model.layers.0.norm.weight": torch.zeros(5000),
        "model.layers.0.q.weight": torch.zeros(8, 8).half(),
        "model.layers.1.q.weight": torch.zeros(8, 8).half(),
        "model.layers.1.gate.weight": torch.zeros(8, 4),
    }
    dtypes = stored(tmp_path / "m", tensors, dtype="float32")
    assert (dtypes.dtype, dtypes.in_files) == ("float16", "float16")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert dtypes.saved_bytes("float32") == 4 * numbers
    assert dtypes.all_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("in_files", "config", "dtype"),
    [
        ("float8_e4m3fn", {"dtype": "bfloat16"}, "bfloat16"),
        ("float8_e4m3fn", {"text_config": {"torch_dtype": "float16"}}, "float16"),
        ("float8_e5m2", {}, "bfloat16"),
        ("float64", {"dtype": "float64"}, "float32"),
        ("int32", {"torch_dtype": "float16"}, "float16"),
        ("int32", {}, "bfloat16"),
    ],
)
def test_what_no_run_can_have_is_read_as_the_nearest(tmp_path, in_files, config, dtype):
    matrix = torch.zeros(8, 8).to(getattr(torch, in_files))
    dtypes = stored(tmp_path / "m", {"model.layers.0.q.weight": matrix}, **config)
    assert dtypes.dtype == dtype


def test_float8_says_what_it_is_read_as_and_how_large_it_becomes(tmp_path, cpu):
    cpu(False)
    stored(tmp_path / "m", {"a.0.w": torch.zeros(1000, 1000).to(torch.float8_e4m3fn)})
    choice = choose_dtype("auto", source_of(tmp_path / "m"), tmp_path / "m", CPU)
    assert choice.notes == (
        "float8_e4m3fn is read as bfloat16; a saved model will have 2.0 MB instead of 1.0 MB",
    )


def test_a_dtype_that_was_asked_for_is_taken_and_a_larger_saved_model_is_said(
    cli, tiny_run, folders, cpu, tmp_path
):
    cpu(False)
    run = [*run_on(tiny_run, folders / "float16"), "-m", "magnitude", "--dtype", "float32"]
    assert "a saved model" not in cli(*run, "--dry-run").stderr
    said = cli(*run, "--dry-run", "--save-model", "out").stderr
    assert "read as float32: a saved model will have 0.2 MB instead of 0.1 MB" in said


def test_an_alias_has_its_dtype_in_the_catalog_and_a_gguf_is_float32(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for given in ({}, {"dtype": "auto"}):
        values = with_defaults({"method": "wanda", "model": "opt-125m", **given})
        assert values["dtype"] == "float16"
        values = with_defaults({"method": "wanda", "model": str(tmp_path / "m.gguf"), **given})
        assert values["dtype"] == "float32"
    assert with_defaults({"method": "wanda", "model": "org/name"})["dtype"] == "auto"
    for name, kind in (("opt-125m", "hub"), ("x", "gguf")):
        source = find_model(name) if kind == "hub" else ModelSource("x", "gguf", "x.gguf")
        expected = "float16" if kind == "hub" else "float32"
        assert choose_dtype("auto", source, tmp_path, CUDA).dtype == expected


def test_auto_and_the_dtype_that_it_becomes_are_one_spec_and_no_row_is_filed_as_auto(
    cli, tiny_run, folders, cpu, tmp_path
):
    cpu(False)
    run = [*run_on(tiny_run, folders / "bfloat16"), "-m", "wanda", "--json", "-q"]
    rows = [json.loads(cli(*run, *more).stdout) for more in ((), ("--dtype", "bfloat16"))]
    assert rows[0]["spec_id"] == rows[1]["spec_id"] and rows[0]["spec"]["dtype"] == "bfloat16"
    shown = json.loads(cli(*run, "--dtype", "auto", "--once").stdout)
    assert shown["id"] in {row["id"] for row in rows}
    path = next((tmp_path / "results").rglob(f"{rows[0]['id']}.json"))
    spec = RunSpec(**rows[0]["spec"]).model_copy(update={"dtype": "auto"})
    row = {**rows[0], "spec": spec.model_dump(mode="json"), "spec_id": spec.spec_id}
    path.write_text(json.dumps(row))
    output = cli("results", "check", "--results-dir", tmp_path / "results", code=6).output
    assert "the dtype is auto: it was never resolved" in output
    schema = json.loads(cli("results", "schema").stdout)
    assert schema["$defs"]["RunSpec"]["properties"]["dtype"]["enum"] == [
        "float32", "bfloat16", "float16",
    ]  # fmt: skip


def test_show_config_says_what_auto_becomes_here(cli, folders, cpu):
    show = ["run", "-m", "wanda", "--show-config", "--json", "-M"]
    cpu(False)
    row = json.loads(cli(*show, folders / "bfloat16").stdout)["dtype"]
    assert row == {
        "value": "bfloat16", "source": "default: auto -> bfloat16, the checkpoint's own",
    }  # fmt: skip
    cpu(True)
    row = json.loads(cli(*show, folders / "bfloat16", "--dtype", "auto").stdout)["dtype"]
    assert row == {
        "value": "float32",
        "source": "flag: auto -> float32, bfloat16 is emulated on this CPU",
    }
    row = json.loads(cli(*show, "org/name").stdout)["dtype"]
    assert row["value"] == "auto" and "not here yet" in row["source"]
    assert json.loads(cli(*show, "opt-125m").stdout)["dtype"] == {
        "value": "float16", "source": "default",
    }  # fmt: skip


def test_the_dry_run_names_the_dtype(cli, tiny_run, folders, cpu):
    cpu(False)
    run = [*run_on(tiny_run, folders / "bfloat16"), "-m", "wanda", "--dry-run"]
    assert "wanda 0.5 on bfloat16, bfloat16, cpu" in cli(*run).stdout
    assert json.loads(cli(*run, "--json").stdout)["dtype"] == "bfloat16"


def test_weights_on_disk_are_read_in_the_same_dtype(cli, tiny_run, folders, cpu, tmp_path):
    cpu(False)
    run = [*run_on(tiny_run, folders / "bfloat16"), "-m", "wanda"]
    cli(*run)
    cli(*run, "--weights", "disk")
    results, _ = ResultStore(tmp_path / "results").read()
    assert len({(r.spec_id, r.model.evaluated_sha256) for r in results}) == 1


def test_packed_weights_need_16_bits_whoever_chose_them(cli, tiny_run, folders, cpu):
    run = [*run_on(tiny_run, folders / "bfloat16"), "-m", "magnitude", "--sparsity", "2:4"]
    cpu(True)
    output = cli(*run, "--execute", "sparse24", code=2).output
    assert "--execute sparse24 does not go with --dtype float32" in output
    cpu(False)
    cli(*run, "--execute", "sparse24", "--backend", "reference")


@pytest.mark.parametrize(("on_gpu", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_cell_for_another_machine_is_told_its_dtype(
    cli, folders, eval_file, tmp_path, cpu, on_gpu, dtype
):
    """This machine's own instructions do not matter, and the sweep knows what it waits for."""
    cpu(not on_gpu)
    path = tmp_path / "r.toml"
    path.write_text(
        f'model = "{folders / "bfloat16"}"\nmethod = "magnitude"\nppl = "file:{eval_file}"\n'
        "ppl_seqlen = 64\n"
    )
    (cell,) = read_recipe(path, complete=True).cells

    class Elsewhere:
        at_once = None

        def submit(self, job):
            self.job = job
            return "job"

        def wait(self):
            raise KeyboardInterrupt

        def cancel(self):
            pass

        close = cancel

    engine = Elsewhere()
    sweep = Sweep(Setup(results_dir=tmp_path / "results"), engine=engine, on_gpu=on_gpu)
    with pytest.raises(KeyboardInterrupt):
        list(sweep.run([cell]))
    at = engine.job.words.index("--dtype")
    assert engine.job.words[at + 1] == dtype
    output = cli("sweep", path, "--executor", "slurm", "--resource", f"gpus={int(on_gpu)}",
               "--dry-run").stdout  # fmt: skip
    assert f"--dtype {dtype}" in output
    explicit = replace(cell, given={**cell.given, "dtype": "float16"},
                       values={**cell.values, "dtype": "float16"})  # fmt: skip
    assert sweep.with_dtype(explicit) is explicit
