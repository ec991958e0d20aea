"""The `cpu` backend: exact to rounding on every instruction set, and clear without a compiler."""

import functools
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from prunebench.models.linears import find_linears
from prunebench.sparse24.backends import cpu, cpu_build
from prunebench.sparse24.backends.cpu import CpuBackend, CpuProduct, MaskedLayout, multiply
from prunebench.sparse24.backends.cpu_build import NoKernels, best_instructions, build
from prunebench.sparse24.layer import Sparse24Linear, convert
from prunebench.sparse24.layouts import FileLayout
from prunebench.sparse24.packed import pack24, unpack24
from prunebench.testing import tiny_tokens
from tests.factories import CPU, policy, pruned, random_24

HERE = best_instructions()
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "avx512")]  # to compile
NAMES = {
    "avx512_bf16": ["avx512_bf16", *SLOWER, "portable"],
    "avx512": ["avx512", SLOWER[0], "portable"],
    "avx2": ["avx2", "portable"],
    "neon": ["neon"],  # 64-bit Arm always has it: the portable section is never compiled there
    "portable": ["portable"],
}[HERE]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(params=NAMES)
def kernels(request, compiled, monkeypatch):
    loaded = compiled(request.param)
    monkeypatch.setattr(cpu, "kernels", lambda: loaded)
    return loaded


def random_weight(rows, width, dtype, seed=0):
    return random_24(rows, width // 4, seed=seed).to(dtype)


def require_close(out, x, weight, bias=None):
    """Compare with the product in float64, up to float32 sums and one rounding to 16 bits."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # What float32 sums may lose: in proportion to the sum of absolute values.
    sums = (x.double().abs() @ weight.double().abs().T) * 2**-18
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= exact.abs() * ROUNDING[x.dtype] + sums).all()


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 4), (3, 12), (24, 64), (7, 100), (33, 556), (96, 1024)]
)
def test_products_are_right_to_rounding(kernels, rows, width, dtype):
    generator = torch.Generator().manual_seed(rows)
    weight = random_weight(rows, width, dtype)
    product = CpuProduct(MaskedLayout.of(pack24(weight)))
    bias = torch.randn(rows, generator=generator).to(dtype)
    dense = cpu.matrix_arguments(weight, (rows, width))
    for tokens in range(1, 9):
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        require_close(product.run(x, None), x, weight)
        require_close(product.run(x, bias), x, weight, bias)
        require_close(multiply(kernels, "dense16_multiply", dense, x, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_are_what_torch_computes(kernels, dtype):
    weight = random_weight(7, 100, dtype)
    product = CpuProduct(MaskedLayout.of(pack24(weight)))
    for tokens in (0, 9, 40):
        x = torch.randn(tokens, 100).to(dtype)
        assert torch.equal(product.run(x, None), nn.functional.linear(x, weight))


@pytest.mark.parametrize("width", [4, 12, 60, 64, 100, 556])
def test_the_layout_comes_back_bit_for_bit(kernels, width):
    weight = random_weight(9, width, torch.float16)
    weight[2] = 0  # groups without a value
    weight[3, 1:] = 0
    packed = pack24(weight)
    form = MaskedLayout.of(packed)
    back = form.packed()
    assert torch.equal(back.values, packed.values) and torch.equal(back.codes, packed.codes)
    assert form.stored_bytes == packed.bytes and form.shape == (9, width)
    out = torch.full((9, width), torch.nan, dtype=torch.float16)
    form.write_dense(out)
    assert torch.equal(out, weight)
    strided = torch.full((width, 9), torch.nan, dtype=torch.float16).T
    form.write_dense(strided)
    assert torch.equal(strided, weight)


def test_special_numbers(kernels):
    """Infinity, NaN, subnormal halves, and results beyond the range of float16."""
    weight = torch.zeros(3, 16, dtype=torch.float16)
    weight[0, 0], weight[1, 1], weight[2, 2] = 60000.0, 2**-24, -1.5
    product = CpuProduct(MaskedLayout.of(pack24(weight)))
    for x, expected in (
        (1.0, (60000.0, 2**-24, -1.5)),
        (2.0, (torch.inf, 2**-23, -3.0)),
        (0.5, (30000.0, 0.0, -0.75)),  # a tie: to even
        (torch.inf, (torch.inf, torch.inf, -torch.inf)),
    ):
        # only the input that each row reads: infinity times a zero weight is NaN, here and in torch
        row = torch.zeros(3, 16, dtype=torch.float16)
        row[range(3), range(3)] = x
        out = product.run(row, None).diagonal()
        assert torch.equal(out, torch.tensor(expected, dtype=torch.float16))
    x = torch.full((1, 16), torch.nan, dtype=torch.float16)
    assert product.run(x, None).isnan().all()
    large = pack24(torch.tensor([[3e38, 0, 3e38, 0]]).to(torch.bfloat16))
    ones = torch.ones(1, 4, dtype=torch.bfloat16)
    assert CpuProduct(MaskedLayout.of(large)).run(ones, None).item() == torch.inf


def test_the_number_of_threads_does_not_change_the_result(kernels):
    weight = random_weight(300, 1020, torch.bfloat16)  # large enough for several threads
    product = CpuProduct(MaskedLayout.of(pack24(weight)))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 3, 8):
            x = torch.randn(tokens, 1020).to(torch.bfloat16)
            outs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                outs.append(product.run(x, None))
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- layers


def test_a_layer_uses_it_and_takes_any_input(kernels):
    weight = random_weight(24, 64, torch.bfloat16)
    bias = torch.randn(48).to(torch.bfloat16)[::2]  # strided
    layer = Sparse24Linear(pack24(weight), bias, policy=policy())
    assert layer.form.name == "masked" and "backend=cpu" in repr(layer)
    assert layer.stored_bytes == 0.5625 * layer.dense_bytes
    for shape in ((64,), (3, 64), (2, 4, 64), (1, 1, 1, 64)):
        x = torch.randn(shape).to(torch.bfloat16)
        out = layer(x)
        assert out.shape == (*shape[:-1], 24)
        require_close(out.view(-1, 24), x.view(-1, 64), weight, bias)
    strided = torch.randn(64, 7).to(torch.bfloat16).T
    require_close(layer(strided), strided, weight, bias)
    assert layer(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 24)
    state = layer.state_dict()
    assert torch.equal(state["weight.codes24"], pack24(weight).codes)


@pytest.mark.parametrize("tokens", [1, 9])
def test_an_input_of_another_dtype_is_refused_as_by_a_dense_layer(kernels, tokens):
    weight = random_weight(24, 64, torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), None, policy=policy())
    for dtype in (torch.float32, torch.float16, torch.float64):
        x = torch.randn(tokens, 64).to(dtype)
        with pytest.raises(RuntimeError, match="dtype"):
            nn.functional.linear(x, weight)
        with pytest.raises(RuntimeError, match=rf"{dtype}, the packed weight torch.bfloat16"):
            layer(x)
    dense = cpu.matrix_arguments(weight, (24, 64))
    with pytest.raises(RuntimeError, match="float32, the matrix torch.bfloat16"):
        multiply(kernels, "dense16_multiply", dense, torch.randn(1, 64), None)
    with pytest.raises(RuntimeError, match="the bias torch.float32, the matrix torch.bfloat16"):
        multiply(kernels, "dense16_multiply", dense, torch.zeros(1, 64).bfloat16(), torch.zeros(24))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_autocast_casts_the_input_as_for_a_dense_layer(kernels, tokens, cast):
    weight, bias = random_weight(24, 64, torch.bfloat16), torch.randn(24).to(torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), bias, policy=policy())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(tokens, 64).to(dtype)
        with torch.autocast("cpu", dtype=cast):
            expected = nn.functional.linear(x, weight, bias)
            out = layer(x)
        assert out.dtype == expected.dtype == cast
        require_close(out, x.to(cast), weight, bias)


def test_a_forced_reference_reads_its_layout(kernels):
    weight = random_weight(24, 64, torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), None, policy=policy())
    x = torch.randn(2, 64).to(torch.bfloat16)
    assert torch.equal(layer.product_of("reference").run(x, None), nn.functional.linear(x, weight))
    assert torch.equal(unpack24(layer.packed()), weight)
    other = Sparse24Linear(pack24(weight), None, policy=policy(forced="reference"))
    product = other.product_of("cpu")  # of a layer in the file layout: a copy, which counts
    assert isinstance(other.form, FileLayout) and other.stored_bytes == 2 * layer.stored_bytes
    require_close(product.run(x, None), x, weight)


def test_the_verdict_of_the_policy(kernels):
    choose = functools.partial(policy().choose, (64, 64))
    assert choose(torch.bfloat16, 1).backend == "cpu"
    assert f"compiled for {kernels.instructions}" in choose(torch.bfloat16, 1).why
    assert "unpacked, then torch's dense product" in choose(torch.float16, 9).why
    assert choose(torch.float32, 1).backend == "reference"
    slow = "no AVX2" in choose(torch.bfloat16, 1).why
    assert slow == (kernels.instructions == "portable")


@pytest.mark.slow  # imports torch's compiler
def test_it_is_opaque_to_the_compiler(kernels):
    weight = random_weight(24, 64, torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), None, policy=policy())
    x = torch.randn(3, 64).to(torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_decodes_by_it_and_comes_back(kernels, architecture):
    model, dense = pruned(architecture), pruned(architecture)
    conversion = convert(model, find_linears(model), policy=policy())
    assert conversion.count(1) == {"cpu": len(conversion.layers)}
    ids = tiny_tokens(samples=1, seqlen=6)
    assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=0.02, atol=0.02)
    conversion.restore()
    assert torch.equal(model(ids).logits, dense(ids).logits)


# ---------------------------------------------------------------- compilers


@pytest.fixture
def uncached(monkeypatch, tmp_path, compiled):
    """An empty cache, and no library in memory."""
    compiled(HERE)  # into the cache of the module
    monkeypatch.setattr(cpu_build, "library_folder", lambda: tmp_path / "empty")
    cpu_build.kernels.cache_clear()
    yield tmp_path / "empty"
    cpu_build.kernels.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_reference_is_used_and_it_is_said_once(uncached, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="by `reference` on this CPU, slowly: no C\\+\\+ compiler"):
        verdict = CpuBackend().available(CPU)
    assert not verdict.ok and "none of c++, g++, clang++ is installed" in verdict.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = policy().choose((64, 64), torch.bfloat16, 1)
    assert choice.backend == "reference"


def test_a_compiler_that_fails_is_quoted(uncached, monkeypatch, tmp_path):
    bad = script(tmp_path / "bad", "echo first >&2; echo cc1plus: no space left >&2; exit 1")
    monkeypatch.setenv("CXX", bad)
    with pytest.warns(UserWarning, match=r"cannot compile the CPU kernels: cc1plus: no space left"):
        assert isinstance(cpu_build.kernels(), str)
    assert not list(uncached.rglob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(NoKernels, match="no C") as raised:
        build("portable")
    assert raised.value.where == "CXX is no-such-compiler -m64"


def test_a_compiler_without_openmp_gives_one_thread(uncached, monkeypatch, tmp_path):
    real = cpu_build.find_compiler()[0]
    text = f'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done; exec {real} "$@" -O0'
    monkeypatch.setenv("CXX", script(tmp_path / "plain", text))
    loaded = build("portable")
    assert not loaded.has_threads and cpu._threads((4096, 4096), loaded) == 1


def test_a_library_is_compiled_once_and_again_if_it_is_damaged(
    uncached, monkeypatch, tmp_path, compiled
):
    whole = compiled(HERE).library._name
    count = tmp_path / "count"
    text = f'[ "$1" = -dumpfullversion ] && exit; echo x >> {count}'
    text += f'; while [ "$1" != -o ]; do shift; done; cp {whole} "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "counting", text))
    build(HERE)
    build(HERE)
    assert count.read_text() == "x\n"

    (library,) = uncached.rglob("*.so")
    other = uncached.parent / "other"
    monkeypatch.setattr(cpu_build, "library_folder", lambda: other)  # a path that is not loaded yet
    other.mkdir()
    (other / library.name).write_bytes(b"damaged")
    build(HERE)
    assert count.read_text() == "x\nx\n"


def test_what_is_no_library_is_an_error(uncached, monkeypatch, tmp_path):
    text = 'while [ "$1" != -o ]; do [ $# = 0 ] && exit; shift; done; echo damaged > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "cc", text))
    with pytest.raises(NoKernels, match="cannot be loaded"):
        build("portable")


def test_a_cache_that_cannot_be_written(uncached, monkeypatch):
    uncached.write_text("a file, not a folder")
    with pytest.raises(NoKernels, match="the CPU kernels cannot be cached"):
        build("portable")


@pytest.mark.parametrize(
    ("machine", "has", "expected"),
    [
        ("x86_64", {}, "portable"),
        ("x86_64", {"avx2", "fma3", "f16c"}, "avx2"),
        ("x86_64", {"avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_bf16"}, "avx2"),
        ("aarch64", {}, "neon"),
        ("riscv64", {}, "portable"),
    ],
)
def test_the_instruction_set_of_a_cpu(monkeypatch, machine, has, expected):
    monkeypatch.setattr(cpu_build.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert best_instructions() == expected


def test_the_kernels_are_part_of_the_package():
    assert cpu_build.SOURCE.is_file() and cpu_build.HEADER.is_file()
    code = (
        "import sys, prunebench.sparse24.backends.table; sys.exit('subprocess' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MAIN = """
#include "cpu_kernels.cpp"
#include <cstdio>
int main() {
  const int rows = 5, width = 76, stride = 10;
  std::vector<uint16_t> values(rows * width / 2), x(3 * width), out(3 * rows), dense(rows * width);
  std::vector<uint8_t> mask(rows * stride);
  uint32_t seed = 1;
  auto next = [&] { return seed = seed * 1664525 + 1013904223, seed >> 16; };
  const uint8_t pairs[] = {3, 5, 6, 9, 10, 12};
  for (int type : {0, 1}) {
    for (auto* some : {&values, &x})
      for (auto& value : *some) value = round_to(float(next() % 2000) / 1000 - 1, Type(type));
    for (int n = 0; n < rows; ++n)
      for (int g = 0; g < width / 4; ++g)
        mask[n * stride + g / 2] = g % 2 ? mask[n * stride + g / 2] | pairs[next() % 6] << 4
                                         : pairs[next() % 6];
    const Sparse24Matrix matrix{values.data(), mask.data(), rows, width, stride, type};
    for (int tokens : {1, 3}) {
      sparse24_multiply(&matrix, x.data(), tokens, x.data(), out.data(), 1);
      for (int i = 0; i < tokens * rows; ++i) std::printf("%.9g\\n", to_float(out[i], Type(type)));
    }
    sparse24_unpack(&matrix, dense.data(), 1);
    for (auto value : dense) std::printf("%d\\n", value);
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_in_an_emulator(tmp_path):
    source = tmp_path / "main.cpp"
    source.write_text(MAIN)
    numbers = {}
    for name, compiler, runner in (
        ("portable", "g++", []), ("neon", "aarch64-linux-gnu-g++", ["qemu-aarch64"]),
    ):  # fmt: skip
        program = str(tmp_path / name)
        flags = ["-std=c++17", "-O2", "-static", "-w", f"-I{cpu_build.SOURCE.parent}"]
        subprocess.run([compiler, *flags, str(source), "-o", program], check=True)
        done = subprocess.run([*runner, program], check=True, capture_output=True, text=True)
        numbers[name] = torch.tensor([float(line) for line in done.stdout.split()])
    assert len(numbers["neon"]) == 2 * (5 + 15 + 5 * 76)
    assert torch.allclose(numbers["neon"], numbers["portable"], rtol=2**-7, atol=1e-3)
    assert (numbers["neon"] == numbers["portable"]).float().mean() > 0.99
