"""Masks that are chosen anew while a block is trained."""

import pytest
import torch

from prunebench.errors import CheckFailed
from prunebench.models.linears import find_linears
from prunebench.models.pruned_block import RecoveredBlock
from prunebench.pruners.keep import keep_rows
from prunebench.recovery.block import Block
from prunebench.recovery.masked_weights import MaskedWeights
from prunebench.recovery.protocol import BlockRecoverer
from prunebench.recovery.refine import Refinement, keep_as_many
from prunebench.sparsity import Sparsity
from prunebench.testing import FUSED_EXPERTS, check_recoverer, tiny_model, tiny_tokens
from tests.conftest import slow_beyond
from tests.recovery.test_block import line_block, pruned_model, recover

REFINE = Block(lr=0.1, refine=2)
PATTERN = Sparsity.parse("2:4")


@pytest.mark.parametrize(
    "architecture", slow_beyond({"llama", "gpt2"}, ["llama", "gpt2", "mixtral", "opt"])
)
def test_the_contract_holds(architecture):
    failures = [o for o in check_recoverer(REFINE, architectures=(architecture,)) if not o.passed]
    assert failures == []


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_mask_moves_and_every_row_keeps_as_many(architecture, sparsity):
    target = Sparsity.parse(sparsity)
    start = find_linears(pruned_model(architecture, sparsity=sparsity))
    model = tiny_model(architecture)
    records = recover(model, REFINE, sparsity=sparsity).recovered
    moved = 0
    for ours, theirs in zip(find_linears(model), start, strict=True):
        now, before = ours.read() == 0, theirs.read() == 0
        moved += int((now != before).sum())
        if target.is_pattern:
            assert (now.view(len(now), -1, 4).sum(2) == 2).all()
        elif ours.block_index == 0:  # later blocks of `start` read other inputs
            assert torch.equal(now.sum(1), before.sum(1))
        assert now.sum() == before.sum()
        assert not torch.signbit(ours.read())[now].any()
    assert moved > 0
    assert all(record.held_out_after <= record.held_out_before for record in records)


@pytest.mark.parametrize("architecture", FUSED_EXPERTS)
def test_experts_with_too_few_tokens_stay_as_they_are(architecture):
    """They share a parameter with experts whose pruned places are trained."""
    model, start = tiny_model(architecture), pruned_model(architecture)
    tokens = tiny_tokens(samples=8, seqlen=8)
    records = recover(model, REFINE, token_ids=tokens).recovered
    starved = {name for record in records for name in record.untrained}
    assert starved
    before = {linear.name: linear.read() for linear in find_linears(start)}
    for linear in find_linears(model):
        if linear.name in starved:
            assert torch.equal(linear.read(), before[linear.name]), linear.name


def test_the_score_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    inputs = torch.randn(5, 24, 8, generator=generator)
    block = line_block(torch.where(keep_rows(weight.abs(), PATTERN), weight, 0.0), inputs, inputs)
    block.sparsity["proj"] = PATTERN
    weights = MaskedWeights(block, block.linears, norms=False)
    windows = [0, 2, 3]
    refinement = Refinement(block, weights, block.linears, windows)
    optimizer = torch.optim.Adam(list(weights.trained.values()), fused=True)
    # a step from gradients of 1: all weights move, the pruned ones too
    weights.trained["proj.weight"].grad = torch.ones(6, 8)
    optimizer.step()
    moved = weights.trained["proj.weight"].detach().clone()
    refinement.choose(optimizer)

    # by hand: y = x W^T, and d ||y|| / dW = (y / ||y||)^T x
    start = block.module.proj.weight
    gradients = []
    for window in windows:
        y = inputs[window] @ start.T  # [tokens, out]
        gradients.append((y / y.norm()).T @ inputs[window])
    root = torch.stack(gradients).square().mean(0).sqrt()
    norms = (inputs[windows].square().sum((0, 1)) / len(windows)).sqrt()
    keep = keep_rows(moved.abs() * (100 * root + norms), PATTERN)
    chosen = weights.trained["proj.weight"].detach()
    assert torch.equal(chosen != 0, keep)
    assert torch.equal(chosen, torch.where(keep, moved, 0.0))
    state = optimizer.state[weights.trained["proj.weight"]]
    assert not state["exp_avg"][~keep].any() and not state["exp_avg_sq"][~keep].any()
    assert state["exp_avg"][keep].all()


def test_rows_keep_as_many_as_before():
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    before = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    keep = keep_as_many(score, before, Sparsity.parse("0.5"))
    assert keep.tolist() == [
        [True, False, False, False],
        [False, False, True, True],  # of equal scores the earlier ones go, as in `keep_rows`
        [True, True, True, True],
    ]


@pytest.mark.parametrize(("refine", "epochs"), [(3, 3), (-1, 3), (1, 1)])
def test_a_mask_that_no_epoch_trains_is_refused(refine, epochs):
    with pytest.raises(ValueError, match=f"refine={refine} is not 0 or more and below"):
        Block(refine=refine, epochs=epochs)


class Fills(BlockRecoverer):
    """Gives a pruned weight a value; `moves` says whether it may move the mask."""

    def __init__(self, moves, *, gives_back):
        self._moves = moves
        self._gives_back = gives_back

    @property
    def moves_mask(self):
        return self._moves

    def recover_block(self, pruned):
        weight = pruned.linears[0].stored
        row = weight[0]
        row[(row == 0).nonzero()[0]] = 0.5
        if self._gives_back:
            row[(row != 0).nonzero()[-1]] = 0.0
        return RecoveredBlock(pruned.index)


@pytest.mark.parametrize(("moves", "gives_back"), [(False, True), (True, False)])
def test_a_mask_that_must_not_move_or_shrinks_is_an_error(moves, gives_back):
    with pytest.raises(CheckFailed, match="changed pruned weights"):
        recover(tiny_model("llama"), Fills(moves, gives_back=gives_back))


def test_a_mask_that_may_move_keeps_its_zeros():
    walker = recover(tiny_model("llama"), Fills(True, gives_back=True), sparsity="0.5")
    assert len(walker.recovered) == 3
