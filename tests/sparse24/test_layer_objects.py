"""A packed layer as an object: run by several threads, copied, and stored in a file."""

import copy
import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from prunebench.sparse24.backends import cpu
from prunebench.sparse24.backends.cpu import CpuProduct, MaskedLayout
from prunebench.sparse24.backends.cpu_build import best_instructions
from prunebench.sparse24.backends.unpack import Decompress
from prunebench.sparse24.layer import Sparse24Linear
from prunebench.sparse24.packed import pack24
from tests.factories import policy, random_24


@pytest.fixture(autouse=True)
def _kernels(compiled, monkeypatch):
    monkeypatch.setattr(cpu, "kernels", lambda: compiled(best_instructions()))


@pytest.mark.parametrize("build_product", [CpuProduct, Decompress().build])
def test_two_threads_do_not_unpack_into_each_other(monkeypatch, build_product):
    unpack = MaskedLayout.write_dense

    def unpack_slowly(form, out):
        unpack(form, out)
        time.sleep(0.05)  # the other thread runs before this one multiplies

    monkeypatch.setattr(MaskedLayout, "write_dense", unpack_slowly)
    weights = [random_24(24, 16, seed=seed) for seed in (1, 2)]
    products = [build_product(MaskedLayout.of(pack24(weight))) for weight in weights]
    x = torch.randn(9, 64).to(torch.bfloat16)
    products[0].run(x, None)  # the workspace is there
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda product: product.run(x, None), products))
    for out, weight in zip(outs, weights, strict=True):
        assert torch.equal(out, nn.functional.linear(x, weight))


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_a_file, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_a_copy_of_a_layer_has_weights_of_its_own(copied):
    layer = Sparse24Linear(pack24(random_24(24, 16)), None, policy=policy())
    layer.product_of("decompress")  # refers to the workspace of all layers
    x = torch.randn(2, 64).to(torch.bfloat16)
    expected = layer(x)
    other = copied(layer)
    layer.form.values.zero_()
    assert not other.products and other.form.name == "masked"
    assert torch.equal(other(x), expected)
    buffers = dict(other.weight.named_buffers())
    assert buffers["masked_values"] is other.form.values  # counted, and there once
