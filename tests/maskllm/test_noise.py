"""The noise of MaskLLM: published answers of Philox, moments of Gumbel, the same for any tiling."""

import itertools
import math

import pytest
import torch

from prunebench.pruners.maskllm.noise import gumbel, philox, uniforms

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
    for noise, other in itertools.combinations([first, *others], 2):
        assert (noise == other).float().mean() < 0.001
