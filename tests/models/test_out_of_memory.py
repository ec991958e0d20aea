"""Out of memory: batches are halved, it is said, and the result is the same."""

import pytest
import torch

from prunebench.evaluate.perplexity import window_losses
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_blocks
from prunebench.models.out_of_memory import is_out_of_memory, on_batch_halved
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.results.store import ResultStore
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens

HOST = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"


def exhaust(model, *, rows, error, index=1):
    """Let one block run out of memory whenever it gets more than `rows` sequences."""

    def refuse(module, args):
        if args[0].shape[0] > rows:
            raise error

    return find_blocks(model)[1][index].mlp.register_forward_pre_hook(refuse)


def prune(model, method, order="joint"):
    walker = BlockWalker(model, token_ids=tiny_tokens(), within_block=order, batch_tokens=96)
    METHODS.make(method, {}).prune(walker, {x.name: Sparsity.parse("2:4") for x in walker.linears})
    return hash_weights(model)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("wanda", torch.OutOfMemoryError("CUDA")),
        ("wanda", RuntimeError(HOST)),
        ("sparsegpt", MemoryError()),
    ],
)
def test_a_batch_that_is_too_large_is_halved(method, error):
    expected = prune(tiny_model("llama"), method)
    model = tiny_model("llama")
    exhaust(model, rows=1, error=error)
    messages = []
    with on_batch_halved(lambda what, size: messages.append((what, size))):
        assert prune(model, method) == expected
    assert messages == [("calibration", 2), ("calibration", 1)]


def test_one_sequence_that_is_too_large_is_an_error():
    model = tiny_model("llama")
    exhaust(model, rows=0, error=MemoryError("no more"))
    with pytest.raises(MemoryError, match="no more"):
        prune(model, "wanda")


def test_other_errors_are_not_swallowed():
    model = tiny_model("llama")
    exhaust(model, rows=1, error=RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        prune(model, "wanda")
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


def test_scoring_goes_on_with_halves():
    windows = tiny_tokens(samples=5)
    expected = window_losses(tiny_model("llama"), windows, batch_tokens=96)
    model = tiny_model("llama")
    exhaust(model, rows=1, error=MemoryError())
    messages = []
    with on_batch_halved(lambda what, size: messages.append((what, size))):
        assert window_losses(model, windows, batch_tokens=96) == pytest.approx(expected, rel=1e-6)
    assert messages == [("scoring", 2), ("scoring", 1)]


@pytest.mark.slow
def test_it_is_said_and_recorded(cli, tiny_run, tmp_path, monkeypatch):
    from prunebench.run import execute as run

    plain = run.open_model

    def opened(*args):
        model = plain(*args)
        exhaust(model, rows=2, error=MemoryError())
        return model

    monkeypatch.setattr(run, "open_model", opened)
    said = cli(*tiny_run, "-m", "wanda").output
    assert "out of memory: calibration continues with 2 sequences at a time" in said
    (result,), _ = ResultStore(tmp_path / "results").read()
    assert "calibration: 2 at a time" in result.cost.halved_batches
