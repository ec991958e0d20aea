"""Ratios and N:M: what is understood, what is refused, and exact counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunebench.errors import IncompatibleData, UsageError
from prunebench.sparsity import Sparsity


@pytest.mark.parametrize(
    ("text", "ratio", "kept", "group"),
    [
        ("0.5", 0.5, None, None),
        ("0", 0.0, None, None),
        ("50%", 0.5, None, None),
        (".35", 0.35, None, None),
        ("2:4", 0.5, 2, 4),
        ("1:4", 0.75, 1, 4),
        ("3:4", 0.25, 3, 4),
        ("16:32", 0.5, 16, 32),
        (" 4 : 8 ", 0.5, 4, 8),
        ("2:4,0.5", 0.5, 2, 4),
    ],
)
def test_understood(text, ratio, kept, group):
    assert Sparsity.parse(text) == Sparsity(ratio, kept, group)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.5", "not in [0, 1); did you mean 0.015?"),
        ("50", "did you mean 0.5?"),
        ("1", "not in [0, 1)"),
        ("-0.1", "not in [0, 1)"),
        ("half", "not understood"),
        ("", "empty"),
        ("4:2", "not a pattern"),
        ("0:4", "not a pattern"),
        ("2:4,0.6", "contradicts itself"),
        ("2:4,4:8", "contradicts itself"),
        ("nan", "not"),
    ],
)
def test_refused(text, says):
    with pytest.raises(UsageError) as error:
        Sparsity.parse(text)
    assert says in str(error.value)
    assert error.value.exit_code == 2


@given(st.integers(0, 10_000), st.integers(1, 200))
def test_count_is_exact_decimal(ten_thousandths, size):
    ratio = ten_thousandths / 10_001
    got = Sparsity(ratio).count(size)
    assert got <= ratio * size + 1e-9
    assert got > ratio * size - 1 - 1e-9


def test_count_does_not_suffer_from_binary_fractions():
    assert Sparsity(0.29).count(100) == 29  # int(0.29 * 100) is 28
    assert Sparsity(0.7).count(10) == 7
    assert Sparsity.parse("2:4").count(576) == 288


@given(st.floats(0, 1, exclude_max=True, allow_nan=False))
def test_text_round_trip(ratio):
    assert Sparsity.parse(str(Sparsity(ratio))) == Sparsity(ratio)


def test_width_must_be_divisible_and_the_layer_is_named():
    Sparsity.parse("2:4").require_width(64, name="q_proj")
    with pytest.raises(IncompatibleData, match=r"blocks\.3\.q_proj.*64.*not divisible by 5"):
        Sparsity.parse("2:5").require_width(64, name="blocks.3.q_proj")
