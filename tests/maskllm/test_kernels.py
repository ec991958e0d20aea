"""The Triton kernels against plain torch: in the interpreter, or compiled where there is a GPU."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton is made for Linux on x86_64", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from prunebench.models.linears import find_linears
from prunebench.pruners.maskllm import dispatch, noise, triton_ops
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.gradients import FactoredSums
from prunebench.pruners.maskllm.moments import PackedMoments
from prunebench.pruners.maskllm.optimize import Optimizer, sum_squares
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.testing import tiny_model
from prunebench.training.shards import Shards

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = True  # these tests keep the variable, see conftest.py
FLOAT, BF16 = torch.float32, torch.bfloat16
HOW = Relaxation(seed=11, step=3, temperature=0.8, scale=2.0, noise=1.0)


def case(pattern, *, rows=2, width=45, logits=FLOAT, weights=FLOAT, first=900):
    """A layer, its weight and a slope on the CPU; the groups do not divide a block."""
    generator = torch.Generator().manual_seed(rows + width)
    table = candidates(*pattern)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    layer = LayerLogits(7, random(len(table), rows * width).to(logits), table, width, first=first)
    columns = width * pattern[1]
    weight = random(rows, columns).to(weights)
    slope = WeightGradient(
        random(rows, columns).to(weights), random(rows).square(), random(columns) ** 2
    )
    return layer, weight, slope


def moved(thing, device=DEVICE):
    """A copy on the device of the kernels."""
    if isinstance(thing, torch.Tensor):
        return thing.clone().to(device)
    if isinstance(thing, dict):
        return {name: moved(value) for name, value in thing.items()}
    if isinstance(thing, LayerLogits | WeightGradient | PackedMoments):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        return type(thing)(**{name: moved(value) for name, value in fields.items()})
    return thing


@pytest.mark.parametrize(("first", "choices"), [(0, 6), ((1 << 32) - 70, 8)])
def test_the_noise_is_the_same_bit_for_bit(first, choices):
    key = {"seed": 4_000_000_000, "step": 12, "layer": 3}
    index = torch.arange(first, first + 100)
    actual = triton_ops.uniforms(first, 100, choices, **key, device=DEVICE)
    assert torch.equal(actual.cpu(), noise.uniforms(index, choices, **key))


@pytest.mark.parametrize(
    ("pattern", "logits", "weights", "out", "noisy"),
    [
        ((2, 4), FLOAT, FLOAT, FLOAT, True),
        ((2, 4), BF16, BF16, BF16, False),
        ((1, 4), FLOAT, BF16, FLOAT, True),
        ((1, 8), BF16, FLOAT, FLOAT, True),
        ((1, 2), FLOAT, FLOAT, BF16, True),
    ],
)
def test_soft_masks(pattern, logits, weights, out, noisy):
    layer, weight, _ = case(pattern, logits=logits, weights=weights)
    how = dataclasses.replace(HOW, noise=float(noisy))
    expected = torch.empty(weight.shape, dtype=out)
    layer.soften(weight, how, expected)
    actual = torch.empty(weight.shape, dtype=out, device=DEVICE)
    triton_ops.soften(moved(layer), moved(weight), how, actual)
    exact = weights == out == FLOAT
    allowed = (1e-6 if exact else torch.finfo(BF16).eps) * weight.float().abs()
    error = (actual.cpu().float() - expected.float()).abs()
    assert (error <= allowed).all()
    assert exact or (error == 0).float().mean() > 0.99


def test_soft_masks_at_the_end_of_the_paper():
    """Exponents of several hundreds: their own rounding is all that differs."""
    layer, weight, _ = case((2, 4), rows=3)
    layer.logits.mul_(0.03)
    how = dataclasses.replace(HOW, temperature=0.05, scale=500.0)
    expected, actual = torch.empty_like(weight), torch.empty_like(weight, device=DEVICE)
    layer.soften(weight, how, expected)
    triton_ops.soften(moved(layer), moved(weight), how, actual)
    largest = (layer.logits.abs().max() * how.scale + 15) / how.temperature
    allowed = 4 * torch.finfo(FLOAT).eps * largest * weight.abs()
    assert ((actual.cpu() - expected).abs() <= allowed).all()


def test_certainty():
    layer, _, _ = case((2, 4))
    assert triton_ops.certainty(moved(layer), HOW) == pytest.approx(layer.certainty(HOW), rel=1e-6)


UPDATES = [
    ("adamw", (2, 4), {"reward": 0.01}, FLOAT, "float32"),
    ("adamw", (1, 4), {"curvature": 0.3}, BF16, "bfloat16"),
    ("momentum", (2, 4), {}, FLOAT, "bfloat16"),
    ("mirror", (2, 4), {"reward": 0.01, "curvature": 0.3}, BF16, "float32"),
]


def close(actual, expected):
    """Within 1e-5, or a unit in the last place of bfloat16 in one of a hundred."""
    actual, expected = actual.cpu(), expected
    error = (actual.float() - expected.float()).abs()
    if expected.dtype == FLOAT:
        return bool((error <= 1e-5 * expected.abs().clamp(min=1)).all())
    units = torch.finfo(BF16).eps * expected.float().abs().clamp(min=1e-3)
    return bool((error <= units).all() and (error == 0).float().mean() > 0.99)


@pytest.mark.parametrize(("kind", "pattern", "terms", "dtype", "moments"), UPDATES)
def test_updates(kind, pattern, terms, dtype, moments):
    layer, weight, slope = case(
        pattern, rows=3 if kind == "mirror" else 2, logits=dtype, weights=dtype
    )
    how = dataclasses.replace(HOW, **terms)
    optimizer = Optimizer(kind, state_dtype=moments, outlier=2.0)
    optimizer.prepare(layer)
    for moment in layer.state.values():
        moment.values.copy_(torch.rand(moment.values.shape).mul_(0.1))
    on_device, given = moved(layer), (moved(weight), moved(slope), how)
    squares = triton_ops.sum_squares(on_device, *given, mirror=kind == "mirror")
    assert squares == pytest.approx(
        sum_squares(optimizer.directions(layer, weight, slope, how)), rel=1e-6
    )
    optimizer.step(layer, optimizer.directions(layer, weight, slope, how), how, rate=0.02, unit=0.7)
    triton_ops.update(
        on_device, *given, kind=kind, rate=0.02, unit=0.7, betas=optimizer.betas, eps=optimizer.eps,
        weight_decay=optimizer.weight_decay, outlier=optimizer.outlier,
    )  # fmt: skip
    assert close(on_device.logits, layer.logits)
    for name, moment in layer.state.items():
        assert close(on_device.state[name].values, moment.values)


def test_a_part_of_the_directions():
    layer, weight, slope = case((2, 4))
    part = slice(45, 90)
    actual = triton_ops.directions(
        moved(layer), moved(weight), moved(slope), HOW, mirror=False, part=part
    )
    (_, whole), *_ = Optimizer().directions(layer, weight, slope, HOW)
    assert close(actual, whole[:, part])


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_the_optimizer_takes_the_kernels_where_they_are_proven(monkeypatch, moments):
    """Eight bits keep their moments in plain torch, from directions that a kernel made."""
    layer, weight, slope = case((1, 4), rows=2)
    optimizer = Optimizer("momentum", state_dtype=moments)
    optimizer.prepare(layer)
    on_device = moved(layer)
    plain = optimizer.directions(layer, weight, slope, HOW)
    unit = sum_squares(plain)
    optimizer.step(layer, plain, HOW, rate=0.02, unit=unit)
    monkeypatch.setattr(dispatch, "kernels_match_torch", lambda device: True)
    ours = optimizer.directions(on_device, moved(weight), moved(slope), HOW)
    assert ours.kernels is triton_ops
    optimizer.step(on_device, ours, HOW, rate=0.02, unit=sum_squares(ours))
    assert close(on_device.logits, layer.logits)
    expected, actual = torch.empty_like(weight), torch.empty_like(weight, device=DEVICE)
    dispatch.soften(on_device, moved(weight), HOW, actual)
    assert dispatch.certainty(on_device, HOW) == pytest.approx(layer.certainty(HOW), rel=1e-5)
    monkeypatch.setattr(dispatch, "kernels_match_torch", lambda device: False)
    dispatch.soften(on_device, moved(weight), HOW, expected := torch.empty_like(actual))
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_what_has_no_kernel_runs_in_plain_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "kernels_match_torch", lambda device: True)
    for pattern, taken in (((2, 4), True), ((1, 8), True), ((4, 8), False), ((1, 3), False)):
        table = candidates(*pattern)
        kernels = dispatch.kernels_for(torch.zeros(len(table), 4), table)
        assert (kernels is triton_ops) == taken


def test_kernels_must_make_the_same_noise(monkeypatch):
    assert not dispatch.kernels_match_torch(CPU)  # they are for CUDA
    assert dispatch.kernel_mismatch(DEVICE) == ""
    monkeypatch.setattr(
        triton_ops, "uniforms", lambda first, n, c, **key: torch.zeros(c, n).to(DEVICE)
    )
    assert "not that of plain torch" in dispatch.kernel_mismatch(DEVICE)


def test_kernels_that_cannot_run_are_said_and_not_used(monkeypatch):
    def fail(device):
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(dispatch, "kernel_mismatch", fail)
    dispatch.kernels_match_torch.cache_clear()
    with pytest.warns(UserWarning, match="plain torch on cuda:9: RuntimeError: no C compiler$"):
        assert not dispatch.kernels_match_torch(torch.device("cuda:9"))
    dispatch.kernels_match_torch.cache_clear()
    monkeypatch.setenv("PRUNEBENCH_TRITON", "0")
    assert not dispatch.kernels_match_torch(torch.device("cuda:9"))
    dispatch.kernels_match_torch.cache_clear()


# ---------------------------------------------------------------- slower


@pytest.mark.real
def test_the_kernels_compile_for_gpus_that_are_not_here(monkeypatch):
    """For compute capability 8.0 and 9.0, without spilled registers."""
    code = Path(__file__).parents[1] / "scripts" / "compile_maskllm.py"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, str(code)], capture_output=True, text=True, check=False,
        cwd=code.parent.parent, env={**os.environ, "PYTHONPATH": str(code.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no spills") == 6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "momentum", "mirror"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_on_a_device_at_the_size_of_a_layer(kind, dtype):
    """A million groups: chosen by themselves on CUDA, the same as plain torch on the CPU."""
    layer, weight, slope = case((2, 4), rows=1000, width=1030, logits=dtype, weights=dtype)
    how = dataclasses.replace(HOW, reward=0.01, curvature=0.2)
    optimizer = Optimizer(kind, state_dtype="float32" if dtype == FLOAT else "bfloat16")
    optimizer.prepare(layer)
    on_device, device = moved(layer), torch.device("cuda")
    assert dispatch.kernels_for(on_device.logits, on_device.table) is triton_ops
    expected, actual = torch.empty_like(weight), torch.empty_like(weight, device=device)
    layer.soften(weight, how, expected)
    dispatch.soften(on_device, moved(weight), how, actual)
    allowed = (2e-6 if dtype == FLOAT else torch.finfo(BF16).eps) * weight.float().abs()
    assert ((actual.cpu().float() - expected.float()).abs() <= allowed).all()
    for part, w, s in ((layer, weight, slope), (on_device, moved(weight), moved(slope))):
        directions = optimizer.directions(part, w, s, how)
        optimizer.step(part, directions, how, rate=0.02, unit=sum_squares(directions) ** 0.5)
    assert close(on_device.logits, layer.logits)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_of_bfloat16_are_summed_in_float32(device):
    """Tensor cores give what float32 gives: the product of two bfloat16 numbers is exact there."""
    linear = find_linears(tiny_model("llama").to(device))[0]
    generator = torch.Generator().manual_seed(0)
    outer, inputs = (
        torch.randn(512, n, generator=generator).to(BF16)
        for n in (linear.out_features, linear.in_features)
    )
    sums = FactoredSums(Shards(), FLOAT)
    sums.fetch([linear], scale=0.5)
    sums.add_product(linear, outer.to(device), inputs.to(device))
    sums.release()
    expected = 0.5 * (outer.double().T @ inputs.double())
    assert torch.allclose(sums.owned[linear].gradient.cpu().double(), expected, atol=1e-3)
