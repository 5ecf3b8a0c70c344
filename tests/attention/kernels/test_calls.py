"""Plans of library calls: they cover the allowed pairs exactly once, and are few."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import masks
from longspan.attention.bands import Band, coalesce, cut, dense
from longspan.attention.kernels import calls
from longspan.attention.kernels.calls import Call, plan_calls, plan_windows, window

SIZE = 23


def pairs(call: Call) -> np.ndarray:
    """What the library computes for a call, by its own definition of the call's kind."""
    num_q, num_k = call.q1 - call.q0, call.k1 - call.k0
    i, j = np.arange(num_q)[:, None], np.arange(num_k)[None, :]
    if call.kind == "full":
        return np.ones((num_q, num_k), dtype=bool)
    if call.kind == "causal":
        assert num_q == num_k  # where top-left and bottom-right aligned are the same
        return j <= i
    if call.kind == "masked":
        return dense(call.bands, num_q, num_k)
    left, right = window(call)
    corner = num_k - num_q
    assert left >= -1 and right >= -1
    return ((j - i >= corner - left) | (left < 0)) & ((j - i <= corner + right) | (right < 0))


def check(bands, plan: tuple[Call, ...]) -> None:
    count, touched = np.zeros((SIZE, SIZE), dtype=int), np.zeros(SIZE, dtype=bool)
    for call in plan:
        assert not (call.fresh and touched[call.q0 : call.q1].any())
        count[call.q0 : call.q1, call.k0 : call.k1] += pairs(call)
        touched[call.q0 : call.q1] = True
    np.testing.assert_array_equal(count, dense(bands, SIZE, SIZE).astype(int))


@given(st.data())
def test_every_allowed_pair_is_in_exactly_one_call(data) -> None:
    edge = st.integers(0, SIZE)
    pieces: list[Band] = []
    columns = sorted({0, SIZE, *data.draw(st.lists(edge, max_size=3))})
    for k0, k1 in pairwise(columns):
        q0, q1 = sorted((data.draw(edge), data.draw(edge)))
        lo = data.draw(st.integers(-SIZE, SIZE))
        pieces.append(Band(q0, q1, k0, k1, lo, lo + data.draw(st.integers(0, SIZE))))
    bands = coalesce(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "TILE_ROWS", data.draw(st.sampled_from([1, 3, 64])))
        patch.setattr(calls, "MAX_MASK", data.draw(st.sampled_from([4, 30, 1 << 19])))
        patch.setattr(calls, "CALL_PAIRS", data.draw(st.sampled_from([0, 20, 2048])))
        plan_calls.cache_clear()
        check(bands, plan_calls(bands))
    plan_calls.cache_clear()
    check(bands, plan_windows(bands))
    check(bands, plan_windows(bands, 1))
    check(bands, plan_windows(bands, 6))


def test_common_masks_are_few_calls() -> None:
    assert [call.kind for call in plan_calls(masks.causal(4096).bands)] == ["causal"]
    assert [call.kind for call in plan_calls(masks.full(4096).bands)] == ["full"]
    assert [call.kind for call in plan_calls(masks.documents([1500, 2596]).bands)] == ["causal"] * 2
    later = cut(masks.causal(4096).bands, (2048, 4096), (1024, 4096))
    assert sorted(call.kind for call in plan_calls(later)) == ["causal", "full"]
    assert len(plan_calls(masks.sliding_window(4096, 1024, 0).bands)) <= 1 + 3072 // calls.TILE_ROWS
    assert len(plan_calls(masks.documents([3] * 1000).bands)) < 200
    for mask in (masks.causal(4096), masks.sliding_window(4096, 1024, 7), masks.from_bands([(0, 9, 0, 9, 3, 4)], 9)):
        assert [call.kind for call in plan_windows(mask.bands)] == ["window"]


def test_no_mask_is_larger_than_a_tile() -> None:
    for mask in (
        masks.sliding_window(60_000, 30_000, 20_000),
        masks.from_bands([(0, 60_000, 0, 60_000, 9, 60_000)], 60_000),
    ):
        plan = plan_calls(mask.bands)
        area = [(call.q1 - call.q0) * (call.k1 - call.k0) for call in plan if call.kind == "masked"]
        assert max(area) <= calls.MAX_MASK
        assert sum((c.q1 - c.q0) * (c.k1 - c.k0) / (2 if c.kind == "causal" else 1) for c in plan) < 1.02 * mask.area
