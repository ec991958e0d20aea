"""Steps and codes derived from the weights alone."""

import pytest
import torch

from prunebench.models.weight_grid import WeightGrid, count_off_grid, find_codes, grouped


def on_grid(form, *, rows=40, width=96, seed=0):
    """Random codes times random float16 steps, without any rounding of ours."""
    generator = torch.Generator().manual_seed(seed)
    groups = form.groups(rows, width)
    low = -(2 ** (form.bits - 1)) if form.symmetric else -3
    shape = (groups, form.width(width))
    codes = torch.randint(low, low + 2**form.bits, shape, generator=generator)
    steps = (torch.rand(groups, 1, generator=generator) * 0.01).half().float()
    values = (steps * codes.float()).view(rows, -1)
    return values[:, :width].contiguous()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_what_lies_on_a_grid_is_found_and_given_back_bit_for_bit(bits, group_size, symmetric):
    form = WeightGrid(bits, group_size, symmetric)
    weight = on_grid(form)
    assert count_off_grid(weight, form) == 0
    steps, codes = find_codes(grouped(weight, form), form)
    assert torch.equal((steps[:, None] * codes).view(40, -1), weight)
    assert torch.equal(steps.half().float(), steps)


def test_one_wrong_weight_is_noticed():
    form = WeightGrid(4, 32)
    weight = on_grid(form)
    weight[3, 40] += 1e-7
    weight[7, 0] *= 1.0001
    assert count_off_grid(weight, form) == 2


def test_more_codes_than_there_are_bits_for_are_noticed():
    weight = on_grid(WeightGrid(4, 32))
    assert count_off_grid(weight, WeightGrid(3, 32)) > 100  # of 120
    # -3 to 12 do not lie around 0
    assert count_off_grid(weight, WeightGrid(4, 32, symmetric=True)) > 100


def test_a_step_of_another_group_is_noticed():
    form = WeightGrid(4, 32)
    # columns 0 to 63 of each of 40 rows have two steps, 64 to 95 one
    assert count_off_grid(on_grid(form), WeightGrid(4, 64)) == 40
    assert count_off_grid(on_grid(form), WeightGrid(4, 16)) == 0


def test_codes_that_share_a_factor_and_groups_of_zeros_are_no_error():
    step = torch.tensor(0.3).half().float()  # 11 digits: 3 times it is no float16 number
    weight = torch.stack([3 * step * torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.zeros(4)])
    assert count_off_grid(weight, WeightGrid(4, 4)) == 0
    assert count_off_grid(weight, WeightGrid(3, 4)) == 1  # -3 to 6 times the step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_weights_in_16_bits_the_values_are_counted(dtype):
    form = WeightGrid(4, 32)
    assert count_off_grid(on_grid(form).to(dtype), form) == 0
    dense = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert count_off_grid(dense, form) == 16


def test_the_last_group_of_a_row_may_be_smaller():
    form = WeightGrid(4, 40)
    assert form.groups(24, 96) == 72
    assert form.groups(24, 80) == 48
    assert WeightGrid(4).groups(24, 96) == 24
    assert grouped(torch.ones(24, 96), form)[2].tolist() == [1.0] * 16 + [0.0] * 24
