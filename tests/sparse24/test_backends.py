"""Backends of packed layers: which is chosen, which refuse and why, and measured choices."""

import importlib.util
import json
import subprocess
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.device import make_current
from prunebench.models.linears import find_linears
from prunebench.sparse24 import policy as policies
from prunebench.sparse24.backends import cusparselt as cslt
from prunebench.sparse24.backends.cusparselt import (
    Algorithm,
    CuSparseLtBackend,
    CuSparseLtProduct,
    TorchOperators,
    why_wrong,
)
from prunebench.sparse24.backends.protocol import has_tensor_cores
from prunebench.sparse24.backends.table import backends, require_backend
from prunebench.sparse24.backends.triton import TritonBackend
from prunebench.sparse24.buckets import BUCKETS, bucket_of
from prunebench.sparse24.layer import convert, explain
from prunebench.sparse24.layouts import FileLayout, Workspace
from prunebench.sparse24.packed import Report24, pack24
from prunebench.sparse24.policy import NOT_MEASURED, Policy, device_key, table_key
from tests.factories import CPU, DeviceOf, policy, pruned, random_24, without_cpu_kernels

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_cpu_kernels(monkeypatch):
    without_cpu_kernels(monkeypatch)


# ---------------------------------------------------------------- choices


def test_buckets_have_no_gaps():
    assert [bucket_of(n).name for n in (1, 2, 4, 5, 64, 65, 2048, 9000)] == [
        "1-1", "2-4", "2-4", "5-8", "17-64", "65-256", "1025-2048", "4097-8192",
    ]  # fmt: skip
    assert all(a.last + 1 == b.first for a, b in zip(BUCKETS, BUCKETS[1:], strict=False))


def test_every_backend_says_why_not():
    rows = explain(convert(model := pruned(), find_linears(model), policy=policy()), [1, 2048])
    assert len(rows) == 42
    assert rows[0].backend == "reference" and "not measured on this device" in rows[0].why
    assert rows[0].why_not.keys() == {"triton", "cslt", "cpu", "decompress"}
    assert all(rows[0].why_not.values())
    assert rows[0].why_not["cslt"] == "the device is cpu, not cuda"


def test_measurements_are_kept_by_device():
    measured = policy()
    times = {"dense": 1.0, "reference": 2.0, "triton": 4.0}
    measured.remember((64, 32), torch.bfloat16, bucket_of(4), times)
    measured.save()
    again = Policy.load(CPU)
    assert again.table == {"64x32 bfloat16 2-4": {"reference": 0.5, "triton": 0.25}}
    choice = again.choose((64, 32), torch.bfloat16, 2)
    assert (choice.backend, choice.ratio) == ("reference", 0.5)
    assert choice.why == "none is faster than dense here (best: reference, 0.50x): saves memory"
    assert "0.50x the dense speed" in again.gains_nothing((64, 32), torch.bfloat16)
    assert not again.gains_nothing((64, 64), torch.bfloat16)
    key = table_key((64, 32), torch.bfloat16, bucket_of(9))
    fast = Policy(CPU, table=again.table | {key: {"reference": 1.5}})
    assert not fast.gains_nothing((64, 32), torch.bfloat16)
    assert fast.choose((64, 32), torch.bfloat16, 9).why == "measured: 1.50x the dense speed"


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"64x32 bfloat16 2-4": {"backend": "reference", "why": "", "ratio": 2.0}}',  # of 0.1
        '{"format": 2, "measured": {"64x32 bfloat16 2-4": {"reference": 2.0}}}',
        '{"format": 1, "measured": {"64x32 bfloat16 2-4": {"reference": "2", "triton": -1}}}',
        '{"format": 1, "measured": {"64x32 bfloat16 2-4": {"reference": NaN}}}',
        '{"format": 1, "measured": [1]}',
    ],
)
def test_a_damaged_table_is_no_measurement(text):
    path = policy().path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    damaged = Policy.load(CPU)
    assert damaged.table == {}
    assert damaged.choose((64, 32), torch.bfloat16, 2).why == NOT_MEASURED


def test_known_devices_come_with_the_package(tmp_path, monkeypatch):
    """For the versions that were measured; what this machine measured itself is preferred."""
    row = {"64x32 bfloat16 1-1": {"reference": 2.0}, "8x8 bfloat16 1-1": {"reference": 3.0}}
    document = {"format": 1, "devices": {device_key(CPU): row, "another": {"x": {"triton": 9}}}}
    monkeypatch.setattr(policies, "KNOWN", tmp_path / "measured.json")
    policies.KNOWN.write_text(json.dumps(document))
    assert Policy.load(CPU).table == row
    policy(table={"8x8 bfloat16 1-1": {"reference": 0.5}}).save()
    assert Policy.load(CPU).table == row | {"8x8 bfloat16 1-1": {"reference": 0.5}}


def test_nothing_was_measured_yet():
    """The table of the package: whoever measures a chip adds it, see docs/sparse24.md."""
    assert json.loads(policies.KNOWN.read_text()) == {"format": 1, "devices": {}}


def test_layers_without_a_gain_stay_dense():
    model = pruned()
    linears = find_linears(model)
    measured = policy()
    shape = (linears[0].out_features, linears[0].in_features)
    measured.remember(shape, torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 1.0})
    conversion = convert(model, linears, policy=measured)
    assert set(conversion.dense.values()) == {"no speedup measured: at best 1.00x the dense speed"}
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        measured.remember(shape, torch.bfloat16, bucket_of(1), {"dense": 1.0, "reference": 1.0})
    assert not convert(model := pruned(), find_linears(model), policy=measured).layers
    kept = convert(model, find_linears(model), policy=measured, for_memory=True)
    assert len(kept.layers) == len(linears) and not kept.dense


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
        ((64, 64), torch.bfloat16, 4, "cuSPARSELt pads them to 8"),
        ((64, 64), torch.bfloat16, 5, ""),
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


SHAPE = (4096, 4096)


def on_a_gpu(**options):
    return Policy(CUDA, **options)


def test_a_gpu_without_measurements_is_no_reason_for_a_kernel(gpu):
    gpu()
    for tokens in (1, 4, 8, 64, 2048):
        for speed in (False, True):
            choice = on_a_gpu(speed=speed).choose(SHAPE, torch.bfloat16, tokens)
            assert (choice.backend, choice.ratio, choice.why) == ("decompress", None, NOT_MEASURED)
    assert on_a_gpu().verdicts(SHAPE, torch.bfloat16, 1)["triton"].ok
    assert not on_a_gpu().gains_nothing(SHAPE, torch.bfloat16)


def test_a_kernel_is_used_where_it_was_measured_as_faster(gpu):
    gpu()
    table = {
        "4096x4096 bfloat16 1-1": {"triton": 1.4, "decompress": 0.5},
        "4096x4096 bfloat16 2-4": {"triton": 1.01, "decompress": 0.5},
        "4096x4096 bfloat16 1025-2048": {"cslt": 1.3, "decompress": 0.9},
    }
    measured = on_a_gpu(table=table, speed=True)
    choices = {n: measured.choose(SHAPE, torch.bfloat16, n) for n in (1, 2, 8, 1025, 2049)}
    assert {n: choice.backend for n, choice in choices.items()} == {
        1: "triton", 2: "decompress", 8: "decompress", 1025: "cslt", 2049: "decompress",
    }  # fmt: skip
    assert choices[1].why == "measured: 1.40x the dense speed"
    assert "best: triton, 1.01x" in choices[2].why and choices[2].ratio == 0.5
    assert choices[8].why == NOT_MEASURED
    # Another shape or dtype was not measured.
    assert measured.choose((4096, 8192), torch.bfloat16, 1).backend == "decompress"
    assert measured.choose(SHAPE, torch.float16, 1).backend == "decompress"


def test_a_second_copy_is_only_stored_when_asked_for(gpu):
    gpu()
    table = {"4096x4096 bfloat16 1025-2048": {"cslt": 1.3, "decompress": 0.9}}
    plain = on_a_gpu(table=table)
    assert plain.choose(SHAPE, torch.bfloat16, 2048).backend == "decompress"
    assert "second copy" in plain.verdicts(SHAPE, torch.bfloat16, 2048)["cslt"].reason
    # Its gain is none of a layer that may not use it.
    assert "at best 0.90x" in plain.gains_nothing(SHAPE, torch.bfloat16)
    assert not on_a_gpu(table=table, speed=True).gains_nothing(SHAPE, torch.bfloat16)
    forced = on_a_gpu(forced="cslt").choose(SHAPE, torch.bfloat16, 2048)
    assert forced.why == "forced by --backend"


def test_a_machine_without_triton_or_a_compiler_says_so(gpu, monkeypatch):
    gpu()
    assert TritonBackend().available(CUDA).ok
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "triton needs a C compiler" in TritonBackend().available(CUDA).reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TritonBackend().available(CUDA).reason == "triton is not installed"


def test_a_chip_below_sm_80_unpacks(gpu):
    gpu((7, 5))
    turing = on_a_gpu()
    assert turing.choose(SHAPE, torch.bfloat16, 1).backend == "decompress"
    assert turing.verdicts(SHAPE, torch.bfloat16, 1)["triton"].reason == (
        "the chip is sm_75, below sm_80"
    )


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
    assert why_wrong(Algorithm(7), product, x, weight).startswith("relative error 1.0e-01, above")
    assert why_wrong(Algorithm(8), product, x, weight) == "its results differ from run to run"
    assert product.settings(70).endswith("8 refused: its results differ from run to run')")
    assert set(product.operators.calls) == {72, 256}  # padded to 8, searched at the bucket's end
    with pytest.raises(IncompatibleData, match="cuSPARSELt gives wrong results for 32 x 64"):
        CuSparseLtProduct.of(FileLayout(pack24(weight)), Fake(found=(Algorithm(7),))).run(x, None)


def test_the_library_works_on_the_device_of_its_tensors(monkeypatch):
    devices = []

    def operator(tensor, *others, **options):
        devices.append(DeviceOf.current)
        return tensor

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    for name in ("_cslt_compress", "_cslt_sparse_mm"):
        monkeypatch.setattr(torch, name, operator)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *a, **k: operator(7))
    monkeypatch.setattr(torch._C, "_cusparselt", None, raising=False)
    weight, x = random_24(16, 4), torch.zeros(8, 16, dtype=torch.bfloat16)
    operators = TorchOperators()
    operators.mm(operators.compress(weight), x, None, Algorithm())
    assert operators.search(weight, x, None) == [Algorithm(7), Algorithm()]
    assert devices == [weight.data_ptr()] * 3


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        make_current(torch.device(device))
    assert chosen == [torch.device("cuda:1")]


def test_layers_of_one_shape_are_searched_once(monkeypatch):
    operators = Fake(found=(Algorithm(0),))
    monkeypatch.setattr(cslt, "TorchOperators", lambda: operators)
    backend, x = CuSparseLtBackend(), torch.randn(70, 64).to(torch.bfloat16)
    for rows in (32, 32, 48):
        backend.build(FileLayout(pack24(random_24(rows, 16)))).run(x, None)
    assert operators.calls.count(256) == 2 * cslt._REPEATS  # two shapes
    assert operators.calls.count(72) == 3


def test_a_workspace_is_never_freed():
    """A CUDA graph that was captured with the small one still writes to it."""
    workspace = Workspace()
    small, large = (FileLayout(pack24(random_24(rows, 16))) for rows in (8, 32))
    first = workspace.matrix(small)
    address = first.data_ptr()
    del first
    assert workspace.matrix(large).data_ptr() != address
    assert workspace.bytes == (8 + 32) * 64 * 2
    assert workspace.matrix(small).data_ptr() == workspace.matrix(large).data_ptr()


def test_packing_that_runs_out_of_memory_goes_on_in_halves(monkeypatch):
    from prunebench.sparse24 import packed as module

    weight = random_24(256, 512)  # 2**17 groups
    expected, bits, calls = pack24(weight), module._bits, []

    def scarce(four):
        calls.append(four.numel() // 4)
        if calls[-1] > 1 << 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bits(four)

    monkeypatch.setattr(module, "_bits", scarce)
    again = pack24(weight)
    assert torch.equal(again.values, expected.values) and torch.equal(again.codes, expected.codes)
    assert calls == [1 << 17, 1 << 16, *[1 << 15] * 4]
    assert module.check_24(weight) == Report24(1 << 17, 0, 0, 0, None)

    def none_left(four):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_bits", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        pack24(weight)


def test_the_table_of_backends():
    assert tuple(backends()) == ("triton", "cslt", "cpu", "decompress", "reference")
