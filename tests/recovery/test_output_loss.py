"""How a block's output is compared with its target."""

import pytest
import torch

from prunebench.models.pruned_block import massive_share, output_loss

SHAPE = (2, 16, 8)  # [windows, seqlen, hidden]


@pytest.fixture
def signs():
    """A target in which every channel has the same size."""
    return torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(0)) * 2.0 - 1


@pytest.fixture
def error():
    return 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_each_loss_is_its_formula(signs, error):
    target = signs * torch.tensor([1.0, 2.0]).repeat_interleave(8).reshape(1, 16, 1)
    relative = error.square().sum(-1) / target.square().sum(-1)
    output = target + error
    assert output_loss(output, target, "mse") == pytest.approx(float(error.square().mean()))
    assert output_loss(output, target, "relative") == pytest.approx(float(relative.mean()))
    assert output_loss(output, target, "cauchy") == pytest.approx(float(relative.log1p().mean()))


def test_where_all_channels_are_alike_channels_is_cauchy(signs, error):
    losses = [float(output_loss(signs + error, signs, loss)) for loss in ("channels", "cauchy")]
    assert losses[0] == pytest.approx(losses[1])


def test_a_massive_channel_hides_the_others_from_cauchy_but_not_from_channels(signs, error):
    massive = torch.ones(8)
    massive[3] = 50.0
    target, output = signs * massive, (signs + error) * massive
    plain = float(output_loss(signs + error, signs, "channels"))
    assert output_loss(output, target, "channels") == pytest.approx(plain)
    others = output.clone()
    others[..., 3] = target[..., 3]  # only the other channels are wrong
    assert output_loss(others, target, "cauchy") < 0.01 * plain
    assert output_loss(others, target, "channels") > 0.5 * plain


def test_windows_are_compared_one_by_one_so_that_halved_batches_change_nothing(error):
    target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 9)
    whole = output_loss(target + error, target, "channels")
    parts = [output_loss(target[i : i + 1] + error[i : i + 1], target[i : i + 1], "channels")
             for i in range(2)]  # fmt: skip
    assert float(whole) == pytest.approx(float(sum(parts)) / 2)


def test_a_channel_of_zeros_is_finite(signs, error):
    target = signs.clone()
    target[..., 5] = 0
    assert torch.isfinite(output_loss(target + error, target, "channels"))


def test_the_share_of_massive_channels():
    target = torch.ones(2, 16, 200)
    assert massive_share(target) == pytest.approx(0.01)
    target[..., :2] = 100.0  # a hundredth of 200
    assert massive_share(target) == pytest.approx(2e4 / (2e4 + 198))
    target[0, 0] *= 1e4  # a massive token counts as any other
    assert massive_share(target) == pytest.approx(2e4 / (2e4 + 198))


def test_a_token_of_zeros_has_no_share():
    target = torch.ones(1, 4, 100)
    target[0, 0] = 0.0
    assert massive_share(target) == pytest.approx(0.01)
