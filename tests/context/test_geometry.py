"""A mask seen through a layout: bands of any block, and atoms, against the dense mask element by element."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import bands as band_lists
from longspan.attention.masks import Mask, causal, documents, from_bands
from longspan.context.geometry import Geometry, Ranges, normalise, stretches, strided
from longspan.layout.tokens import Layout, Segment, make_layout
from tests.context.cases import LAYOUTS, MASKS


@st.composite
def any_mask(draw) -> Mask:
    """Generators' masks, and rectangles of a random grid with random diagonals (more than are looked up one by one)."""
    s = draw(st.integers(1, 31))
    if s >= 15 and draw(st.booleans()):
        return MASKS[draw(st.sampled_from(sorted(MASKS)))](s)
    rows, columns = (sorted({0, s, *draw(st.lists(st.integers(0, s), max_size=5))}) for _ in ("queries", "keys"))
    offsets = st.integers(-s, s)
    return from_bands(
        [
            (q0, q1, k0, k1, *sorted((draw(offsets), draw(offsets))))
            for q0, q1 in pairwise(rows)
            for k0, k1 in pairwise(columns)
            if draw(st.booleans())
        ],
        s,
    )


@st.composite
def any_layout(draw, num_tokens: int) -> Layout:
    return make_layout(draw(st.sampled_from(LAYOUTS)), num_tokens, draw(st.integers(1, 6)))


@st.composite
def any_ranges(draw, num_tokens: int) -> Ranges:
    slots = draw(st.sets(st.integers(0, num_tokens - 1)))
    return normalise((slot, slot + 1) for slot in slots)


def _slots(ranges: Ranges) -> list[int]:
    return [slot for start, stop in ranges for slot in range(start, stop)]


@given(st.data())
def test_bands_of_a_block_are_the_dense_masks_sub_matrix(data) -> None:
    mask = data.draw(any_mask())
    layout = data.draw(any_layout(mask.num_tokens))
    q, k = (data.draw(any_ranges(mask.num_tokens)) for _ in ("q", "k"))
    geometry = Geometry(mask, layout)
    rows, columns = layout.global_positions[_slots(q)], layout.global_positions[_slots(k)]
    expected = mask.dense().numpy()[np.ix_(rows, columns)]
    bands = geometry.bands(q, k)
    np.testing.assert_array_equal(band_lists.dense(bands, len(rows), len(columns)), expected)
    assert band_lists.total_area(bands) == expected.sum() == geometry.area(q, k)
    assert geometry.bands(q, k) is bands


@given(st.data())
def test_atoms_know_which_pairs_are_allowed(data) -> None:
    mask = data.draw(any_mask())
    layout = data.draw(any_layout(mask.num_tokens))
    extra = data.draw(st.sets(st.integers(0, mask.num_tokens)))
    atoms = Geometry(mask, layout).atoms(extra, {0, 1}, {0, 1})
    dense = mask.dense().numpy()[np.ix_(layout.global_positions, layout.global_positions)]
    expected = [[bool(dense[a:b, c:d].any()) for c, d in pairwise(atoms.cuts)] for a, b in pairwise(atoms.cuts)]
    np.testing.assert_array_equal(atoms.allowed_pairs(), np.array(expected).reshape(atoms.num, atoms.num))
    for row, keys in enumerate(atoms.allowed):
        assert [bool(keys >> column & 1) for column in range(atoms.num)] == expected[row]


@given(st.data())
def test_cuts_hold_owners_segments_and_edges_of_the_mask(data) -> None:
    mask = data.draw(any_mask())
    layout = data.draw(any_layout(mask.num_tokens))
    cuts = Geometry(mask, layout).cuts
    assert list(cuts) == sorted(set(cuts)) and (cuts[0], cuts[-1]) == (0, mask.num_tokens)
    assert set(layout.offsets) <= set(cuts)
    assert {placed.slot for placed in layout.placed} <= set(cuts)
    # Within an atom every token lies on the same side of every edge of a rectangle.
    for start, stop in pairwise(cuts):
        positions = layout.global_positions[start:stop]
        for band in mask.bands:
            for edge in band[:4]:
                assert len({bool(position >= edge) for position in positions}) == 1


def test_cuts_follow_diagonals() -> None:
    """Documents' and owners' edges have images along a window's diagonals, so that keys nobody needs can be cut off."""
    window = from_bands([(0, 40, 0, 40, -3, 1)], 40)
    assert {20 - 3, 20 + 1} <= set(Geometry(window, make_layout("contiguous", 40, 2)).cuts)


def test_a_layout_of_several_strided_segments() -> None:
    layout = Layout("two stripes", ((Segment(0, 2, 3), Segment(7, 2, 2)), (Segment(1, 2, 3), Segment(6, 2, 2))))
    mask = causal(10)
    geometry = Geometry(mask, layout)
    assert {0, 3, 5, 8, 10} <= set(geometry.cuts)
    dense = mask.dense().numpy()[np.ix_(layout.global_positions, layout.global_positions)]
    everything = ((0, 10),)
    np.testing.assert_array_equal(band_lists.dense(geometry.bands(everything, everything), 10, 10), dense)
    atoms = geometry.atoms((), {0, 1}, {0, 1})
    for row, (a, b) in enumerate(pairwise(atoms.cuts)):
        for column, (c, d) in enumerate(pairwise(atoms.cuts)):
            assert atoms.allowed_pairs()[row, column] == dense[a:b, c:d].any()


@given(any_mask(), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_strided_is_stride_then_cut(mask: Mask, step: int, q_start: int, k_start: int) -> None:
    got = tuple(strided(mask.bands, step, (q_start, 4), (k_start, 3)))
    expected = band_lists.cut(band_lists.stride(mask.bands, (q_start, step), (k_start, step)), (0, 4), (0, 3))
    assert sorted(got) == sorted(expected)


def test_many_bands_are_looked_up_alike() -> None:
    mask = documents([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 4)
    layout = make_layout("zigzag", mask.num_tokens, 5)
    geometry, dense = Geometry(mask, layout), mask.dense().numpy()
    for rank in range(5):
        q, k = (layout.owned(rank),), (layout.owned((rank + 1) % 5),)
        expected = dense[np.ix_(layout.global_positions[_slots(q)], layout.global_positions[_slots(k)])]
        np.testing.assert_array_equal(band_lists.dense(geometry.bands(q, k), *expected.shape), expected)


@given(st.sets(st.integers(0, 30)))
def test_sets_of_atoms(members: set[int]) -> None:
    atoms = Geometry(causal(31), make_layout("contiguous", 31, 1)).atoms(range(32), {0, 2, 5}, {0, 1})
    bits = sum(1 << member for member in members)
    ranges = atoms.ranges(bits)
    assert _slots(ranges) == sorted(members) == atoms.members(bits)
    assert atoms.bits(ranges) == bits
    assert list(atoms.heads((0, 5), kv=False)) == [0, 1]
    assert list(atoms.heads((0, 1), kv=True)) == [0]


def test_sets_of_atoms_refuse_ranges_out_of_order() -> None:
    atoms = Geometry(causal(9), make_layout("contiguous", 9, 1)).atoms(range(10), {0, 1}, {0, 1})
    for ranges in (((4, 6), (0, 2)), ((0, 4), (3, 6)), ((5, 3),)):
        with pytest.raises(ValueError, match="sorted and disjoint"):
            atoms.bits(ranges)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="mask of 8 and a layout of 9 tokens"):
        Geometry(causal(8), make_layout("zigzag", 9, 2))


def test_normalise_and_stretches() -> None:
    assert normalise([(5, 7), (0, 2), (2, 3), (4, 4), (6, 9)]) == ((0, 3), (5, 9))
    assert stretches([1, 1, 2, 1]) == [(0, 2), (2, 3), (3, 4)]
    assert stretches([]) == []
