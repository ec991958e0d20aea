"""Keep masks: exact counts, N:M in every group, ties by position, against a slow double loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunebench.pruners.keep import keep_group, keep_largest, keep_matrix, keep_rows
from prunebench.sparsity import Sparsity

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "1:2", "5:8", "4:4", "16:32", "7:32"]


def slow_keep(values, *, prune):
    """Second opinion: sort positions by (score, position), drop the first `prune`."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return [i not in order[:prune] for i in range(len(values))]


def slow_rows(score, sparsity):
    """Second opinion: each row its floor, then one more of the rows whose next weight is least."""
    rows, values = [], score.tolist()
    least = sparsity.count(score.shape[1])
    rest = 0 if sparsity.is_pattern else sparsity.count(score.numel()) - least * len(values)
    following = []
    if rest:
        following = sorted(range(len(values)), key=lambda i: (sorted(values[i])[least], i))
    for number, row in enumerate(values):
        if sparsity.is_pattern:
            m = sparsity.group
            groups = [row[i : i + m] for i in range(0, len(row), m)]
            keep = [slow_keep(g, prune=m - sparsity.kept) for g in groups]
            rows.append([k for g in keep for k in g])
        else:
            rows.append(slow_keep(row, prune=least + (number in following[:rest])))
    return torch.tensor(rows)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
    pattern=st.sampled_from(PATTERNS),
)
def test_patterns_equal_the_slow_loop_ties_included(rows, groups, levels, seed, pattern):
    sparsity = Sparsity.parse(pattern)
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * sparsity.group)
    score = torch.randint(0, levels, shape, generator=generator).float()
    assert torch.equal(keep_rows(score, sparsity), slow_rows(score, sparsity))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
    pattern=st.sampled_from(PATTERNS),
)
def test_one_group_of_every_output_as_columns(rows, levels, seed, pattern):
    sparsity = Sparsity.parse(pattern)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (rows, sparsity.group), generator=generator).float()
    keep = keep_group(score.T.contiguous(), kept=sparsity.kept)
    assert torch.equal(keep.T, slow_rows(score, sparsity))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 40),
    levels=st.integers(1, 50),
    seed=st.integers(0, 99),
    ratio=st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.66, 0.9, 0.99]),
)
def test_rows_equal_the_slow_loop_ties_included(rows, width, levels, seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, width), generator=generator).float()
    sparsity = Sparsity(ratio)
    keep = keep_rows(score, sparsity)
    assert torch.equal(keep, slow_rows(score, sparsity))
    assert int((~keep).sum()) == sparsity.count(rows * width)
    assert ((~keep).sum(1) - sparsity.count(width)).unique().tolist() in ([0], [0, 1])


def test_the_remainder_goes_to_the_rows_whose_next_weight_scores_least():
    """A third of 4 is 1 a row, of 12 it is 4: the row with the lowest second score loses two."""
    score = torch.tensor([[9.0, 1.0, 8.0, 7.0], [1.0, 2.0, 8.0, 9.0], [0.0, 3.0, 8.0, 9.0]])
    assert keep_rows(score, Sparsity(1 / 3 + 1e-9)).tolist() == [
        [True, False, True, True],
        [False, False, True, True],
        [False, True, True, True],
    ]


def test_matrix_counts_over_the_whole_matrix():
    score = torch.arange(24.0).view(4, 6)
    keep = keep_matrix(score, Sparsity(0.5))
    assert keep.tolist() == [[False] * 6] * 2 + [[True] * 6] * 2


def test_a_constant_matrix_loses_exactly_its_share():
    keep = keep_matrix(torch.ones(8, 8), Sparsity(0.25))
    assert int((~keep).sum()) == 16
    assert not keep.flatten()[:16].any()  # of equal scores the earlier ones go


def test_chunks_do_not_show(monkeypatch):
    import prunebench.pruners.keep as module

    score = torch.rand(33, 48, generator=torch.Generator().manual_seed(0))
    whole = keep_rows(score, Sparsity.parse("2:4"))
    monkeypatch.setattr(module, "_CHUNK", 50)  # not a multiple of 4, smaller than two rows
    assert torch.equal(keep_rows(score, Sparsity.parse("2:4")), whole)


def test_hand_worked():
    score = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 0.0]])
    assert keep_rows(score, Sparsity.parse("2:4")).tolist() == [
        [True, False, False, True],
        [False, True, True, False],
    ]
    assert keep_rows(score, Sparsity(0.75)).tolist() == [
        [False, False, False, True],
        [False, False, True, False],
    ]


def test_nothing_to_prune_keeps_all():
    assert keep_largest(torch.zeros(2, 3), prune=0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_idempotent(pattern):
    sparsity = Sparsity.parse(pattern)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    once = torch.where(keep_rows(weight.abs(), sparsity), weight, 0)
    twice = torch.where(keep_rows(once.abs(), sparsity), once, 0)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_by_bits_is_that_of_a_sort(dtype):
    """What a GPU does with long rows: all signs, zeros of both, ties, infinities."""
    from prunebench.pruners.keep import _kth_smallest_by_bits

    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 257, generator=generator, dtype=dtype)
    score[1] = score[1].abs().round()  # ties
    score[2, :5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-42], dtype=dtype)
    ordered = score.sort(-1).values
    for k in (1, 2, 128, 256, 257):
        assert torch.equal(_kth_smallest_by_bits(score, k), ordered[:, k - 1 : k])
