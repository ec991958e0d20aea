"""Backends of packed layers: which is chosen, which refuse and why, and measured choices."""

import subprocess
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import find_linears
from prunebench.sparse24.backends import cusparselt as cslt
from prunebench.sparse24.backends.cusparselt import (
    Algorithm,
    CuSparseLtBackend,
    CuSparseLtProduct,
    is_right,
)
from prunebench.sparse24.backends.protocol import has_tensor_cores
from prunebench.sparse24.backends.table import backends, require_backend
from prunebench.sparse24.buckets import BUCKETS, bucket_of
from prunebench.sparse24.layer import convert, explain
from prunebench.sparse24.layouts import FileLayout
from prunebench.sparse24.packed import pack24
from prunebench.sparse24.policy import Choice, Policy, table_key
from tests.factories import CPU, policy, pruned, random_24, without_cpu_kernels

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """Another test may have asked for Triton's interpreter, which would serve a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    without_cpu_kernels(monkeypatch)


# ---------------------------------------------------------------- choices


def test_buckets_have_no_gaps():
    assert [bucket_of(n).name for n in (1, 2, 3, 64, 65, 2048, 9000)] == [
        "1-2", "1-2", "3-8", "17-64", "65-256", "1025-2048", "4097-8192",
    ]  # fmt: skip
    assert all(a.last + 1 == b.first for a, b in zip(BUCKETS, BUCKETS[1:], strict=False))


def test_every_backend_says_why_not():
    rows = explain(convert(model := pruned(), find_linears(model), policy=policy()), [1, 2048])
    assert len(rows) == 42
    assert rows[0].backend == "reference" and "first usable one" in rows[0].why
    assert rows[0].why_not.keys() == {"triton", "cslt", "cpu", "decompress"}
    assert all(rows[0].why_not.values())
    assert rows[0].why_not["cslt"] == "the device is cpu, not cuda"


def test_measured_choices_are_kept_by_device(tmp_path):
    measured = policy()
    chosen = measured.remember(
        (64, 32), torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 2.0, "triton": 3.0}
    )
    assert (chosen.backend, chosen.ratio) == ("reference", 0.5)
    measured.save()
    again = Policy.load(CPU)
    assert again.table == measured.table
    assert again.choose((64, 32), torch.bfloat16, 2).why == "measured: 0.50x the dense speed"
    assert "0.50x the dense speed" in again.gains_nothing((64, 32), torch.bfloat16)
    assert not again.gains_nothing((64, 64), torch.bfloat16)
    again.path.write_text("[")
    assert Policy.load(CPU).table == {}
    key = table_key((64, 32), torch.bfloat16, bucket_of(9))
    fast = Policy(CPU, table=measured.table | {key: Choice("reference", "", 1.5)})
    assert not fast.gains_nothing((64, 32), torch.bfloat16)


def test_layers_without_a_gain_stay_dense():
    model = pruned()
    linears = find_linears(model)
    measured = policy()
    shape = (linears[0].out_features, linears[0].in_features)
    measured.remember(shape, torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 1.0})
    conversion = convert(model, linears, policy=measured)
    assert set(conversion.dense.values()) == {"no speedup measured: at best 1.00x the dense speed"}


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
        ((7, 5), 801, False, "cuSPARSELt does not support sm_75"),
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
    assert "second copy" in Policy(CUDA).verdicts(shape, torch.bfloat16, 2048)["cslt"].reason
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


def test_the_table_of_backends():
    assert tuple(backends()) == ("triton", "cslt", "cpu", "decompress", "reference")
