"""Kernel A in Triton's interpreter, against the dense product. On a GPU the same runs compiled."""

import os
import platform
import sys

import pytest
import torch

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton is made for Linux on x86_64", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from prunebench.sparse24.backends import triton_kernels as kernels
from prunebench.sparse24.backends.triton import (
    Launch,
    TiledLayout,
    Tiling,
    TritonBackend,
    TritonProduct,
    default_launch,
)
from prunebench.sparse24.packed import pack24
from tests.factories import random_24

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILINGS = (Tiling(16, 64), Tiling(32, 128))


def tiled(rows, groups, tiling=TILINGS[0], dtype=torch.bfloat16):
    weight = random_24(rows, groups, dtype=dtype).to(DEVICE)
    return weight, TiledLayout.of(pack24(weight), tiling)


@pytest.mark.parametrize("tiling", [*TILINGS, Tiling(16, 32)])
@pytest.mark.parametrize(("rows", "groups"), [(32, 64), (40, 75)])
def test_the_order_of_the_kernel_and_back(tiling, rows, groups):
    weight, form = tiled(rows, groups, tiling)
    packed, again = pack24(weight), form.packed()
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.values, packed.values)
    dense = torch.empty_like(weight)
    form.write_dense(dense)
    assert torch.equal(dense, weight)


def test_it_takes_no_more_bytes_but_for_padding():
    weight, form = tiled(32, 128)
    assert form.stored_bytes == pack24(weight).bytes == 0.5625 * weight.nbytes
    _, padded = tiled(40, 75)  # 48 rows, 512 inputs
    assert padded.stored_bytes == 48 * 512 * 2 * 0.5625


def test_the_kernel_that_unpacks():
    for tiling in TILINGS:
        weight, form = tiled(24, 75, tiling)
        out = torch.empty_like(weight)
        kernels.unpack(form.words, form.meta, out)
        assert torch.equal(out, weight)


@pytest.mark.parametrize(
    ("tokens", "tiling", "split", "bias", "dtype"),
    [
        (1, TILINGS[0], 1, True, torch.bfloat16),
        (2, TILINGS[0], 2, False, torch.bfloat16),
        (3, TILINGS[0], 2, True, torch.bfloat16),
        (17, TILINGS[1], 1, True, torch.float16),
        (64, TILINGS[0], 1, False, torch.float16),
    ],
)
def test_the_product(tokens, tiling, split, bias, dtype):
    """Rounded once from float32 sums: within half a unit in the last place, and the order's."""
    weight, form = tiled(24, 75, tiling, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 300, generator=generator).to(dtype).to(DEVICE)
    added = torch.randn(24, generator=generator).to(dtype).to(DEVICE) if bias else None
    product = TritonProduct(form, {tokens: Launch(split)}).run(x, added)
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if added is None else added.double()
    )
    assert (product.shape, product.dtype) == ((tokens, 24), dtype)
    error = (product.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()


def test_what_lies_behind_the_inputs_is_not_read():
    """Padding meets no NaN of the next token."""
    weight, form = tiled(16, 75)
    x = torch.full((2, 300), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    x[0] = 1
    product = TritonProduct(form, {1: Launch(1)}).run(x[:1], None)
    assert torch.isfinite(product).all()


def test_what_it_takes():
    backend = TritonBackend()
    assert backend.available(DEVICE).ok
    assert backend.takes((4096, 4096), torch.bfloat16, 64).ok
    assert "1 to 64" in backend.takes((4096, 4096), torch.bfloat16, 65).reason
    assert "float32" in backend.takes((4096, 4096), torch.float32, 1).reason


def test_small_layers_are_shared_by_many_programs():
    weight = torch.zeros(64, 2048, dtype=torch.bfloat16)
    launch = default_launch(TiledLayout.of(pack24(weight), Tiling()))
    assert launch.split == 8
