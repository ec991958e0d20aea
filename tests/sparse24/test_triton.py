"""The kernels in Triton's interpreter, against the dense product; compiled where there is a GPU."""

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
    TritonBackend,
    TritonProduct,
    default_launch,
)
from prunebench.sparse24.layouts import FileLayout
from prunebench.sparse24.packed import pack24
from tests.factories import DeviceOf, random_24

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = True  # these tests keep the variable, see conftest.py


def tiled(rows, groups, block=16, dtype=torch.bfloat16):
    weight = random_24(rows, groups, dtype=dtype).to(DEVICE)
    return weight, TiledLayout.of(pack24(weight), block)


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_rounded_once(product, x, weight, bias=None):
    """Sums in float32, rounded at the end: half a unit in the last place, and the sums' order."""
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    assert (product.shape, product.dtype) == (exact.shape, x.dtype)
    error = (product.double() - exact).abs()
    assert (error <= torch.finfo(x.dtype).eps * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize(("rows", "groups"), [(32, 64), (40, 75)])
def test_the_order_of_the_kernel_and_back(block, rows, groups):
    weight, form = tiled(rows, groups, block)
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


@pytest.mark.parametrize(("rows", "groups"), [(24, 75), (16, 64), (7, 3)])
def test_the_kernel_that_unpacks(rows, groups):
    weight, form = tiled(rows, groups)
    out = torch.full_like(weight, float("nan"))
    kernels.unpack(form.words, form.meta, out)
    assert torch.equal(out, weight)


def prmt(low, high, selector):
    """The instruction, from its manual: nibble k of the selector names byte k of the result."""
    eight = [(low >> 8 * i) & 255 for i in range(4)] + [(high >> 8 * i) & 255 for i in range(4)]
    return sum(eight[selector >> 4 * k & 7] << 8 * k for k in range(4))


def test_the_selector_picks_both_inputs():
    """As the kernel computes it from `meta`: shift, mask, multiply."""
    low, high = 0x22221111, 0x44443333
    values = (0x1111, 0x2222, 0x3333, 0x4444)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for others in (0, 3):  # what the other steps store around it
        for step in range(4):
            for first, second in pairs:
                around = sum(others << 2 * s | others << 8 + 2 * s for s in range(4) if s != step)
                meta = around | first << 2 * step | second << 8 + 2 * step
                meta -= (meta & 0x8000) << 1  # as an int16, sign extended
                selector = (meta >> 2 * step & 0x0303) * 0x22 + 0x1010
                assert prmt(low, high, selector) == values[first] | values[second] << 16


def test_the_places_are_where_the_kernel_looks():
    """One group per step with places of its own."""
    weight = torch.zeros(1, 256, dtype=torch.bfloat16)
    places = [(0, 1), (1, 3), (2, 3), (0, 3)]
    for step, (first, second) in enumerate(places):
        weight[0, 64 * step + 4 * 5 + first] = 1 + step  # lane 5
        weight[0, 64 * step + 4 * 5 + second] = -1 - step
    form = TiledLayout.of(pack24(weight), 1)
    meta = int(form.meta[0, 0, 0, 5]) & 0xFFFF
    assert [(meta >> 2 * s & 3, meta >> 8 + 2 * s & 3) for s in range(4)] == places
    pairs = form.words[0, 0, :, 0, 5].contiguous().view(torch.bfloat16).view(4, 2)
    assert pairs.tolist() == [[1, -1], [2, -2], [3, -3], [4, -4]]


# rows, groups, tokens
SIZES = [(24, 75, 1), (7, 65, 2), (17, 64, 3), (1, 1, 4), (16, 321, 1), (16, 256, 4)]


@pytest.mark.parametrize(("rows", "groups", "tokens"), SIZES)
def test_the_product(rows, groups, tokens):
    """Sizes that fill no tile, no super, no part, and those that do."""
    weight, form = tiled(rows, groups)
    x = numbers(tokens, 4 * groups, seed=tokens)
    assert_rounded_once(TritonProduct(form).run(x, None), x, weight)


@pytest.mark.parametrize(
    ("block", "launch", "dtype"),
    [
        (16, Launch(1, 4, 3), torch.float16),
        (8, Launch(2, 4), torch.bfloat16),
        (16, Launch(8, 8), torch.float16),
        (32, Launch(4, 8), torch.bfloat16),
    ],
)
def test_every_launch_gives_the_same(block, launch, dtype):
    weight, form = tiled(20, 64 * 5, block, dtype)  # five supers: not a multiple of the parts
    x, bias = numbers(2, 1280, dtype=dtype), numbers(20, dtype=dtype, seed=1)
    assert_rounded_once(TritonProduct(form, {2: launch}).run(x, bias), x, weight, bias)


def test_strided_inputs():
    weight, form = tiled(8, 75)
    wide = numbers(4, 2, 601)
    for x in (
        wide[:, 0, :300],  # 1,202 numbers from token to token: no whole quads
        wide[:, 0, 1:301],  # quads that start at odd places
        wide.flatten()[: 4 * 600].view(4, 600)[:, 300:],  # whole quads, read where they are
        wide[:, 0, :600:2],
        wide[0, :, :300].expand(2, 300),
        wide[:1, 0, :300].expand(3, 300),  # a stride of 0
    ):
        assert_rounded_once(TritonProduct(form).run(x, None), x, weight)


def test_what_lies_behind_the_inputs_is_not_read():
    """Padding meets no NaN of the next token."""
    weight, form = tiled(16, 75)
    x = torch.full((2, 300), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    x[0] = 1
    assert torch.isfinite(TritonProduct(form).run(x[:1], None)).all()


def test_not_a_number_stays_in_its_token():
    weight, form = tiled(16, 75)
    x = numbers(3, 300)
    x[1, 7] = float("nan")
    x[2, 9] = float("inf")
    product = TritonProduct(form).run(x, None)
    assert torch.isfinite(product[0]).all()
    # A pruned input is not read, as in the product by a sparse matrix; a kept one shows.
    assert torch.equal(product[1].isnan(), weight[:, 7] != 0)
    assert not torch.isfinite(product[2][weight[:, 9] != 0]).any()


class Launches:
    """Stands in for a kernel: records whose device is the current one at each launch."""

    def __init__(self):
        self.devices = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.devices.append(DeviceOf.current)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, and that is `cuda:0` for tensors of `cuda:1`, too."""
    weight, form = tiled(16, 64)
    launches = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(kernels, "multiply_kernel", launches)
    monkeypatch.setattr(kernels, "unpack_kernel", launches)
    kernels.multiply(
        form.words, form.meta, numbers(1, 256), None, rows=16, parts=1, warps=4, stages=2
    )
    kernels.unpack(form.words, form.meta, torch.empty_like(weight))
    assert launches.devices == [form.words.data_ptr()] * 2


def test_what_it_takes():
    backend = TritonBackend()
    assert backend.available(DEVICE).ok
    assert backend.takes((4096, 4096), torch.bfloat16, 4).ok
    assert "1 to 4" in backend.takes((4096, 4096), torch.bfloat16, 5).reason
    assert "float32" in backend.takes((4096, 4096), torch.float32, 1).reason


def test_a_second_copy_is_counted():
    """A layer in another layout: the tiles are stored beside it."""
    packed = pack24(random_24(32, 128).to(DEVICE))
    assert TritonBackend().build(FileLayout(packed)).stored_bytes == packed.bytes
    assert TritonBackend().build(TiledLayout.of(packed)).stored_bytes == 0


def test_small_layers_are_summed_by_more_warps():
    def launch(rows, width):
        return default_launch(
            TiledLayout.of(pack24(torch.zeros(rows, width, dtype=torch.bfloat16)))
        )

    assert launch(64, 2048) == Launch(parts=8, warps=8)
    assert launch(64, 512) == Launch(parts=2, warps=4)
    assert launch(64, 256) == Launch(parts=1, warps=4)
    assert launch(16 * 264, 1024) == Launch(parts=4, warps=4)
