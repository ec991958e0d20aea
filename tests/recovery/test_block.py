"""Block reconstruction: what it minimizes, what it may change, and in which orders it runs."""

import math
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prunebench.errors import CheckFailed, IncompatibleData, UsageError
from prunebench.models import streams
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import Linear, find_linears
from prunebench.models.out_of_memory import on_batch_halved
from prunebench.models.pruned_block import PrunedBlock, RecoveredBlock, Recovery, WindowBatch
from prunebench.models.replay import BlockCall
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.recovery.block import Block, split
from prunebench.recovery.protocol import BlockRecoverer
from prunebench.sparsity import Sparsity
from prunebench.testing import FUSED_EXPERTS, check_recoverer, tiny_model, tiny_tokens
from tests.conftest import slow_beyond

GENTLE = Block(lr=0.02)


def recover(
    model, recoverer=GENTLE, *, method="magnitude", sparsity="2:4", order="joint", grid=None, **more
):
    """Prune a tiny model with a recovery; return the walker."""
    pruner = METHODS.make(method, {"quantize_bits": grid.bits} if grid else {})
    options = {"token_ids": tiny_tokens(samples=16), "batch_tokens": 48} | more
    target = dict.fromkeys((x.name for x in find_linears(model)), Sparsity.parse(sparsity))
    recovery = Recovery(recoverer, sparsity=target, grid=grid)
    walker = BlockWalker(model, within_block=order, recovery=recovery, **options)
    pruner.prune(walker, target)
    return walker


def pruned_model(architecture="llama", *, sparsity="2:4", method="magnitude"):
    model = tiny_model(architecture)
    walker = BlockWalker(model, token_ids=tiny_tokens(samples=16), batch_tokens=48)
    target = Sparsity.parse(sparsity)
    METHODS.make(method, {}).prune(walker, {linear.name: target for linear in walker.linears})
    return model


# ---------------------------------------------------------------- the mathematics


class Line(nn.Module):
    """A block that is one matrix."""

    def __init__(self, weight):
        super().__init__()
        self.proj = nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
        self.proj.weight.copy_(weight)

    def forward(self, hidden):
        return self.proj(hidden)


def line_block(weight, inputs, targets):
    module = Line(weight)
    linear = Linear("proj", "proj.weight", 0, module.proj, "weight", *weight.shape)
    return PrunedBlock(
        index=0, module=module, linears=[linear], samples=len(inputs), seqlen=inputs.shape[1],
        tokens=None, seed=0, inputs=lambda windows: inputs[list(windows)],
        targets=lambda windows: targets[list(windows)],
        call=lambda windows: BlockCall((None,), {}, ""), batch=WindowBatch(),
    )  # fmt: skip


def test_a_block_of_one_matrix_meets_masked_least_squares():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 8, generator=generator)
    mix = torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator)
    inputs = torch.randn(32, 24, 8, generator=generator) @ mix
    targets = inputs @ dense.T
    keep = torch.rand(6, 8, generator=generator) > 0.5
    keep[:, 0] = True
    block = line_block(torch.where(keep, dense, 0.0), inputs, targets)
    record = Block(lr=0.05, epochs=40, batch=4, loss="mse").recover_block(block)
    # the minimizer, row by row, by a solve on the support of the row
    train, _ = split(32, 0.125)
    x, y = inputs[train].flatten(0, 1).double(), targets[train].flatten(0, 1).double()
    solved = torch.zeros(6, 8, dtype=torch.float64)
    for row in range(6):
        support = keep[row].nonzero().flatten()
        solved[row, support] = torch.linalg.lstsq(x[:, support], y[:, row]).solution
    weight = block.module.proj.weight.double()
    torch.testing.assert_close(weight, solved, atol=0.05, rtol=0.05)
    least = (x @ solved.T - y).square().mean()
    assert least <= (x @ weight.T - y).square().mean() < 1.005 * least
    assert torch.equal(block.module.proj.weight != 0, keep)
    assert record.held_out_after < 0.7 * record.held_out_before
    assert record.steps == 40 * 7 and record.tokens == 40 * 28 * 24


def test_windows_are_split_evenly():
    train, held = split(32, 0.125)
    assert held == [4, 12, 20, 28] and sorted(train + held) == list(range(32))
    assert split(8, 0.125)[1] == [4]
    assert split(4, 0.5)[1] == [1, 3]


# ---------------------------------------------------------------- what it may change


@pytest.mark.parametrize(
    "architecture", slow_beyond({"llama", "gpt2", "mixtral"}, ["llama", "gpt2", "bloom", "falcon",
    "gemma3", "opt", "phi3", *FUSED_EXPERTS])
)  # fmt: skip
def test_the_contract_holds(architecture):
    failures = [o for o in check_recoverer(GENTLE, architectures=(architecture,)) if not o.passed]
    assert failures == []


@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_the_held_out_error_falls_and_the_mask_stays(method, order):
    plain = tiny_model("llama")
    walker = recover(plain, method=method, order=order)
    without = tiny_model("llama")
    METHODS.make(method, {}).prune(
        BlockWalker(
            without, token_ids=tiny_tokens(samples=16), batch_tokens=48, within_block=order
        ),
        {linear.name: Sparsity.parse("2:4") for linear in find_linears(without)},
    )
    records = walker.recovered
    assert [record.block for record in records] == [0, 1, 2]
    assert all(record.held_out_after <= record.held_out_before for record in records)
    assert records[0].held_out_after < 0.9 * records[0].held_out_before
    assert records[0].best_step > 0 and records[0].zeros == {}
    # the first block's mask does not depend on what comes after it
    for ours, theirs in zip(find_linears(plain), find_linears(without), strict=True):
        if ours.block_index == 0:
            assert torch.equal(ours.stored == 0, theirs.stored == 0)
            assert not torch.equal(ours.stored, theirs.stored)
        assert not (torch.signbit(ours.stored) & (ours.stored == 0)).any()


def test_a_rate_that_is_far_too_high_keeps_the_start_bit_for_bit():
    model, start = tiny_model("llama"), pruned_model("llama")
    records = recover(model, Block(lr=50.0)).recovered
    assert hash_weights(model) == hash_weights(start)
    assert [record.best_step for record in records] == [0, 0, 0]
    assert all(record.held_out_after == record.held_out_before for record in records)
    assert all(record.steps > 0 for record in records)


def test_norms_change_only_if_asked():
    dense = tiny_model("llama")
    for norms in (False, True):
        model = tiny_model("llama")
        recover(model, Block(lr=0.02, norms=norms))
        changed = {
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, dict(dense.named_parameters())[name])
        }
        outside = changed - {linear.parameter_name for linear in find_linears(model)}
        assert all("norm" in name and ".layers." in name for name in outside)
        assert bool(outside) == norms


def test_a_half_precision_model_is_measured_as_it_is_run():
    model = tiny_model("llama").to(torch.bfloat16)
    records = recover(model, Block(lr=0.05)).recovered
    assert records[0].held_out_after < records[0].held_out_before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for linear in find_linears(model):
        groups = linear.stored.view(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
        assert not (torch.signbit(linear.stored) & (linear.stored == 0)).any()


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_option_trains(halves, schedule):
    recoverer = Block(lr=0.02, halves=halves, schedule=schedule, checks=1, batch=3, epochs=1)
    records = recover(tiny_model("gpt2"), recoverer).recovered
    assert records[0].held_out_after < records[0].held_out_before
    assert records[0].steps == (10 if halves else 5)  # 14 windows, 3 at a time
    assert records[0].windows == 14 and records[0].held_out_windows == 2


# ---------------------------------------------------------------- the streams


class Watch(BlockRecoverer):
    """Trains nothing; remembers the targets."""

    def __init__(self, target):
        self.target = target
        self.seen = []

    def recover_block(self, pruned):
        windows = range(pruned.samples)
        self.seen.append((pruned.inputs(windows), pruned.targets(windows)))
        return RecoveredBlock(pruned.index)


@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_targets_are_those_of_the_dense_model(order):
    tokens, dense = tiny_tokens(samples=16), tiny_model("llama")
    with torch.no_grad():
        true = dense(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for method in ("wanda", "magnitude"):  # with statistics and without
        watch = Watch("dense")
        recover(tiny_model("llama"), watch, method=method, order=order)
        for index, (_, target) in enumerate(watch.seen[:-1]):  # the last one has the final norm
            torch.testing.assert_close(target, true[index + 1], atol=1e-5, rtol=1e-4)


def test_local_and_dense_targets_agree_while_nothing_is_pruned():
    seen = {}
    for target in ("dense", "local"):
        watch, model = Watch(target), tiny_model("llama")
        walker = BlockWalker(
            model, token_ids=tiny_tokens(samples=16), batch_tokens=48, recovery=Recovery(watch)
        )
        with closing(walker.groups(stats=False)) as groups:
            for group in groups:
                for linear in group.linears if group.linears[0].block_index == 1 else ():
                    linear.write(torch.where(linear.read().abs() > 0.2, linear.read(), 0))
        seen[target] = watch.seen
    for index in (0, 1):  # only block 1 is pruned: before it both streams are the same
        assert torch.equal(seen["dense"][index][1], seen["local"][index][1])
    assert not torch.equal(seen["dense"][2][1], seen["local"][2][1])
    assert not torch.equal(seen["dense"][2][0], seen["dense"][1][1])


def test_the_same_whatever_the_batches_of_the_walk():
    hashes = set()
    for batch_tokens in (24, 48, 1024):
        model = tiny_model("llama")
        recover(model, batch_tokens=batch_tokens)
        hashes.add(round(float(find_linears(model)[0].stored.sum()), 4))
    assert len(hashes) == 1


def test_two_devices_give_the_bits_of_one():
    single, double = tiny_model("llama"), tiny_model("llama")
    recover(single, batch_tokens=24)
    recover(double, batch_tokens=24, devices=[torch.device("cpu")] * 2)
    assert hash_weights(single) == hash_weights(double)


def test_another_seed_trains_in_another_order():
    walkers = [
        BlockWalker(
            tiny_model("llama"), token_ids=tiny_tokens(samples=16), recovery=Recovery(GENTLE, seed)
        )
        for seed in (0, 0, 1)
    ]
    for walker in walkers:
        target = Sparsity.parse("2:4")
        METHODS.make("magnitude", {}).prune(walker, {x.name: target for x in walker.linears})
    first, again, other = (hash_weights(walker.model) for walker in walkers)
    assert first == again != other


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("architecture", FUSED_EXPERTS)
def test_experts_with_too_few_tokens_stay_as_they_are(architecture):
    model, start = tiny_model(architecture), pruned_model(architecture)
    # 8 windows of 8 tokens: an expert of 4, of which a token takes 2, sees about 32
    tokens = tiny_tokens(samples=8, seqlen=8)
    records = recover(model, Block(lr=0.05), token_ids=tokens).recovered
    starved = {name for record in records for name in record.untrained}
    assert starved
    before = {linear.name: linear.stored for linear in find_linears(start)}
    for linear in find_linears(model):
        same = torch.equal(linear.stored, before[linear.name])
        assert same or linear.name not in starved, linear.name
    assert any(record.best_step for record in records)


# ---------------------------------------------------------------- what goes wrong


def failing(times):
    """A recoverer whose loss is NaN in the first blocks."""
    state = SimpleNamespace(blocks=0)

    class Failing(Block):
        def recover_block(self, pruned):
            state.blocks += 1
            if state.blocks > times:
                return super().recover_block(pruned)
            train, _ = split(pruned.samples, self.held_out)

            def targets(windows):
                bad = set(windows) <= set(train)
                return pruned.targets(windows) * (torch.nan if bad else 1.0)

            return super().recover_block(copy_of(pruned, targets=targets))

    return Failing(lr=0.02)


def copy_of(pruned, **changes):
    return PrunedBlock(**{**vars(pruned), **changes})


def test_a_loss_that_is_not_finite_leaves_the_start_and_is_recorded():
    model, start = tiny_model("llama"), pruned_model("llama")
    records = recover(model, failing(2)).recovered
    assert [bool(record.event) for record in records] == [True, True, False]
    assert "the loss of step 1 is not finite" in records[0].event
    assert records[0].held_out_after == records[0].held_out_before
    for ours, theirs in zip(find_linears(model), find_linears(start), strict=True):
        assert torch.equal(ours.stored, theirs.stored) == (ours.block_index < 2)


def test_three_in_a_row_end_the_run():
    with pytest.raises(IncompatibleData, match="3 blocks in a row failed") as error:
        recover(tiny_model("llama"), failing(3))
    assert "not finite" in error.value.where and "a smaller rate" in error.value.fix


def test_a_recoverer_that_fills_pruned_places_is_refused():
    class Fills(BlockRecoverer):
        def recover_block(self, pruned):
            pruned.linears[2].stored.fill_(1.0)
            return RecoveredBlock(pruned.index)

    with pytest.raises(CheckFailed, match="changed pruned weights of .*v_proj"):
        recover(tiny_model("llama"), Fills())
    assert any(not o.passed for o in check_recoverer(Fills(), architectures=("llama",)))


def test_weights_that_become_zero_are_counted():
    class Drops(BlockRecoverer):
        def recover_block(self, pruned):
            kept = pruned.linears[0].stored.nonzero()[:3]
            pruned.linears[0].stored[kept[:, 0], kept[:, 1]] = 0.0
            return RecoveredBlock(pruned.index)

    (first, *_) = recover(tiny_model("llama"), Drops()).recovered
    assert list(first.zeros.values()) == [3]


def test_too_few_windows_are_refused():
    with pytest.raises(UsageError, match="7 calibration windows are too few") as error:
        Block().check(samples=7)
    assert "--calibration-samples 8" in error.value.fix
    Block().check(samples=8)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": math.inf}, {"epochs": 0}, {"batch": 0}, {"checks": 0}, {"held_out": 0.6}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Block(**options)


def test_shared_weights_are_refused_by_name():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(IncompatibleData, match="layers.0.mlp.up_proj cannot be recovered") as error:
        recover(model)
    assert "blocks 0 and 2 share" in error.value.where


def test_out_of_memory_halves_the_batch(monkeypatch):
    plain = streams.Streams._rows

    def rows(self, store, windows):
        if len(windows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, store, windows)

    heard = []
    model, whole = tiny_model("llama"), tiny_model("llama")
    with monkeypatch.context() as patch, on_batch_halved(lambda *what: heard.append(what)):
        patch.setattr(streams.Streams, "_rows", rows)
        records = recover(model).recovered
    assert heard == [("recovery", 1)]
    expected = recover(whole).recovered
    for ours, theirs in zip(records, expected, strict=True):
        assert math.isclose(ours.held_out_after, theirs.held_out_after, rel_tol=1e-3)
