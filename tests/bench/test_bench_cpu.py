"""`bench` on a CPU: speed is measured, against torch's best dense product and our own."""

import csv
import io
import json

import pytest
import torch

from prunebench.bench import cpu_dense
from prunebench.bench.bench import with_our_kernel
from prunebench.bench.cpu_dense import FLOAT32, OURS
from prunebench.bench.layers import LayerBench
from prunebench.bench.shapes import LayerShape
from prunebench.bench.timing import CpuClock
from prunebench.models.linears import find_linears
from prunebench.results.bench_schema import read_benches
from prunebench.results.store import ResultStore
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.policy import Policy
from prunebench.testing import tiny_model, tiny_tokens
from tests.factories import CPU, without_cpu_kernels

BF16 = ("-m", "magnitude", "--dtype", "bfloat16", "--save-model", "ck", "--sparsity")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A small cache: few copies of the weights exceed it."""
    monkeypatch.setattr("prunebench.bench.layers.last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(cpu_dense, "_READ_BYTES", 1 << 16)


@pytest.mark.slow
def test_a_layer_is_timed_against_every_dense_product():
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), CpuClock()
    )
    row = bench.measure(2, blocks=2)
    assert row.seconds.keys() == {"dense", FLOAT32, OURS, "cpu"}
    assert all(seconds > 0 for seconds in row.seconds.values())
    assert row.backend == "cpu" and row.speed == "measured" and row.numerics_hold
    assert row.dense in ("dense", FLOAT32)  # ours is no baseline
    assert row.ratio.median > 0 and not row.cache_suspected and row.copies == 2
    many = bench.measure(9, blocks=1)
    assert many.seconds.keys() == {"dense", FLOAT32, "cpu"}


def test_weights_that_fit_in_the_cache_are_suspected(monkeypatch):
    monkeypatch.setattr("prunebench.bench.layers.last_level_cache_bytes", lambda: 1 << 40)
    monkeypatch.setattr("prunebench.bench.layers._MOST_CPU_COPIES", 3)
    shape = LayerShape("tiny", "square", 8, 16)
    row = LayerBench(shape, CPU, torch.bfloat16, Policy(CPU), CpuClock()).measure(1, blocks=1)
    assert row.cache_suspected and row.copies == 3


def test_a_model_by_our_dense_kernel_shares_its_weights():
    model = tiny_model("llama").to(torch.bfloat16)
    other = with_our_kernel(model)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert weights == {parameter.data_ptr() for parameter in other.parameters()}
    for length in (5, 12):  # by the kernel, and by torch
        ids = tiny_tokens(samples=1, seqlen=length)
        assert torch.allclose(other(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)
    assert all(isinstance(linear.module, torch.nn.Linear) for linear in find_linears(model))


def test_memory_is_read_at_some_speed(monkeypatch):
    rate = cpu_dense.memory_bytes_per_second()
    assert 1e7 < rate < 1e13
    monkeypatch.setattr(cpu_dense, "kernels", lambda: "no C++ compiler")
    assert cpu_dense.memory_bytes_per_second() is None
    assert cpu_dense.our_rivals(torch.zeros(1, 8), []) == {}


@pytest.mark.real  # importing torch's compiler, which the static cache asks for, takes seconds
def test_bench_on_a_cpu(cli, tiny_run, tmp_path, monkeypatch):
    cli(*tiny_run, *BF16, "2:4")
    results = ("--results-dir", tmp_path / "results")
    monkeypatch.setattr("prunebench.sparse24.policy.MIN_RATIO", 1e9)
    text = " ".join(cli("bench", "ck", *results).stdout.split())
    assert "no layer is faster packed" in text and "64 x 32" in text
    monkeypatch.setattr("prunebench.sparse24.policy.MIN_RATIO", 0)
    text = cli("bench", "ck", *results).stdout
    assert "decode, batch 1, 128 tokens:" in text and "times dense" in text
    (result,) = ResultStore(tmp_path / "results").read()[0]
    bench = read_benches(tmp_path / "results")[0][result.id]
    assert bench.speed == "measured" and bench.decode.median > 0 and bench.prefill is None
    assert {row["tokens"] for row in bench.layers} == {1, 4, 8, 64}
    case = next(case for case in bench.cases if case["case"] == "decode")
    assert case["seconds"].keys() == {"dense", "packed", OURS, FLOAT32}
    facts = bench.environment
    assert facts["cpu"] and facts["threads"] >= 1 and facts["read_bytes_per_second"] > 0
    lines = io.StringIO(cli("compare", *results, "--format", "csv").stdout)
    (row,) = (row for row in csv.DictReader(lines) if row["method"] == "magnitude")
    assert float(row["decode_speedup"]) == pytest.approx(bench.decode.median, rel=1e-3)
    assert row["gpu"].startswith(facts["cpu"]) and "threads" in row["gpu"]
    rows = json.loads(cli("bench", "ck", "--explain", "--json").stdout)
    assert {row["backend"] for row in rows} <= {"cpu", "dense"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_speed_is_measured_in_the_dtype_of_the_checkpoint(cli, tiny_run, tmp_path, dtype):
    cli(*tiny_run, *BF16[:3], dtype, *BF16[4:], "2:4")
    if dtype == "float16":
        cli("export", "ck", "-o", "packed", "--to", "packed24")
    folder = "packed" if dtype == "float16" else "ck"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunebench.sparse24.policy.MIN_RATIO", 1e9)  # the model is not timed
        text = cli("bench", folder, "-o", "b.json").stdout
    measured = dtype if dtype == "float16" else "bfloat16"
    assert f"speed, measured in {measured}, scored in {dtype}" in text
    assert (
        json.loads((tmp_path / "work" / "b.json").read_text())["environment"]["dtype"] == measured
    )
    assert {key.split()[1] for key in Policy.load(CPU).table} == {measured}
    if dtype != "float32":
        rows = json.loads(cli("bench", folder, "--explain", "--json").stdout)
        assert not [
            row for row in rows if "not measured" in row["why"] and row["tokens"] in (1, 64)
        ]


def test_what_gains_nothing_still_runs_packed_where_that_is_asked_for(cli, tiny_run, tmp_path):
    cli(*tiny_run, *BF16, "2:4")
    cli("export", "ck", "-o", "packed", "--to", "packed24")
    slow, linears = Policy.load(CPU), find_linears(tiny_model("llama"))
    for shape in {(linear.out_features, linear.in_features) for linear in linears}:
        for tokens in (1, 64):
            seconds = {"dense": 0.9, "cpu": 1.0}
            slow.remember(shape, torch.bfloat16, bucket_of(tokens), seconds)
    slow.save()  # as a bench that finds no gain does
    words = ("sample", "packed", "--no-dense", "-p", "the", "--max-new-tokens", "1", "--json", "-q")
    (model,) = json.loads(cli(*words).stdout)["models"]
    assert model["backend"] == "cpu"
    run = (*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16")
    execution = json.loads(cli(*run, "--execute", "sparse24", "--json").stdout)["execution"]
    assert execution["backends"] == {"cpu": len(linears)} and not execution["dense_layers"]


@pytest.mark.parametrize(
    ("sparsity", "compiler", "says"),
    [
        ("0.5", True, "speed: not measured (no matrix is 2:4)"),
        ("2:4", False, "speed: not measured (no CPU kernel: no C++ compiler)"),
    ],
)
def test_why_nothing_was_measured(cli, tiny_run, monkeypatch, sparsity, compiler, says):
    cli(*tiny_run, *BF16, sparsity)
    if not compiler:
        without_cpu_kernels(monkeypatch)
    assert says in " ".join(cli("bench", "ck").stdout.split())
