"""Calibration on several devices of one machine gives the bits of one device.

There are no two GPUs here. A CPU named twice runs all of the copying and summing; that no tensor is
left behind on another device is shown with torch's meta device as the second.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunebench.calibration.stats import StatsAccumulator
from prunebench.errors import UsageError
from prunebench.models import walker as module
from prunebench.models.device import choose_devices
from prunebench.models.disk import load_on_disk
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_blocks
from prunebench.models.load import load_config
from prunebench.models.replicas import copy_to
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.results.store import ResultStore
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, FUSED_EXPERTS, tiny_model, tiny_tokens
from tests.conftest import KINDS, slow_beyond

CPU = torch.device("cpu")
PLAIN = [name for name in ARCHITECTURES if name not in FUSED_EXPERTS]
TWO = [torch.device("cuda:0"), torch.device("cuda:1")]


def prune(model, devices, *, method="wanda", order="joint"):
    """Prune with 5 batches of one sequence; returns the hash of the weights and the report."""
    walker = BlockWalker(
        model, token_ids=tiny_tokens(samples=5), within_block=order, batch_tokens=24,
        devices=[CPU] * devices,
    )  # fmt: skip
    pruner = METHODS.make(method, {})
    report = pruner.prune(walker, {x.name: Sparsity.parse("2:4") for x in walker.linears})
    return hash_weights(model), report


@pytest.mark.parametrize("architecture", slow_beyond(KINDS, ARCHITECTURES))
def test_the_same_bits_on_every_architecture(architecture):
    assert prune(tiny_model(architecture), 2) == prune(tiny_model(architecture), 1)


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_the_same_bits_with_hessians_and_in_both_orders(order, devices):
    expected = prune(tiny_model("llama"), 1, method="sparsegpt", order=order)
    assert prune(tiny_model("llama"), devices, method="sparsegpt", order=order) == expected


def test_the_same_bits_from_disk(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    config = load_config(tmp_path / "tiny")
    journal = RunJournal(tmp_path / "kept")
    assert journal.lock()
    on_disk = load_on_disk(
        tmp_path / "tiny", config, dtype=torch.float32, device=CPU, journal=journal
    )
    expected = prune(tiny_model("llama"), 1, method="sparsegpt")
    assert prune(on_disk, 3, method="sparsegpt") == expected


def test_every_device_gets_its_share():
    """Batches in turn; a copy's weights are its own, and follow those that were pruned."""
    model = tiny_model("llama")
    ran = []
    plain = module.BlockReplicas.at

    def at(self, batch):
        block, device = plain(self, batch)
        ran.append(id(block))
        return block, device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.BlockReplicas, "at", at)
        walker = BlockWalker(
            model, token_ids=tiny_tokens(samples=4), batch_tokens=24, devices=[CPU, CPU]
        )
        for _ in walker.groups(stats=True, write=False):
            break
    first, second, *rest = ran
    assert first == id(find_blocks(model)[1][0]) != second
    assert rest[:2] == [first, second]


def test_the_gram_matrix_in_panels_of_several_devices():
    inputs = torch.randn(3, 50, 1000)
    whole, spread = (
        StatsAccumulator(hessian=True),
        StatsAccumulator(hessian=True, devices=[CPU] * 3),
    )
    for batch in inputs:
        whole.add(batch)
        spread.add(batch)
    expected = whole.result(samples=3, width=1000, device=CPU)
    actual = spread.result(samples=3, width=1000, device=CPU)
    assert torch.equal(actual.gram, expected.gram)
    assert torch.equal(actual.sum_squares, expected.sum_squares)


class OneDevice(TorchDispatchMode):
    """Any operation but a copy that takes tensors of two devices is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.ndim}
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        assert copies or len(devices) < 2, f"{func} of tensors of two devices"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta_as_a_device(monkeypatch):
    """Torch's meta device in the place of a second GPU; what comes back from it is zeros."""
    plain = torch.Tensor.to

    def to(self, *args, **kwargs):
        if self.is_meta and CPU in args:
            return torch.zeros(self.shape, dtype=self.dtype)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return torch.device("meta")


@pytest.mark.parametrize(
    ("architecture", "hessian", "order"),
    [("llama", False, "joint"), ("llama", True, "sequential"), ("gemma3", False, "sequential")]
    + [
        pytest.param(name, True, "joint", marks=() if name in KINDS else pytest.mark.slow)
        for name in PLAIN
    ],
)
def test_nothing_is_left_on_another_device(architecture, hessian, order, meta_as_a_device):
    model = tiny_model(architecture)
    walker = BlockWalker(
        model, token_ids=tiny_tokens(samples=3), within_block=order, batch_tokens=24,
        devices=[CPU, meta_as_a_device],
    )  # fmt: skip
    visited = 0
    with OneDevice():
        for group in walker.groups(stats=True, hessian=hessian):
            for linear in group.linears:
                linear.write(linear.read() * 0.5)
            assert group.stats.sum_squares.device == CPU
            visited += len(group.linears)
    assert visited == len(walker.linears)


def test_tensors_of_two_devices_do_not_mix(meta_as_a_device):
    """What the test before relies on."""
    weight, inputs = torch.ones(2, 2), torch.ones(2, 2, device=meta_as_a_device)
    for operation in (torch.add, torch.matmul, torch.nn.functional.linear):
        with OneDevice(), pytest.raises(AssertionError, match="two devices"):
            operation(inputs, weight)


def test_a_copy_of_a_block_shares_nothing_with_it():
    block = find_blocks(tiny_model("gpt2"))[1][0]
    copied = copy_to(block, CPU)
    pointers = {parameter.data_ptr() for parameter in (*block.parameters(), *block.buffers())}
    assert not pointers & {
        parameter.data_ptr() for parameter in (*copied.parameters(), *copied.buffers())
    }
    state = copied.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("names", ["cpu,cpu", "cuda:0,cuda:0", "cuda,cuda:1", "cpu,cuda:0"])
def test_devices_that_are_not_different_gpus_are_refused(names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="not different GPUs"):
        choose_devices(names)


def test_gpus_of_two_kinds_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"chip {device.index}")
    with pytest.raises(UsageError, match="chip 0, chip 1"):
        choose_devices("cuda:0,cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    assert choose_devices("cuda:0, cuda:1") == tuple(TWO)


def test_a_run_says_how_many_gpus_it_took(cli, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunebench.run.resolve.choose_devices", lambda names: (CPU, CPU))
        cli(*tiny_run, "-m", "wanda")
    cli(*tiny_run, "-m", "wanda", "--results-dir", "one")
    (several,), _ = ResultStore(tmp_path / "results").read()
    (result,), _ = ResultStore(tmp_path / "work" / "one").read()
    assert several.hardware.device_name == f"2 x {result.hardware.device_name}"
    assert several.spec_id == result.spec_id
    assert several.model == result.model
    assert several.scores == result.scores


def test_a_method_that_learns_says_how_it_takes_several(cli, tiny_run, monkeypatch):
    monkeypatch.setattr("prunebench.run.resolve.choose_devices", lambda names: (CPU, CPU))
    said = cli(*tiny_run, "-m", "maskllm", code=2).output
    assert "torchrun --nproc-per-node 2 -m prunebench run" in said
