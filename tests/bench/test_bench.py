"""`bench`: bytes are computed, a speed is there only where it was measured, and rows join."""

import csv
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fixtures.shaped import TINY, Decoder, Weights
from prunebench.bench.layers import LayerBench, random_packed
from prunebench.bench.model import Decoder as ModelDecoder
from prunebench.bench.model import measure_decode, measure_prefill, same_tokens
from prunebench.bench.shapes import SHAPES, LayerShape
from prunebench.bench.timing import DryClock, Timings, interleaved
from prunebench.models.linears import find_linears
from prunebench.results.bench_schema import read_benches
from prunebench.results.store import ResultStore
from prunebench.sparse24.layer import convert
from prunebench.sparse24.packed import VALID_CODES, check_24, split_codes, unpack24
from prunebench.sparse24.policy import Policy
from prunebench.testing import ARCHITECTURES, tiny_model, tiny_tokens
from tests.factories import pruned, without_cpu_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_cpu_kernels(monkeypatch):
    # Fake clocks measure what only a GPU has; test_bench_cpu.py has a CPU's kernels and rivals.
    without_cpu_kernels(monkeypatch)
    monkeypatch.setattr("prunebench.bench.layers.torch_rivals", lambda x, weights: {})
    monkeypatch.setattr("prunebench.bench.layers.our_rivals", lambda x, weights: {})
    monkeypatch.setattr("prunebench.bench.layers.last_level_cache_bytes", lambda: 1 << 10)


# ---------------------------------------------------------------- timing


class FakeClock:
    """Every call takes the seconds that it returns; the machine gets slower from block to block."""

    measures_speed = True

    def __init__(self):
        self.turns = []

    def prepare(self, calls):
        return lambda: sum(call() for call in calls)

    def seconds(self, turn, repeats):
        took = turn()
        self.turns.append(took)
        return took * repeats * (1 + 0.1 * len(self.turns))


def test_rivals_take_turns_and_ratios_are_of_one_block():
    clock = FakeClock()
    rivals = {"dense": [lambda: 3e-3, lambda: 5e-3], "packed": [lambda: 2e-3, lambda: 2e-3]}
    timings = interleaved(rivals, clock, blocks=5)
    assert clock.turns == [8e-3, 4e-3] * 7  # warm-up, one thrown away, five that count
    ratio = timings.ratio("dense", "packed")
    assert (ratio.median, ratio.blocks) == (pytest.approx(2, rel=0.1), 5)
    assert ratio.low <= ratio.median <= ratio.high
    assert timings.fastest(["dense", "packed"]) == "packed"


def test_a_slow_down_is_a_ratio_below_one():
    timings = Timings({"dense": [1.0, 1.0, 1.0], "packed": [2.0, 2.5, 4.0]})
    assert dataclasses.astuple(timings.ratio("dense", "packed")) == (0.4, 0.25, 0.5, 3)


def test_no_shape_is_measured_twice():
    assert len({(shape.rows, shape.width) for shape in SHAPES}) == 11


# ---------------------------------------------------------------- layers and models


def test_a_layer_on_a_cpu_checks_numbers_and_gives_no_speed():
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), DryClock(),
        cold_bytes=1 << 16,
    )  # fmt: skip
    row = bench.measure(3)
    assert row.numerics_hold and row.errors["reference"] == row.errors["dense"] > 0
    assert row.ratio is None and row.seconds == {} and row.bytes_per_second is None
    assert row.speed == "not measured (no CUDA device)"
    assert row.backend == "reference" and row.refused.keys() == {
        "triton",
        "cslt",
        "cpu",
        "decompress",
    }
    assert row.copies == 4 and row.stored_bytes == 0.5625 * row.dense_bytes


def test_a_measured_layer_is_compared_with_the_best_dense():
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), FakeSeconds(),
        compile_dense=lambda: torch.nn.functional.linear,
    )  # fmt: skip
    row = bench.measure(2)
    assert row.dense == "dense, max-autotune" and row.backend == "reference"
    assert row.ratio.median == pytest.approx(1.5) and row.speed == "measured"
    assert row.bytes_per_second == pytest.approx(row.stored_bytes / 2e-3)
    assert not row.cache_suspected


class FakeSeconds:
    """Dense takes 4 ms, tuned dense 3 ms, whatever comes next 2 ms."""

    measures_speed = True

    def __init__(self):
        self.prepared = 0

    def prepare(self, calls):
        took = [4e-3, 3e-3, 2e-3][self.prepared]
        self.prepared += 1
        calls[0]()
        return lambda: took * len(calls)

    def seconds(self, turn, repeats):
        return turn() * repeats


def test_wrong_numbers_are_never_timed(monkeypatch):
    import prunebench.sparse24.backends.unpack as module

    run = module.UnpackedProduct.run
    monkeypatch.setattr(
        module.UnpackedProduct, "run", lambda self, x, bias: run(self, x, bias) * 1.1
    )
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), DryClock(),
        cold_bytes=1 << 10,
    )  # fmt: skip
    row = bench.measure(2)
    assert not row.numerics_hold and row.backend is None


class Failing(FakeSeconds):
    """The compiled dense product cannot be captured."""

    def prepare(self, calls):
        if self.prepared == 1:
            self.prepared += 1
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with")
        return super().prepare(calls)


def test_a_rival_that_cannot_be_captured_loses_one_cell():
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), Failing(),
        compile_dense=lambda: torch.nn.functional.linear, cold_bytes=1 << 10,
    )  # fmt: skip
    row = bench.measure(2)
    assert row.ratio.median == pytest.approx(2) and row.dense == "dense"
    assert row.refused["dense, max-autotune"] == (
        "RuntimeError: operation not permitted when stream is capturing"
    )
    with pytest.raises(RuntimeError, match="not permitted"):
        interleaved({"dense": [list], "other": [list]}, Failing())


def test_a_product_that_fails_is_refused(monkeypatch):
    import prunebench.sparse24.backends.unpack as module

    def fail(self, x, bias):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(module.UnpackedProduct, "run", fail)
    bench = LayerBench(
        LayerShape("tiny", "square", 64, 256), CPU, torch.bfloat16, Policy(CPU), DryClock(),
        cold_bytes=1 << 10,
    )  # fmt: skip
    row = bench.measure(2)
    assert row.backend is None and row.refused["reference"].endswith("invalid argument")


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors: a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.real  # importing torch's compiler, which the cache asks for, takes seconds
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "mixtral"])
def test_a_decode_step_can_be_captured(architecture):
    """No host read in it: one is an error while a CUDA graph is captured."""
    decoder = ModelDecoder(tiny_model(architecture), tiny_tokens(samples=2, seqlen=9), room=4)
    with HostReads() as reads:
        decoder.step()
    assert reads.count == 0


def test_random_matrices_are_2_4():
    packed = random_packed((64, 256), dtype=torch.bfloat16, device=CPU, seed=3)
    report = check_24(unpack24(packed))
    assert report.holds and report.negative_zeros == 0
    assert set(split_codes(packed).unique().tolist()) == set(VALID_CODES)
    again = random_packed((64, 256), dtype=torch.bfloat16, device=CPU, seed=3)
    assert torch.equal(packed.values, again.values)


@pytest.mark.real  # importing torch's compiler, which the cache asks for, takes seconds
def test_decoding_with_a_static_cache_is_plain_greedy_decoding():
    model = tiny_model("llama")
    prompt = tiny_tokens(samples=2, seqlen=9)
    tokens = ModelDecoder(model, prompt, room=8).tokens(6)
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, ids[:, 9:])


@pytest.mark.real
def test_a_model_dense_and_packed_on_a_cpu():
    packed = pruned()
    convert(packed, find_linears(packed), policy=Policy(CPU))
    models = {"dense": pruned(), "packed": packed}
    assert same_tokens(models, prompt=8, count=4) == 1.0
    for row in (
        measure_decode(models, batch=2, context=8, clock=DryClock(), blocks=1),
        measure_prefill(models, batch=1, prompt=8, clock=DryClock(), blocks=1),
    ):
        assert row.ratio is None and row.tokens_per_second is None and row.peak_bytes is None


def test_the_decoder_of_make_bench_gpu_attends_to_what_it_decoded():
    """A step behind a prompt is the last row of a longer prompt."""
    weights = Weights(TINY, device=CPU, dtype=torch.bfloat16)
    blocks = weights.dense_blocks()
    ids = torch.randint(TINY.vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(weights, blocks, batch=2, room=16)
    decoder.prefill(ids[:, :11])
    decoder.token.copy_(ids[:, 11:])
    stepped = decoder._forward(decoder.token, causal=False)
    whole = Decoder(weights, blocks, batch=2, room=16).prefill(ids)
    assert torch.allclose(stepped.float(), whole.float(), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- prunebench bench


BF16 = ("-m", "magnitude", "--dtype", "bfloat16", "--save-model", "ck", "--sparsity")


@pytest.mark.slow
def test_bench_without_a_gpu_or_a_compiler(cli, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prunebench", "run", "--save-model", "ck"])
    cli(*tiny_run, *BF16, "2:4")
    results = ("--results-dir", tmp_path / "results")
    outcome = cli("bench", "ck", *results)
    assert "speed: not measured (no CPU kernel: no C++ compiler)" in outcome.stdout
    assert "magnitude 2:4 on tiny-llama" in outcome.stdout
    assert "computed; pruned alone 0.5625" in outcome.stdout
    benches, damaged = read_benches(tmp_path / "results")
    (result,) = ResultStore(tmp_path / "results").read()[0]
    assert list(benches) == [result.id] and not damaged
    bench = benches[result.id]
    assert bench.decode is None and bench.prefill is None and bench.layers == []
    assert bench.quality[0].value == result.scores[0].value
    cli("export", "ck", "-o", "packed", "--to", "packed24")
    size = sum(tensor.nbytes for tensor in load_file("packed/packed24.safetensors").values())
    assert bench.storage.packed24_bytes == size
    again = json.loads(cli("bench", "packed", *results, "--json").stdout)
    assert again["storage"] == bench.storage.model_dump()
    text = cli("compare", *results).stdout
    assert f"{size / bench.storage.dense_bytes:.2f}" in text and "bytes" in text
    reason = "not measured (no CPU kernel: no C++ compiler)"
    assert f"speed {reason}" in " ".join(text.split())
    lines = io.StringIO(cli("compare", *results, "--format", "csv").stdout)
    (row,) = (row for row in csv.DictReader(lines) if row["method"] == "magnitude")
    assert (row["storage"], row["speed"]) == ("2:4", reason)
    assert float(row["bytes_ratio"]) == size / bench.storage.dense_bytes
    assert row["decode_speedup"] == row["prefill_speedup"] == ""
    shutil.copytree("ck", "bare")
    Path("bare/prunebench.json").unlink()
    assert "quality: unknown" in cli("bench", "bare", *results, "-o", "b.json").stdout
    assert json.loads(Path("b.json").read_text())["result_id"] is None
    assert "speed: not measured" in cli("bench", result.id[:12], *results).stdout


def test_explain(cli, tiny_run, tmp_path):
    cli(*tiny_run, *BF16, "2:4")
    text = cli("bench", "ck", "--explain").stdout
    # layers of one shape run alike, at every number of tokens
    assert text.count("not cslt: the device is cpu, not cuda") == 4
    assert "model.layers.*.self_attn.q_proj, model.layers.*.self_attn.o_proj  32 x 32" in text
    assert text.count("1, 4, 8, 64, 2,048 tokens: reference") == 4
    rows = json.loads(cli("bench", "ck", "--explain", "--json").stdout)
    assert rows[0]["backend"] == "reference" and len(rows) == 105


def test_unstructured_weights_are_computed_as_a_bitmap(cli, tiny_run, tmp_path):
    cli(*tiny_run, *BF16, "0.5")
    outcome = cli("bench", "ck", "--json")
    storage = json.loads(outcome.stdout)["storage"]
    weights = load_file("ck/model.safetensors")
    linears = [w for n, w in weights.items() if "proj" in n]
    expected = sum(int((w != 0).sum()) * 2 + math.ceil(w.numel() / 8) for w in linears)
    rest = sum(w.nbytes for n, w in weights.items() if "proj" not in n)
    assert storage["bitmap_bytes"] == expected + rest and storage["packed24_bytes"] is None
    assert storage["label"] == "computed"


def test_removed_blocks_are_named_before_the_bytes_of_what_is_left(cli, tiny_run, tiny_folder):
    cli(*tiny_run, "-m", "depth", "--sparsity", "0.34", "--save-model", "ck")
    text = " ".join(cli("bench", "ck").stdout.split())
    counts = [
        sum(tensor.numel() for tensor in load_file(Path(folder, "model.safetensors")).values())
        for folder in ("ck", tiny_folder)
    ]
    share = counts[0] / counts[1]
    assert (
        f"1 of 3 blocks were removed, {share:.2%} of the dense model's parameters are left" in text
    )
    assert text.index("are left") < text.index("1.0000 computed")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("nowhere/ck", 3, "there is no folder nowhere/ck"),
        ("ck --vs sparse", 2, "--vs 'sparse' is not known"),
        ("ck --storage fast", 2, "is not known"),
        ("ck --backend tritn", 2, "did you mean 'triton'?"),
        ("ck --backend cslt", 2, "the device is cpu, not cuda"),
        ("ck --device cuda:3", 3, "cuda:3 is not available"),
    ],
)
def test_wrong_words(cli, tiny_folder, arguments, code, says):
    shutil.copytree(tiny_folder, "ck")
    assert says in cli("bench", *arguments.split(), code=code).output


def test_a_run_whose_weights_were_not_saved(cli, tiny_run, tmp_path):
    cli(*tiny_run, *["-m", "magnitude", "--sparsity", "2:4"])
    (result,) = ResultStore(tmp_path / "results").read()[0]
    outcome = cli("bench", result.id, "--results-dir", tmp_path / "results", code=3)
    assert "are not here" in outcome.output and "--save-model DIR" in outcome.output


def test_a_folder_that_another_run_has_written_is_not_benched_as_the_first(
    cli, tiny_run, tmp_path, monkeypatch
):
    without_cpu_kernels(monkeypatch)
    results = ("--results-dir", tmp_path / "results")
    saved = ("--sparsity", "2:4", "--save-model", "ck", "--force")
    for method in ("magnitude", "random"):
        monkeypatch.setattr("sys.argv", ["prunebench", "run", "--save-model", "ck"])
        cli(*tiny_run, "-m", method, *saved)
    rows = {row.spec.method: row for row in ResultStore(tmp_path / "results").read()[0]}
    output = cli("bench", rows["magnitude"].id, *results, code=4).output
    assert f"ck no longer has the weights of {rows['magnitude'].id}" in output
    assert f"it has those of {rows['random'].id}" in " ".join(output.split())
    cli("bench", rows["random"].id, *results)
    cli("bench", "ck", *results)
    # changed after they were scored: their quality is not that of the result
    path = tmp_path / "work" / "ck" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    assert "are not those that were scored" in cli("bench", "ck", *results, code=4).output


def test_a_damaged_bench_is_skipped_and_named(cli, tiny_run, tmp_path):
    cli(*tiny_run, *["-m", "magnitude", "--sparsity", "2:4"])
    (tmp_path / "results" / "x.bench").write_text("{}")
    assert "x.bench is skipped" in cli("compare", "--results-dir", tmp_path / "results").output
