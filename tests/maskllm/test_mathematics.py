"""The mathematics of MaskLLM, each against a second formula: noise, relaxation, optimizers."""

import math

import pytest
import torch

from prunebench.errors import UsageError
from prunebench.pruners.maskllm import relaxation
from prunebench.pruners.maskllm.candidates import candidates, choose, mask_of, require_learnable
from prunebench.pruners.maskllm.initial_logits import LogitInit
from prunebench.pruners.maskllm.noise import gumbel
from prunebench.pruners.maskllm.relaxation import (
    Relaxation,
    slope_of_logits,
)
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.sparsity import Sparsity
from prunebench.training.shards import Shards
from tests.mask_training import HOW, generator, layer_of, slope_for

# ------------------------------------------------------------ candidates and prior


def test_candidates_are_all_masks_and_choices_lead_back_to_them():
    table = candidates(2, 4)
    assert table.tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    chosen = torch.randint(0, 6, (24,), generator=generator(), dtype=torch.uint8)
    keep = mask_of(chosen, table, torch.Size((6, 16)))
    assert torch.equal(choose(keep, table), chosen)
    assert torch.equal(keep.view(-1, 4).sum(1), torch.full((24,), 2))
    assert len(candidates(4, 8)) == 70


def test_a_group_that_keeps_too_few_gets_a_candidate_that_keeps_them_all():
    keep = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]]) > 0
    table = candidates(2, 4)
    masks = mask_of(choose(keep, table), table, keep.shape)
    assert masks[keep].all()


@pytest.mark.parametrize(("text", "word"), [("0.5", "ratio"), ("8:16", "12,870"), ("5:10", "252")])
def test_what_cannot_be_learned_is_refused(text, word):
    with pytest.raises(UsageError, match=word):
        require_learnable(Sparsity.parse(text))
    for good in ("2:4", "1:4", "3:4", "4:8", "1:2", "1:70"):
        require_learnable(Sparsity.parse(good))


def start(strength=3.0, noise=1.0, unit=0.01, *, prior, groups, kept=2, group=4, seed=0):
    return LogitInit(unit, noise, strength).logits(
        prior, candidates(kept, group), groups=groups, seed=seed, layer=4,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def test_the_prior_leads_by_its_strength_and_its_complement_trails():
    prior = torch.zeros(50, dtype=torch.uint8)  # 1100: the others share one place, 0011 none
    logits = start(noise=0.0, prior=prior, groups=slice(0, 50))
    expected = torch.tensor([0.03, 0, 0, 0, 0, -0.03])[:, None].expand(6, 50)
    assert torch.allclose(logits, expected)
    # 1:4: the mean overlap is 1/4
    other = start(noise=0.0, prior=prior, groups=slice(0, 50), kept=1)
    assert torch.allclose(other[:, 0], 0.03 * torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_the_spread_of_the_first_logits_is_normal_and_does_not_depend_on_who_holds_them(
    monkeypatch,
):
    whole = start(prior=None, groups=slice(0, 40_000))
    assert abs(float(whole.mean())) < 2e-4
    assert abs(float(whole.std()) - 0.01) < 1e-4
    assert abs(float((whole.abs() < 0.01).float().mean()) - 0.6827) < 0.005
    monkeypatch.setattr("prunebench.pruners.maskllm.initial_logits._CHUNK", 999)
    assert torch.equal(whole[:, 777:5000], start(prior=None, groups=slice(777, 5000)))
    assert not torch.equal(whole[:, :50], start(prior=None, groups=slice(0, 50), seed=1))


def test_a_strong_prior_is_the_first_choice_of_every_group():
    prior = torch.randint(0, 6, (2000,), generator=generator(), dtype=torch.uint8)
    logits = start(strength=50.0, prior=prior, groups=slice(0, 2000))
    assert torch.equal(logits.argmax(0).to(torch.uint8), prior)
    # the paper's: three standard deviations leave about one group in twenty elsewhere
    mild = start(prior=prior, groups=slice(0, 2000)).argmax(0) != prior
    assert 0.02 < mild.float().mean() < 0.12


def plain_mask(logits, layer, how, *, noise=True):
    """Return m, (groups, M), by torch's own softmax."""
    drawn = gumbel(
        torch.arange(logits.shape[1]) + layer.first, len(logits),
        seed=how.seed, step=how.step, layer=layer.index,
    )  # fmt: skip
    y = ((how.scale * logits + (how.noise if noise else 0) * drawn) / how.temperature).softmax(0)
    return y.T @ layer.table.to(logits.dtype)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("chunk", [70, 3 << 17])
def test_soften_is_a_plain_softmax(kept, group, chunk, monkeypatch):
    monkeypatch.setattr(relaxation, "_CHUNK_LOGITS", chunk)
    layer = layer_of(kept=kept, group=group, first=160)
    weight, out = torch.randn(8, 32, generator=generator(1)), torch.empty(8, 32)
    layer.soften(weight, HOW, out)
    mask = plain_mask(layer.logits.double(), layer, HOW)
    assert torch.allclose(out.double(), weight * mask.view(8, 32), atol=1e-6)


def test_every_relaxed_group_keeps_n_in_all():
    layer, out = layer_of(rows=64), torch.empty(64, 32)
    for temperature, scale in [(4.0, 100.0), (0.05, 500.0), (0.5, 1.0)]:
        how = Relaxation(0, 1, temperature=temperature, scale=scale)
        layer.soften(torch.ones(64, 32), how, out)
        assert (out.view(-1, 4).sum(1) - 2).abs().max() < 2e-6
        assert out.min() >= 0 and out.max() <= 1 + 1e-6


def test_a_cold_softmax_is_the_hard_mask():
    layer, out = layer_of(), torch.empty(8, 32)
    layer.soften(torch.ones(8, 32), Relaxation(0, 0, temperature=1e-3, scale=10.0, noise=0.0), out)
    keep = mask_of(layer.choices(), layer.table, torch.Size((8, 32)))
    assert torch.allclose(out, keep.float(), atol=1e-4)


def test_soften_writes_into_another_dtype_and_reads_logits_of_another():
    layer = layer_of(dtype=torch.bfloat16)
    weight, out = torch.randn(8, 32).bfloat16(), torch.empty(8, 32, dtype=torch.bfloat16)
    layer.soften(weight, HOW, out)
    mask = plain_mask(layer.logits.double(), layer, HOW).view(8, 32)
    assert torch.allclose(out.double(), weight.double() * mask, rtol=0.02, atol=1e-3)


def gradient_of(layer, weight, slope, how):
    made = torch.empty(layer.logits.shape)
    for part, chosen, scores in layer.scores(weight, slope, how):
        made[:, part] = slope_of_logits(chosen, scores, how)
    return made


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("reward", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [70, 3 << 17])
def test_the_gradient_of_the_logits_is_that_of_autograd(kept, group, reward, chunk, monkeypatch):
    monkeypatch.setattr(relaxation, "_CHUNK_LOGITS", chunk)
    layer = layer_of(kept=kept, group=group, first=24)
    weight = torch.randn(8, 32, generator=generator(1), dtype=torch.float64)
    inputs = torch.randn(20, 32, generator=generator(2), dtype=torch.float64)
    leaf = layer.logits.double().requires_grad_()
    masked = weight * plain_mask(leaf, layer, HOW).view(8, 32)
    masked.retain_grad()
    loss = (inputs @ masked.T).tanh().square().mean()  # any loss
    loss.backward(retain_graph=True)
    slope = slope_for(masked.grad.float())
    leaf.grad = None
    (loss - reward * masked.square().sum()).backward()
    how = Relaxation(5, 9, temperature=0.7, scale=1.3, noise=0.8, reward=reward)
    got = gradient_of(layer, weight.float(), slope, how)
    assert torch.allclose(got.double(), leaf.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("curvature", [1.0, 2.5])
def test_the_curvature_is_the_quadratic_cost_of_whole_weights(curvature):
    """s_p grows by the sum of c/2 C W^2 (p - m)^2 over the group, up to a constant."""
    layer = layer_of()
    weight = torch.randn(8, 32, generator=generator(1))
    slope = slope_for(torch.randn(8, 32, generator=generator(2)))
    how = Relaxation(5, 9, temperature=0.7, scale=1.3, noise=0.8, curvature=curvature)
    plain = Relaxation(5, 9, temperature=0.7, scale=1.3, noise=0.8)
    with_cost = torch.cat([s.clone() for _, _, s in layer.scores(weight, slope, how)], dim=1)
    without = torch.cat([s.clone() for _, _, s in layer.scores(weight, slope, plain)], dim=1)
    mask = plain_mask(layer.logits, layer, how)  # (groups, 4)
    curved = (slope.rows[:, None] * slope.columns * weight.square()).view(-1, 4)
    for number, candidate in enumerate(layer.table):
        cost = (curvature / 2 * curved * (candidate - mask).square()).sum(1)
        added = with_cost[number] - without[number]
        constant = (curvature / 2 * curved * mask.square()).sum(1)
        assert torch.allclose(added, cost - constant, atol=1e-4)


def test_certainty_is_the_mean_largest_probability_without_noise():
    layer = layer_of()
    y = (HOW.scale * layer.logits / HOW.temperature).softmax(0)
    assert math.isclose(layer.certainty(HOW), float(y.amax(0).sum()), rel_tol=1e-5)


# ------------------------------------------------------------ schedule and shares


def test_the_schedule_is_the_papers():
    plan = Schedule(
        steps=5, batch=2, temperature=(4.0, 0.05), scale=(100.0, 500.0), noise=1.0,
        reward=1e-5, curvature=0.0, peak_rate=5e-4, last_rate=0.1,
    )  # fmt: skip
    hows = [plan.relaxation(step, seed=1, draw=step) for step in range(5)]
    assert [round(how.scale) for how in hows] == [100, 200, 300, 400, 500]
    assert hows[0].temperature == 4.0
    assert math.isclose(hows[-1].temperature, 0.05, rel_tol=1e-9)
    assert [how.reward for how in hows] == pytest.approx([1e-5, 8e-6, 6e-6, 4e-6, 2e-6])
    rates = [plan.rate(step) for step in range(6)]
    assert rates[0] == 5e-4
    assert rates == sorted(rates, reverse=True)
    assert math.isclose(rates[5], 5e-5)  # where the cosine ends
    assert Schedule(**{**vars(plan), "steps": 1}).relaxation(0, seed=0, draw=0).scale == 100


@pytest.mark.parametrize("count", [1, 3, 8, 9, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_shared_out_as_chunk_cuts_them(count, world):
    shares = [Shards(rank, world).rows(count) for rank in range(world)]
    rows = [list(range(count))[share] for share in shares]
    assert sum(rows, []) == list(range(count))
    expected = [chunk.tolist() for chunk in torch.arange(count).chunk(world)]
    assert [row for row in rows if row] == expected
