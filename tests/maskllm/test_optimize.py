"""Optimizers of mask logits against torch and second formulas, and moments in few bits."""

import math

import pytest
import torch
from torch.optim.adamw import adamw

from prunebench.pruners.maskllm.moments import PackedMoments, round_at_random
from prunebench.pruners.maskllm.optimize import Optimizer
from prunebench.pruners.maskllm.relaxation import (
    Relaxation,
)
from tests.mask_training import HOW, generator, layer_of, slope_for

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
    initial = plain.logits.clone()
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
    moved = (plain.logits - initial).norm()
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
