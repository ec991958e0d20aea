"""The packed 2:4 format: exact, complete, and never a silent truncation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunebench.errors import IncompatibleData
from prunebench.sparse24.packed import (
    VALID_CODES,
    Packed24,
    check_24,
    pack24,
    require_sound,
    split_codes,
    unpack24,
)
from tests.factories import canonicalize, random_24

DTYPES = (torch.bfloat16, torch.float16)


def bits(tensor):
    return tensor.view(torch.int16)


@st.composite
def matrices(draw):
    """Any bits that are numbers, with 0, 1 or 2 of four kept, zeros of both signs."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    kept = st.sampled_from([0, 0x0001, 0x3C00, 0xBF80, 0x7F7F, 0x7C00, 0x8001, 0x4049])
    zero = st.sampled_from([0, 0x8000])
    words = []
    for _ in range(rows * groups):
        places = draw(st.sets(st.integers(0, 3), max_size=2))
        words += [draw(kept if place in places else zero) for place in range(4)]
    signed = torch.tensor([w - 0x10000 if w >= 0x8000 else w for w in words], dtype=torch.int16)
    return signed.view(draw(st.sampled_from(DTYPES))).view(rows, groups * 4)


@given(matrices())
@settings(max_examples=150, deadline=None)
def test_round_trip(weight):
    """Bit for bit, but that -0.0 comes back as +0.0."""
    packed = pack24(weight)
    expected = torch.where(bits(weight) == -0x8000, 0, bits(weight))
    assert torch.equal(bits(unpack24(packed)), expected)
    assert not (bits(packed.values) == -0x8000).any()
    assert set(split_codes(packed).unique().tolist()) <= set(VALID_CODES)
    require_sound(packed, name="w")
    again = pack24(unpack24(packed))
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(bits(again.values), bits(packed.values))


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_the_report_counts_what_a_plain_loop_counts(weight):
    report = check_24(weight)
    groups = weight.view(-1, 4).tolist()
    nonzeros = [sum(value != 0 for value in four) for four in groups]
    assert (report.groups, report.over) == (len(groups), 0)
    assert report.under == sum(count < 2 for count in nonzeros)
    assert report.negative_zeros == int((bits(weight) == -0x8000).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_a_group(dtype):
    """All 16 patterns, one a row: the values lie where the codes say, over-full ones are named."""
    for pattern in itertools.product((0, 1), repeat=4):
        weight = torch.tensor([pattern], dtype=dtype) * torch.tensor([[2, 3, 5, 7]], dtype=dtype)
        report = check_24(weight)
        assert report.holds == (sum(pattern) <= 2)
        if not report.holds:
            with pytest.raises(IncompatibleData):
                pack24(weight)
            continue
        packed = pack24(weight)
        code = int(split_codes(packed)[0, 0])
        assert packed.values[0].tolist() == [weight[0, code & 3], weight[0, code >> 2]]
        assert torch.equal(unpack24(packed), weight)


def test_what_it_takes():
    packed = pack24(random_24(64, 32))
    assert packed.bytes / packed.dense_bytes == 0.5625
    assert (packed.shape, packed.dtype) == ((64, 128), torch.bfloat16)
    odd = pack24(random_24(3, 5))  # an odd number of groups: half a byte is lost a row
    assert odd.codes.shape == (3, 3)
    assert torch.equal(unpack24(odd), random_24(3, 5))


def test_large_matrices_go_in_chunks(monkeypatch):
    import prunebench.sparse24.packed as module

    weight = random_24(40, 25)
    whole = pack24(weight)
    monkeypatch.setitem(module._CHUNK_GROUPS, "cpu", 7)
    assert torch.equal(pack24(weight).codes, whole.codes)
    assert torch.equal(unpack24(whole), weight)
    weight[33, 48:52] = 1
    assert check_24(weight).first_over == (33, 48)


def test_unpacking_into_a_place():
    weight = random_24(8, 4)
    place = torch.full((8, 16), 9, dtype=torch.bfloat16)
    assert unpack24(pack24(weight), out=place) is place
    assert torch.equal(place, weight)


def test_a_strided_matrix():
    weight = random_24(16, 8)
    assert torch.equal(unpack24(pack24(weight.T.contiguous().T)), weight)


def test_the_layer_and_the_group_are_named():
    weight = random_24(6, 4)
    weight[2, 8:12] = torch.tensor([1.0, 0.0, -2.0, 3.5])
    weight[5, 0:4] = 1
    with pytest.raises(IncompatibleData) as caught:
        pack24(weight, name="model.layers.3.mlp.up_proj")
    first, second, _ = str(caught.value).splitlines()
    assert first == (
        "model.layers.3.mlp.up_proj is not 2:4: row 2, columns 8 to 11 hold 1, 0, -2, 3.5"
    )
    assert second == "2 of its 24 groups keep more than 2 of 4"


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(4, 8), "it is float32|is float32"),
        (torch.zeros(4, 6, dtype=torch.bfloat16), "cannot be 2:4: it has the shape"),
        (torch.zeros(2, 4, 8, dtype=torch.bfloat16), "cannot be 2:4: it has the shape"),
        (torch.zeros(8, dtype=torch.float16), "cannot be 2:4: it has the shape"),
    ],
)
def test_what_cannot_be_packed(weight, says):
    with pytest.raises(IncompatibleData, match=says):
        pack24(weight, name="it")


def test_masking_leaves_no_negative_zero():
    weight = torch.tensor([[-1.0, 2.0, -3.0, 4.0]], dtype=torch.bfloat16)
    keep = torch.tensor([[False, True, False, True]])
    assert check_24(weight * keep).negative_zeros == 2
    clean = canonicalize(weight, keep)
    assert check_24(clean).negative_zeros == 0
    assert torch.equal(unpack24(pack24(weight * keep)), clean)
    assert torch.equal(bits(unpack24(pack24(weight * keep))), bits(clean))


def test_damaged_codes_are_refused():
    packed = pack24(random_24(4, 4))
    for broken in (
        Packed24(packed.values, torch.zeros_like(packed.codes)),
        Packed24(packed.values, packed.codes[:, :1]),
        Packed24(packed.values.float(), packed.codes),
        Packed24(packed.values, packed.codes.to(torch.int8)),
    ):
        with pytest.raises(IncompatibleData, match="w is not a packed 2:4 matrix"):
            require_sound(broken, name="w")
