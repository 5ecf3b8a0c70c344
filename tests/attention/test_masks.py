"""Masks against predicates of one pair, and what a mask refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import masks
from longspan.attention.bands import Band, rectangle
from tests.oracles import masks as oracle

lengths_of = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@pytest.mark.parametrize("s", [1, 2, 13])
def test_full_and_causal(s: int) -> None:
    np.testing.assert_array_equal(masks.full(s).dense(), oracle.full(s))
    np.testing.assert_array_equal(masks.causal(s).dense(), oracle.causal(s))
    assert masks.full(s).area == s * s
    assert masks.causal(s).area == s * (s + 1) // 2


@given(lengths_of)
def test_documents(lengths: list[int]) -> None:
    s = sum(lengths)
    np.testing.assert_array_equal(masks.documents(lengths).dense(), oracle.causal_document(s, lengths))
    np.testing.assert_array_equal(masks.documents(lengths, causal=False).dense(), oracle.full_document(s, lengths))


@given(st.integers(1, 13), st.integers(0, 15), st.integers(0, 15))
def test_windows_and_prefix(s: int, left: int, right: int) -> None:
    mask = masks.sliding_window(s, left, right)
    np.testing.assert_array_equal(mask.dense(), oracle.sliding_window(s, left, right))
    assert mask.area == int(mask.dense().sum())
    prefix = min(left, s)
    np.testing.assert_array_equal(masks.prefix_lm(s, prefix).dense(), oracle.prefix_lm(s, prefix))


def test_equal_bands_make_equal_masks() -> None:
    a = masks.documents([5, 8])
    b = masks.from_bands(reversed(a.bands), 13)
    loose = masks.from_bands([(0, 5, 0, 5, -99, 0), (5, 13, 5, 13, -99, 0), (3, 3, 0, 1, 0, 0)], 13)
    assert a == b == loose and hash(a) == hash(b) == hash(loose) and len({a, b, loose}) == 1
    assert a.fingerprint == b.fingerprint == loose.fingerprint
    others = [masks.documents([6, 7]), masks.documents([5, 8], causal=False), masks.documents([5, 8, 1])]
    assert len({a.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_fingerprint_is_the_same_on_every_machine() -> None:
    assert masks.documents([5, 8]).fingerprint == "d7f99175db0822cb"


def test_overlap_names_both_bands() -> None:
    bands = [Band(0, 6, 0, 6, -5, 0), rectangle(6, 9, 0, 9), Band(4, 7, 2, 5, -9, 9)]
    with pytest.raises(ValueError, match=r"disjoint.*\(0, 6, 0, 6, -5, 0\).*\(4, 7, 2, 5") as error:
        masks.from_bands(bands, 9)
    assert "\n" not in str(error.value)
    masks.from_bands([Band(0, 6, 0, 6, -5, 0), Band(0, 6, 0, 6, 1, 5)], 6)  # one rectangle, but disjoint diagonals


@given(st.data())
def test_overlap_is_found_exactly(data) -> None:
    edge = st.integers(0, 9)
    bands = []
    for _ in range(data.draw(st.integers(1, 6))):
        (q0, q1), (k0, k1) = sorted((data.draw(edge), data.draw(edge))), sorted((data.draw(edge), data.draw(edge)))
        lo = data.draw(st.integers(-9, 9))
        bands.append(Band(q0, q1, k0, k1, lo, lo + data.draw(st.integers(-1, 6))))
    count = np.zeros((9, 9), dtype=int)
    for b in bands:
        count += oracle.dense(9, lambda q, k, b=b: b.q0 <= q < b.q1 and b.k0 <= k < b.k1 and b.lo <= k - q <= b.hi)
    if count.max() > 1:
        with pytest.raises(ValueError, match="disjoint"):
            masks.from_bands(bands, 9)
    else:
        np.testing.assert_array_equal(masks.from_bands(bands, 9).dense(), count.astype(bool))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: masks.full(0), "at least 1 token, got num_tokens=0"),
        (lambda: masks.documents([]), "got none"),
        (lambda: masks.documents([3, 0]), "a document of 0"),
        (lambda: masks.sliding_window(5, -1, 0), "left=-1"),
        (lambda: masks.prefix_lm(5, 6), "5 tokens, got 6"),
        (lambda: masks.from_bands([(0, 5, 0, 6, -9, 9)], 5), r"within 0..5, got \(0, 5, 0, 6"),
        (lambda: masks.from_bands([(-1, 5, 0, 5, -9, 9)], 5), "within 0..5"),
        (lambda: masks.from_bands([(0, 4, 0, 4, -1.5, 0)], 4), "six whole numbers"),  # pyright: ignore
    ],
)
def test_refusals_are_one_line(make, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        make()
    assert "\n" not in str(error.value)


def test_thousands_of_bands_are_checked_quickly() -> None:
    def seconds(make) -> float:
        times = []
        for _ in range(3):
            start = time.thread_time()
            make()
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(lambda: masks.documents([7] * 5000)) < 0.2  # about 20 ms; the bound is for a busy machine
    columns = [rectangle(0, 3000, i, i + 1) for i in range(3000)]
    assert seconds(lambda: masks.from_bands(columns, 3000)) < 0.2
    tiles = [rectangle(i, i + 10, j, j + 10) for i in range(0, 500, 10) for j in range(0, 500, 10)]
    assert seconds(lambda: masks.from_bands(tiles, 500)) < 0.4
    with pytest.raises(ValueError, match="disjoint"):
        masks.from_bands([*tiles, Band(17, 18, 488, 489, 400, 500)], 500)
