"""Layers that run packed: exact by `reference`, guarded, explained, and put back."""

import copy
import json
import subprocess
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import find_linears
from prunebench.models.load import hash_weights
from prunebench.results.store import ResultStore
from prunebench.sparse24.backends import cusparselt as cslt
from prunebench.sparse24.backends.cusparselt import (
    Algorithm,
    CuSparseLtBackend,
    CuSparseLtProduct,
    is_right,
)
from prunebench.sparse24.backends.protocol import has_tensor_cores
from prunebench.sparse24.backends.table import backends, require_backend
from prunebench.sparse24.backends.unpack import Decompress
from prunebench.sparse24.buckets import BUCKETS, bucket_of
from prunebench.sparse24.layer import Sparse24Linear, convert, explain
from prunebench.sparse24.layouts import FileLayout, Workspace
from prunebench.sparse24.packed import pack24, unpack24
from prunebench.sparse24.policy import Choice, Policy, table_key
from prunebench.testing import tiny_model, tiny_tokens
from tests.factories import pruned, random_24

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """Another test may have asked for Triton's interpreter, which would serve a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def policy(**options):
    return Policy(CPU, **options)


# ---------------------------------------------------------------- the layer


def test_the_layer_computes_what_the_dense_one_does():
    weight, bias = random_24(24, 16), torch.randn(24).to(torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), bias, policy=policy())
    for shape in ((64,), (3, 64), (2, 5, 64)):
        x = torch.randn(shape).to(torch.bfloat16)
        assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))
    strided = torch.randn(64, 7).to(torch.bfloat16).T
    assert torch.equal(layer(strided), nn.functional.linear(strided, weight, bias))
    assert layer.stored_bytes == 0.5625 * layer.dense_bytes
    assert "backend=reference" in repr(layer)


def test_its_state_is_the_canonical_format():
    packed = pack24(random_24(24, 16))
    state = Sparse24Linear(packed, None, policy=policy()).state_dict()
    assert state.keys() == {"values24", "codes24"}
    assert torch.equal(state["values24"], packed.values)


def test_a_state_is_taken_up():
    one, other = (pack24(random_24(24, 16, seed=seed)) for seed in (1, 2))
    biases = [torch.full((24,), value, dtype=torch.bfloat16) for value in (1.0, 2.0)]
    source = nn.Sequential(Sparse24Linear(one, biases[0], policy=policy()))
    target = nn.Sequential(Sparse24Linear(other, biases[1], policy=policy()))
    x = torch.randn(3, 64).to(torch.bfloat16)
    assert not torch.equal(target(x), source(x))
    state = {name: value.clone() for name, value in source.state_dict().items()}
    target.load_state_dict(state)
    assert torch.equal(target(x), source(x))
    for value in state.values():
        value.zero_()  # the layer has its own
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.codes24": None}, "Missing key.*0.codes24"),
        ({"0.weight": torch.zeros(1)}, "Unexpected key.*0.weight"),
        ({"0.codes24": torch.zeros(24, 8, dtype=torch.uint8)}, "0 is not a packed 2:4 matrix"),
        ({"0.values24": torch.zeros(24, 32, dtype=torch.float16)}, "float16 matrix"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, says):
    target = nn.Sequential(Sparse24Linear(pack24(random_24(24, 16)), None, policy=policy()))
    state = {k: v for k, v in {**target.state_dict(), **change}.items() if v is not None}
    before = target[0].packed()
    with pytest.raises(RuntimeError, match=says):
        target.load_state_dict(state)
    assert torch.equal(target[0].packed().values, before.values)


def test_gradients_pass_through():
    weight = random_24(8, 4)
    x = torch.randn(3, 16).to(torch.bfloat16).requires_grad_()
    Sparse24Linear(pack24(weight), None, policy=policy())(x).sum().backward()
    assert torch.equal(x.grad, weight.sum(0).expand(3, 16).to(torch.bfloat16))


def test_a_bias_of_another_dtype_is_refused():
    with pytest.raises(IncompatibleData, match="the bias is torch.float32"):
        Sparse24Linear(pack24(random_24(8, 4)), torch.zeros(8), policy=policy())


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_a_model_runs_packed_and_comes_back(architecture):
    model = pruned(architecture)
    before, weights = model(tiny_tokens()).logits, hash_weights(model)
    linears = find_linears(model)
    conversion = convert(model, linears, policy=policy())
    assert len(conversion.layers) == len(linears) and not conversion.dense
    assert conversion.stored_bytes == 0.5625 * conversion.dense_bytes
    assert conversion.count(512) == {"reference": len(linears)}
    assert torch.allclose(model(tiny_tokens()).logits, before, rtol=0.02, atol=0.02)
    conversion.restore()
    assert hash_weights(model) == weights
    assert torch.equal(model(tiny_tokens()).logits, before)


def test_no_layer_is_there_twice():
    """When a layer is packed, those before it have no dense weight any more."""
    model = pruned()
    linears = find_linears(model)
    convert(model, linears, policy=policy())
    assert all(one.module.weight is None for one in linears)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "proj" in name]


def test_what_is_not_2_4_stays_dense_and_is_listed():
    model = pruned()
    linears = find_linears(model)
    linears[3].stored[1, 4:8] = 1
    other = copy.deepcopy(model)
    conversion = convert(other, find_linears(other), policy=policy())
    with pytest.raises(IncompatibleData, match=rf"{linears[3].name} is not 2:4: row 1, columns 4"):
        convert(model, linears, policy=policy(), strict=True)
    assert list(conversion.dense) == [linears[3].name]
    assert "not 2:4: 1 of" in conversion.dense[linears[3].name]
    last = explain(conversion, [1])[-1]
    assert (last.layer, last.backend) == (linears[3].name, "dense")


def test_experts_stay_dense():
    model = tiny_model("mixtral").to(torch.bfloat16)
    for linear in find_linears(model):
        if linear.expert is None:
            linear.stored.copy_(random_24(linear.out_features, linear.in_features // 4))
    conversion = convert(model, find_linears(model), policy=policy())
    assert len(conversion.layers) == 12
    assert set(conversion.dense.values()) == {
        "the experts of a mixture are one parameter, not layers"
    }


def test_nothing_to_convert():
    with pytest.raises(IncompatibleData, match="no layer can be run as 2:4"):
        convert(model := tiny_model("llama"), find_linears(model), policy=policy())


# ---------------------------------------------------------------- choices


def test_buckets_have_no_gaps():
    assert [bucket_of(n).name for n in (1, 2, 3, 64, 65, 2048, 9000)] == [
        "1-2", "1-2", "3-8", "17-64", "65-256", "1025-2048", "4097-8192",
    ]  # fmt: skip
    assert all(a.last + 1 == b.first for a, b in zip(BUCKETS, BUCKETS[1:], strict=False))


def test_every_backend_says_why_not():
    rows = explain(convert(model := pruned(), find_linears(model), policy=policy()), [1, 2048])
    assert len(rows) == 42
    assert rows[0].backend == "reference" and "first that can" in rows[0].why
    assert rows[0].why_not.keys() == {"triton", "cslt", "decompress"}
    assert all(rows[0].why_not.values())
    assert rows[0].why_not["cslt"] == "the device is cpu, not cuda"


def test_measured_choices_are_kept_by_device(tmp_path):
    one = policy()
    chosen = one.remember(
        (64, 32), torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 2.0, "triton": 3.0}
    )
    assert (chosen.backend, chosen.ratio) == ("reference", 0.5)
    one.save()
    again = Policy.load(CPU)
    assert again.table == one.table
    assert again.choose((64, 32), torch.bfloat16, 2).why == "measured: 0.50 times the dense speed"
    assert "0.50 of the dense speed" in again.gains_nothing((64, 32), torch.bfloat16)
    assert not again.gains_nothing((64, 64), torch.bfloat16)
    again.path.write_text("[")
    assert Policy.load(CPU).table == {}
    key = table_key((64, 32), torch.bfloat16, bucket_of(9))
    fast = Policy(CPU, table=one.table | {key: Choice("reference", "", 1.5)})
    assert not fast.gains_nothing((64, 32), torch.bfloat16)


def test_layers_without_a_gain_stay_dense():
    model = pruned()
    linears = find_linears(model)
    measured = policy()
    shape = (linears[0].out_features, linears[0].in_features)
    measured.remember(shape, torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 1.0})
    conversion = convert(model, linears, policy=measured)
    assert set(conversion.dense.values()) == {
        "no gain was measured: at best 1.00 of the dense speed"
    }


def test_a_forced_backend():
    assert policy(forced="reference").choose((8, 8), torch.bfloat16, 1).why == "forced by --backend"
    other = policy(forced="cslt").choose((8, 8), torch.bfloat16, 1)
    assert other.backend == "reference" and "--backend cslt cannot: the device is cpu" in other.why
    with pytest.raises(UsageError, match="did you mean 'triton'"):
        require_backend("trition", CPU)
    with pytest.raises(UsageError, match="the device is cpu, not cuda"):
        require_backend("decompress", CPU)


# ---------------------------------------------------------------- guards that need no GPU


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a CUDA device, as far as guards look."""

    def pretend(capability=(9, 0), version=801):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version is not None)
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)

    return pretend


@pytest.mark.parametrize(
    ("capability", "version", "ok", "says"),
    [
        ((9, 0), 801, True, "cuSPARSELt 801"),
        ((9, 0), 800, True, "0.8.0 is known to be slow on H100"),
        ((8, 0), 800, True, "cuSPARSELt 800"),
        ((7, 5), 801, False, "cuSPARSELt does not know sm_75"),
        ((9, 0), None, False, "built without cuSPARSELt"),
    ],
)
def test_the_library_and_the_chip(gpu, capability, version, ok, says):
    gpu(capability, version)
    verdict = CuSparseLtBackend().available(CUDA)
    assert verdict.ok == ok and says in verdict.reason


def test_a_torch_without_the_operators(gpu, monkeypatch):
    gpu()
    monkeypatch.delattr(torch, "_cslt_compress")
    assert "has no cuSPARSELt operators" in CuSparseLtBackend().available(CUDA).reason


def test_a_chip_below_sm_80(gpu):
    gpu((7, 5))
    assert has_tensor_cores(CUDA).reason == "the chip is sm_75, below sm_80"


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "says"),
    [
        ((64, 64), torch.bfloat16, 63, "no gain below 64"),
        ((60, 64), torch.bfloat16, 64, "16 does not divide 60 x 64"),
        ((64, 64), torch.float32, 64, "weights are float32, not 16 bits"),
        ((64, 64), torch.bfloat16, 64, ""),
    ],
)
def test_what_cuda_s_library_takes(shape, dtype, tokens, says):
    verdict = CuSparseLtBackend().takes(shape, dtype, tokens)
    assert verdict.ok == (not says) and says in verdict.reason


@pytest.mark.parametrize(("code", "says"), [(0, "float16 works here"), (-6, "float16 fails")])
def test_float16_is_tried_in_a_process_of_its_own(monkeypatch, code, says):
    cslt._float16_survives.cache_clear()
    done = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    verdict = CuSparseLtBackend().takes((64, 64), torch.float16, 64)
    assert verdict.ok == (code == 0) and says in verdict.reason
    cslt._float16_survives.cache_clear()


def test_a_second_form_is_only_kept_when_asked_for(gpu):
    gpu()
    shape = (4096, 4096)
    assert Policy(CUDA).choose(shape, torch.bfloat16, 2048).backend == "decompress"
    assert Policy(CUDA, speed=True).choose(shape, torch.bfloat16, 2048).backend == "cslt"
    assert "second form" in Policy(CUDA).verdicts(shape, torch.bfloat16, 2048)["cslt"].reason
    assert Policy(CUDA, speed=True).choose(shape, torch.bfloat16, 8).backend == "triton"


@dataclass
class Fake:
    """The library's operators on a CPU: algorithm 7 is wrong, 8 changes from run to run."""

    has_split_k: bool = True
    found: tuple[Algorithm, ...] = (Algorithm(7), Algorithm(8), Algorithm(0))
    calls: list[int] = field(default_factory=list)
    noise: int = 0

    def compress(self, weight):
        return weight.clone()

    def mm(self, blob, x, bias, algorithm):
        self.calls.append(len(x))
        out = nn.functional.linear(x, blob, bias)
        if algorithm.id == 7:
            out = out * 1.1
        if algorithm.id == 8:
            self.noise += 1
            out[0, 0] += out[0, 0].abs() * self.noise * 2**-8
        return out

    def search(self, blob, x, bias):
        return list(self.found)


def test_wrong_algorithms_are_not_used():
    weight = random_24(32, 16)
    product = CuSparseLtProduct.of(FileLayout(pack24(weight)), Fake())
    x = torch.randn(70, 64).to(torch.bfloat16)
    assert torch.equal(product.run(x, None), nn.functional.linear(x, weight))
    assert product.algorithms == {"65-256": Algorithm(0)}
    assert not is_right(Algorithm(7), product, x, weight)
    assert not is_right(Algorithm(8), product, x, weight)
    assert set(product.operators.calls) == {72, 256}  # padded to 8, searched at the bucket's end
    with pytest.raises(IncompatibleData, match="cuSPARSELt gives wrong results for 32 x 64"):
        CuSparseLtProduct.of(FileLayout(pack24(weight)), Fake(found=(Algorithm(7),))).run(x, None)


# ---------------------------------------------------------------- decompress


def test_layers_share_one_workspace():
    small, large = (FileLayout(pack24(random_24(n, 16))) for n in (8, 32))
    backend = Decompress()
    x = torch.randn(3, 64).to(torch.bfloat16)
    for form in (small, large, small):
        found = backend.build(form).run(x, None)
        assert torch.equal(found, nn.functional.linear(x, unpack24(form.packed())))
    assert backend.workspace.bytes == 32 * 64 * 2
    assert Workspace().bytes == 0


def test_the_table_of_backends():
    assert tuple(backends()) == ("triton", "cslt", "decompress", "reference")


# ---------------------------------------------------------------- run --execute sparse24


def test_a_run_that_is_scored_packed(cli, tiny_run, tmp_path):
    arguments = ["-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16"]
    cli(*tiny_run, *arguments)
    outcome = cli(*tiny_run, *arguments, "--execute", "sparse24", "--save-model", "ck")
    assert "packed 2:4 weights: 21 by reference; 0.5625 of their dense bytes" in outcome.stdout
    results, _ = ResultStore(tmp_path / "results").read()
    packed = next(r for r in results if r.spec.execute == "sparse24")
    masked = next(r for r in results if r.spec.execute == "dense")
    assert packed.scores[0].value == pytest.approx(masked.scores[0].value, rel=1e-3)
    assert packed.model.evaluated_sha256 == masked.model.evaluated_sha256
    assert packed.execution.backends == {"reference": 21}
    assert packed.execution.ppl_difference == 0 and masked.execution is None
    assert packed.spec_id != masked.spec_id
    assert "execute" not in json.loads(masked.spec.canonical_json())
    assert "execute" in cli("compare", "--results-dir", tmp_path / "results").stdout
    again = cli("run", "-M", "ck", *tiny_run[3:], "-m", "dense", "--dtype", "bfloat16",
                "--execute", "sparse24", "--json")  # fmt: skip
    found = json.loads(again.stdout)
    assert found["scores"][0]["value"] == packed.scores[0].value


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--sparsity 0.5 --dtype bfloat16 --execute sparse24", 2, "does not go with --sparsity"),
        ("--sparsity 4:8 --dtype bfloat16 --execute sparse24", 2, "does not go with --sparsity"),
        ("--sparsity 2:4 --execute sparse24", 2, "does not go with --dtype float32"),
        ("--sparsity 2:4 --execute sparce24", 2, "did you mean 'sparse24'?"),
        ("--sparsity 2:4 --backend triton", 2, "goes with --execute sparse24"),
        (
            "--sparsity 2:4 --dtype bfloat16 --execute sparse24 --backend cslt", 2,
            "the backend cslt cannot be used on cpu",
        ),
    ],
)  # fmt: skip
def test_wrong_executions(cli, tiny_run, arguments, code, says):
    assert says in cli(*tiny_run, "-m", "magnitude", *arguments.split(), code=code).output


def test_a_dense_model_cannot_be_scored_packed(cli, tiny_run):
    arguments = ["-m", "dense", "--dtype", "bfloat16", "--execute", "sparse24"]
    output = cli(*tiny_run, *arguments, code=4).output
    assert "q_proj is not 2:4: row 0, columns 0 to 3 hold" in output
