"""Quantized weights are trained on the grid that their method chose."""

import pytest
import torch

from prunebench.errors import IncompatibleData
from prunebench.models.linears import find_linears
from prunebench.models.measure import count_violations
from prunebench.models.weight_grid import WeightGrid, count_off_grid, find_codes, grouped
from prunebench.pruners.rounding import round_to_nearest
from prunebench.recovery.block import Block
from prunebench.recovery.fixed_grid import FixedGrid, StraightThrough
from prunebench.testing import tiny_model
from tests.recovery.test_block import recover

GRID = WeightGrid(4)
IDLE = Block(lr=1e-9, epochs=1)  # moves no weight to another value of its grid


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_steps_and_pattern_stay_and_the_error_falls(architecture):
    model, idle = tiny_model(architecture), tiny_model(architecture)
    recovered = recover(model, Block(lr=0.1), method="sparsegpt", grid=GRID).recovered
    recover(idle, IDLE, method="sparsegpt", grid=GRID)
    assert recovered[0].held_out_after < recovered[0].held_out_before
    moved = 0
    for ours, theirs in zip(find_linears(model), find_linears(idle), strict=True):
        weight = ours.read()
        assert count_off_grid(weight, GRID) == 0
        assert count_violations(weight == 0, kept=2, group=4) == 0
        assert not torch.signbit(weight)[weight == 0].any()
        if ours.block_index == 0 and not torch.equal(weight, theirs.read()):
            moved += 1
            steps = [find_codes(grouped(w, GRID), GRID)[0] for w in (weight, theirs.read())]
            assert (steps[0] == steps[1]).float().mean() > 0.9  # a row whose codes share a factor
    assert moved > 0


@pytest.mark.parametrize("form", [GRID, WeightGrid(3, 8), WeightGrid(8, 20, symmetric=True)])
def test_it_rounds_to_the_nearest_value_of_the_same_grid(form):
    generator = torch.Generator().manual_seed(0)
    weight = round_to_nearest(torch.randn(5, 30, generator=generator), form)
    fixed = FixedGrid(weight, form, "w")
    assert torch.equal(fixed.round(weight), weight)
    moved = weight + 0.3 * torch.randn(5, 30, generator=generator)
    rounded = fixed.round(moved)
    assert count_off_grid(rounded, form) == 0
    # no other value that the groups hold is nearer
    values = grouped(weight, form)  # [groups, width]
    ours, wanted = grouped(rounded, form), grouped(moved, form)
    nearest = (values[:, None, :] - wanted[:, :, None]).abs().amin(2)
    assert ((ours - wanted).abs() <= nearest + 1e-6).all()


def test_gradients_pass_the_rounding():
    value = torch.tensor([0.2, 0.7], requires_grad=True)
    rounded = StraightThrough.apply(value, torch.tensor([0.0, 1.0]))
    assert rounded.tolist() == [0.0, 1.0]
    (rounded * torch.tensor([3.0, 5.0])).sum().backward()
    assert value.grad.tolist() == [3.0, 5.0]


def test_a_matrix_that_is_on_no_grid_is_refused():
    with pytest.raises(IncompatibleData, match="w cannot be trained on its grid of 4 bits"):
        FixedGrid(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), GRID, "w")
