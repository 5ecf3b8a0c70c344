"""Band algebra against element-wise predicates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import bands as bd
from longspan.attention.bands import Band

SIZE = 13


@st.composite
def a_band(draw, size: int = SIZE) -> Band:
    q0, q1 = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    k0, k1 = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    lo, hi = sorted((draw(st.integers(-size, size)), draw(st.integers(-size, size))))
    return Band(q0, q1, k0, k1, lo, hi)


def predicate(band: Band, num_q: int = SIZE, num_k: int = SIZE) -> np.ndarray:
    """Written from the definition, one pair at a time."""
    out = np.zeros((num_q, num_k), dtype=bool)
    for q in range(num_q):
        for k in range(num_k):
            out[q, k] = band.q0 <= q < band.q1 and band.k0 <= k < band.k1 and band.lo <= k - q <= band.hi
    return out


@given(a_band())
def test_area_tighten_and_dense(band: Band) -> None:
    allowed = predicate(band)
    assert bd.area(band) == allowed.sum()
    np.testing.assert_array_equal(bd.dense((band,), SIZE, SIZE), allowed)
    tight = bd.tighten(band)
    if tight is None:
        assert not allowed.any()
        return
    np.testing.assert_array_equal(predicate(tight), allowed)
    q, k = np.nonzero(allowed)
    assert (tight.q0, tight.q1) == (q.min(), q.max() + 1)
    assert (tight.k0, tight.k1) == (k.min(), k.max() + 1)
    assert (tight.lo, tight.hi) == ((k - q).min(), (k - q).max())


@given(a_band(), st.integers(0, SIZE), st.integers(0, SIZE), st.integers(0, SIZE), st.integers(0, SIZE))
def test_cut_shift_transpose(band: Band, a: int, b: int, c: int, d: int) -> None:
    q, k = (min(a, b), max(a, b)), (min(c, d), max(c, d))
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[q[0] : q[1], k[0] : k[1]] = True
    parts = bd.cut((band,), q, k)
    np.testing.assert_array_equal(bd.dense(parts, SIZE, SIZE), predicate(band) & inside)
    local = bd.shift(parts, -q[0], -k[0])
    expected = (predicate(band) & inside)[q[0] : q[1], k[0] : k[1]]
    np.testing.assert_array_equal(bd.dense(local, q[1] - q[0], k[1] - k[0]), expected)
    np.testing.assert_array_equal(bd.dense(bd.transpose((band,)), SIZE, SIZE), predicate(band).T)


@given(a_band(), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_stride(band: Band, step: int, q_start: int, k_start: int) -> None:
    expected = predicate(band)[q_start::step, k_start::step]
    got = bd.stride((band,), (q_start, step), (k_start, step))
    np.testing.assert_array_equal(bd.dense(got, *expected.shape), expected)


@given(st.lists(a_band(), max_size=5))
def test_overlap_and_coalesce(bands: list[Band]) -> None:
    counts = sum((predicate(b).astype(int) for b in bands), np.zeros((SIZE, SIZE), dtype=int))
    assert (bd.overlap(bands) is not None) == bool((counts > 1).any())
    if (counts <= 1).all():
        fewer = bd.coalesce(bands)
        assert len(fewer) <= len(bands)
        merged = sum((predicate(b).astype(int) for b in fewer), np.zeros((SIZE, SIZE), dtype=int))
        np.testing.assert_array_equal(merged, counts)


def test_zigzag_diagonal_block_becomes_one_causal_band() -> None:
    parts = (Band(0, 4, 0, 4, -3, 0), bd.rectangle(4, 9, 0, 4), Band(4, 9, 4, 9, -4, 0))
    assert bd.coalesce(parts) == (Band(0, 9, 0, 9, -8, 0),)


def test_unequal_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="one positive step"):
        bd.stride((Band(0, 4, 0, 4, -3, 0),), (0, 2), (0, 3))
