"""The mathematics of MaskLLM, each against a second formula: noise, relaxation, optimizers."""

import itertools
import math

import pytest
import torch
from torch.optim.adamw import adamw

from prunebench.errors import UsageError
from prunebench.pruners.maskllm import relaxation
from prunebench.pruners.maskllm.candidates import candidates, choose, mask_of, require_learnable
from prunebench.pruners.maskllm.initial_logits import LogitInit
from prunebench.pruners.maskllm.moments import PackedMoments, round_at_random
from prunebench.pruners.maskllm.noise import gumbel, philox, uniforms
from prunebench.pruners.maskllm.optimise import Optimizer
from prunebench.pruners.maskllm.relaxation import (
    LayerLogits,
    Relaxation,
    WeightGradient,
    slope_of_logits,
)
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.pruners.maskllm.shards import Shards
from prunebench.sparsity import Sparsity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------ noise

# Random123, tests/kat_vectors: philox4x32 10 rounds; counter, key, expected.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    got = philox(tuple(torch.tensor([word]) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in got] == words(expected)


def test_the_counters_of_many_groups_do_not_disturb_each_other():
    counter = [torch.tensor([words(row[0])[place] for row in KNOWN[:1] * 3]) for place in range(4)]
    counter[0] = torch.tensor([5, 0, 7])
    got = philox(tuple(counter), (0, 0))
    assert [int(word[1]) for word in got] == words(KNOWN[0][2])


@pytest.mark.parametrize("choices", [4, 6, 70])
def test_uniforms_lie_between_0_and_1_and_have_the_moments_of_uniforms(choices):
    drawn = uniforms(torch.arange(20_000), choices, seed=3, step=5, layer=2).double()
    assert drawn.shape == (choices, 20_000)
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    error = 5 / math.sqrt(20_000)  # five standard errors of a unit
    assert ((drawn.mean(1) - 0.5).abs() < error * math.sqrt(1 / 12)).all()
    assert ((drawn.var(1) - 1 / 12).abs() < error * math.sqrt(1 / 180)).all()
    if choices > 1:
        together = torch.corrcoef(drawn[:6]) - torch.eye(len(drawn[:6]))
        assert together.abs().max() < error


def test_the_extreme_bits_stay_inside_and_give_finite_noise():
    ends = torch.tensor([0.0, 2.0**21 - 1]).add_(0.5).mul_(2.0**-21)  # as `uniforms` makes them
    assert (ends > 0).all() and (ends < 1).all()
    assert torch.isfinite(-(-ends.log()).log()).all()


def test_gumbel_noise_has_the_moments_of_gumbel_noise():
    drawn = gumbel(torch.arange(30_000), 6, seed=0, step=0, layer=0).double()
    assert torch.isfinite(drawn).all()
    assert abs(float(drawn.mean()) - 0.5772156649) < 0.015  # Euler's constant
    assert abs(float(drawn.var()) - math.pi**2 / 6) < 0.05
    # the largest of six and a constant is what softmax at temperature 0 chooses: exp(z) / sum
    z = torch.tensor([0.0, 0.5, 1.0, -1.0, 0.2, 2.0])
    share = torch.bincount((drawn + z[:, None]).argmax(0), minlength=6) / 30_000
    assert torch.allclose(share.double(), z.double().softmax(0), atol=0.015)


@pytest.mark.parametrize("choices", [6, 70])
def test_noise_is_the_same_for_any_tiling(choices):
    key = {"seed": 7, "step": 11, "layer": 3}
    whole = gumbel(torch.arange(1000), choices, **key)
    tiles = [gumbel(torch.arange(a, b), choices, **key) for a, b in [(0, 1), (1, 400), (400, 1000)]]
    assert torch.equal(whole, torch.cat(tiles, dim=1))
    backwards = gumbel(torch.arange(1000).flip(0), choices, **key)
    assert torch.equal(whole, backwards.flip(1))


def test_noise_differs_between_seeds_steps_layers_and_far_groups():
    groups = torch.arange(500)
    first = gumbel(groups, 6, seed=1, step=1, layer=1)
    others = [
        gumbel(groups, 6, seed=2, step=1, layer=1),
        gumbel(groups, 6, seed=1, step=2, layer=1),
        gumbel(groups, 6, seed=1, step=1, layer=2),
        gumbel(groups + (1 << 32), 6, seed=1, step=1, layer=1),  # the high word counts
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert (one == other).float().mean() < 0.001


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


# ------------------------------------------------------------ the relaxed mask


def layer_of(*, rows=8, columns=32, kept=2, group=4, dtype=torch.float32, first=0, seed=0):
    table = candidates(kept, group)
    groups = rows * columns // group
    logits = torch.randn(len(table), groups, generator=generator(seed))
    return LayerLogits(3, logits.to(dtype), table, columns // group, first=first)


def plain_mask(logits, layer, how, *, noise=True):
    """Return m, (groups, M), by torch's own softmax."""
    drawn = gumbel(
        torch.arange(logits.shape[1]) + layer.first, len(logits),
        seed=how.seed, step=how.step, layer=layer.index,
    )  # fmt: skip
    y = ((how.scale * logits + (how.noise if noise else 0) * drawn) / how.temperature).softmax(0)
    return y.T @ layer.table.to(logits.dtype)


HOW = Relaxation(seed=5, step=9, temperature=0.7, scale=1.3, noise=0.8)


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


def slope_for(gradient, seed=2):
    rows, columns = gradient.shape
    return WeightGradient(
        gradient,
        torch.rand(rows, generator=generator(seed)),
        torch.rand(columns, generator=generator(seed + 1)),
    )


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


# ------------------------------------------------------------ optimizers


def feed(layer, gradient, size=7):
    """Yield a gradient in pieces of whole rows, as a copy: optimizers overwrite it."""
    step = size * layer.width
    for begin in range(0, gradient.shape[1], step):
        part = slice(begin, min(begin + step, gradient.shape[1]))
        yield part, gradient[:, part].clone()


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_that_of_torch(clip):
    layer = layer_of()
    theirs, state = layer.logits.clone(), [torch.zeros_like(layer.logits) for _ in range(2)]
    taken = torch.zeros(())
    ours = Optimizer("adamw", betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip=clip)
    ours.prepare(layer)
    for step in range(12):
        gradient = torch.randn(layer.logits.shape, generator=generator(step)) * 0.1
        norm = float(gradient.norm())
        clipped = gradient * min(1.0, clip / norm) if clip else gradient
        adamw(
            [theirs], [clipped.clone()], state[:1], state[1:], [], [taken], foreach=False,
            amsgrad=False, beta1=0.9, beta2=0.95, lr=0.01, weight_decay=0.1, eps=1e-5,
            maximize=False,
        )  # fmt: skip
        unit = max(1.0, norm / clip) if clip else 1.0
        how = Relaxation(0, 99, temperature=1.0, scale=1.0)
        ours.step(layer, feed(layer, gradient), how, count=step + 1, rate=0.01, unit=unit)
    assert torch.allclose(layer.logits, theirs, atol=2e-6)


def test_momentum_adds_up_and_clips_outliers():
    layer = layer_of()
    before = layer.logits.clone()
    rule = Optimizer("momentum", betas=(0.5, 0.0), outlier=2.0)
    rule.prepare(layer)
    gradient = torch.full_like(before, 1.0)
    gradient[0, 0] = 1000.0
    how = Relaxation(0, 0, temperature=1.0, scale=1.0)
    for count in (1, 2):
        rule.step(layer, feed(layer, gradient), how, count=count, rate=0.1, unit=1.0)
    change = before - layer.logits
    assert torch.allclose(change[1:], torch.tensor(0.1 * (1 + 1.5)), atol=1e-6)
    assert math.isclose(float(change[0, 0]), 0.1 * (2 + 3), rel_tol=1e-5)


def test_mirror_goes_along_the_scores_without_their_mean():
    layer = layer_of()
    weight = torch.randn(8, 32, generator=generator(1))
    slope = slope_for(torch.randn(8, 32, generator=generator(2)))
    made = list(Optimizer("mirror").directions(layer, weight, slope, HOW))
    got = torch.cat([piece for _, piece in made], dim=1)
    scores = layer.table @ (weight * slope.gradient).view(-1, 4).T
    assert torch.allclose(got, scores - scores.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bytes_each", "tolerance"), [("bfloat16", 2, 0.01), ("int8", 1, 0.03)]
)
def test_small_moments_stay_close_and_take_the_bytes_that_they_promise(
    dtype, bytes_each, tolerance
):
    plain, small = layer_of(rows=16, columns=256), layer_of(rows=16, columns=256)
    begun = plain.logits.clone()
    exact, lean = Optimizer("adamw"), Optimizer("adamw", state_dtype=dtype)
    exact.prepare(plain)
    lean.prepare(small)
    for name in ("first", "second"):
        packed = small.state[name]
        assert packed.values.nbytes == bytes_each * plain.logits.numel()
        assert packed.scales.nbytes == (4 * 6 * 16 if dtype == "int8" else 0)  # one a row
    how = Relaxation(0, 0, temperature=1.0, scale=1.0)
    for step in range(20):
        gradient = torch.randn(plain.logits.shape, generator=generator(step)) + 0.5
        for layer, rule in ((plain, exact), (small, lean)):
            rule.step(layer, feed(layer, gradient), how, count=step + 1, rate=0.01, unit=1.0)
    moved = (plain.logits - begun).norm()
    assert (small.logits - plain.logits).norm() < tolerance * moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_tensors_read_back_what_was_written(dtype):
    like = torch.empty(6, 64)
    for positive in (False, True):
        packed = PackedMoments.zeros(like, dtype, width=8, positive=positive)
        assert packed.read(slice(0, 64)).abs().max() == 0
        values = torch.randn(6, 16, generator=generator())
        values = values.square() if positive else values
        packed.write(slice(8, 24), values)
        got = packed.read(slice(8, 24))
        assert got.dtype == torch.float32
        scale = values.abs().max()
        assert (got - values).abs().max() <= scale * {"float32": 0, "bfloat16": 0.004}.get(
            dtype, 0.006
        )
        assert packed.read(slice(0, 8)).abs().max() == 0
        assert packed.read(slice(24, 64)).abs().max() == 0


def test_random_rounding_is_a_neighbour_and_right_on_average():
    values = torch.tensor([1.001, -0.3, 1e-8, 123.4, 0.0, -1.0]).repeat(2)[:, None]
    groups = torch.arange(20_000)
    drawn = round_at_random(values.expand(12, 20_000).contiguous(), groups, seed=1, step=2, layer=3)
    assert drawn.dtype == torch.bfloat16
    exact = values.double()
    spread = (drawn.double() - exact).abs().amax(1)
    assert (spread <= exact[:, 0].abs() * 2**-7).all()  # one unit in the last place
    for row in drawn:
        assert len(row.unique()) <= 2
    bias = (drawn.double().mean(1) - exact[:, 0]).abs()
    assert (bias <= 5 * exact[:, 0].abs() * 2**-8 / math.sqrt(20_000)).all()
    assert torch.equal(drawn[4], torch.zeros(20_000, dtype=torch.bfloat16))
    assert torch.equal(drawn[5], torch.full((20_000,), -1.0, dtype=torch.bfloat16))


def test_bfloat16_logits_follow_changes_below_half_a_unit():
    layer = layer_of(rows=32, columns=128)
    layer.logits = torch.ones_like(layer.logits).bfloat16()
    rule = Optimizer("momentum", betas=(0.0, 0.0))
    rule.prepare(layer)
    for step in range(40):  # each far below 2^-9: rounding to the nearest would not move at all
        how = Relaxation(3, step, temperature=1.0, scale=1.0)
        gradient = torch.ones(layer.logits.shape)
        rule.step(layer, feed(layer, gradient), how, count=step + 1, rate=1e-4, unit=1.0)
    assert abs(float(layer.logits.double().mean()) - (1 - 40e-4)) < 2e-4


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
