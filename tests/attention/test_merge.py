"""Merging of partial softmax: any split of the keys gives the dense result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention.merge import Placed, accumulator, merge, merge_, merge_into
from tests.oracles.attention import dense_attention


def parts_of(allowed: np.ndarray, groups: list[np.ndarray], seed: int = 0, big: float = 1.0):
    """The dense result, and one (out, lse) for each group of keys."""
    rng = np.random.default_rng(seed)
    num_q, num_k = allowed.shape
    q, k, v = (rng.normal(size=(2, n, 3, 5)) for n in (num_q, num_k, num_k))
    results = []
    for keys in [np.arange(num_k), *groups]:
        got = dense_attention(big * q, k[:, keys], v[:, keys], q, allowed[:, keys])
        results.append((torch.from_numpy(got.out), torch.from_numpy(got.lse)))
    return results[0], results[1:]


@given(st.integers(1, 11), st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_any_split_of_the_keys_merges_to_dense(num_q: int, group_of: list[int], seed: int) -> None:
    allowed = np.random.default_rng(seed).random((num_q, len(group_of))) < 0.6
    groups = [np.flatnonzero(np.array(group_of) == i) for i in range(4)]  # some of them empty
    (out, lse), parts = parts_of(allowed, groups, seed, big=8.0)
    got_out, got_lse = merge(parts)
    torch.testing.assert_close(got_out, out, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-12)
    empty = ~torch.from_numpy(allowed.any(axis=1))
    assert (got_lse[:, :, empty] == -torch.inf).all() and (got_out[:, empty] == 0).all()


def test_float32_sums_take_16_bit_parts_through_views() -> None:
    allowed = np.ones((7, 6), dtype=bool)
    (out, lse), parts = parts_of(allowed, [np.arange(2), np.arange(2, 6)])
    whole, whole_lse = torch.full((2, 9, 3, 5), 7.0), torch.full((2, 3, 9), 7.0)
    whole[:, 1:8] = parts[0][0].float()
    whole_lse[:, :, 1:8] = parts[0][1].float()
    merge_(whole[:, 1:8], whole_lse[:, :, 1:8], parts[1][0].bfloat16(), parts[1][1].float())
    torch.testing.assert_close(whole[:, 1:8].double(), out, rtol=0, atol=1e-2)
    torch.testing.assert_close(whole_lse[:, :, 1:8].double(), lse, rtol=0, atol=1e-6)
    assert (whole[:, [0, 8]] == 7).all() and (whole_lse[:, :, [0, 8]] == 7).all()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_small_share_of_large_values_keeps_its_digits(order: tuple[int, int]) -> None:
    """As a row's own few keys beside thousands of others: 1 - weight instead of the weight was wrong by 1e-6 here."""
    values = torch.Generator().manual_seed(0)
    large = (4 * torch.randn(1, 99, 1, 5, generator=values), torch.rand(1, 1, 99, generator=values))
    small = (0.02 * torch.randn(1, 99, 1, 5, generator=values), 9 + torch.rand(1, 1, 99, generator=values))
    parts = [(large, small)[i] for i in order]
    out, lse = merge(parts)
    exact, exact_lse = merge((out.double(), lse.double()) for out, lse in parts)
    assert (out - exact).abs().max() < 2e-8
    assert (lse - exact_lse).abs().max() < 1e-6


def test_parts_are_left_alone() -> None:
    _, parts = parts_of(np.ones((3, 4), dtype=bool), [np.arange(1), np.arange(1, 4)])
    before = [(out.clone(), lse.clone()) for out, lse in parts]
    merge(parts)
    merge(parts[:1])[0].zero_()
    for (out, lse), (old_out, old_lse) in zip(parts, before, strict=True):
        assert torch.equal(out, old_out) and torch.equal(lse, old_lse)


def test_a_nan_of_an_input_is_not_hidden() -> None:
    _, parts = parts_of(np.ones((3, 4), dtype=bool), [np.arange(1), np.arange(1, 4)])
    parts[1][0][0, 1, 0, 0] = torch.nan
    parts[1][1][0, 0, 1] = torch.nan
    out, lse = merge(parts)
    assert out[0, 1, 0, 0].isnan() and lse[0, 0, 1].isnan() and int(lse.isnan().sum()) == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one partial result"):
        merge([])
    half = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"out torch.bfloat16"):
        merge_(half, torch.zeros(1, 1, 2), half, torch.zeros(1, 1, 2))
    assert accumulator(torch.bfloat16) == accumulator(torch.float32) == torch.float32
    assert accumulator(torch.float64) == torch.float64


def test_a_sum_without_weights_is_not_the_merge() -> None:
    (out, _), parts = parts_of(np.ones((3, 4), dtype=bool), [np.arange(1), np.arange(1, 4)])
    assert (parts[0][0] + parts[1][0] - out).abs().max() > 0.1
    assert ((parts[0][0] + parts[1][0]) / 2 - out).abs().max() > 0.1


def placed_parts(num: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Placed]:
    """Partial results of some rows and heads of 9 tokens and 4 heads, the first of all of them; some rows empty."""
    draw, parts = np.random.default_rng(seed), []
    for number in range(num):
        (t0, t1), (h0, h1) = (sorted(draw.choice(n + 1, 2, replace=False)) if number else (0, n) for n in (9, 4))
        lse = 5 * draw.normal(size=(2, h1 - h0, t1 - t0))
        lse[draw.random(lse.shape) < 0.2] = -np.inf
        out = draw.normal(size=(2, t1 - t0, h1 - h0, 8)) * (lse > -np.inf).swapaxes(1, 2)[..., None]
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        data = torch.from_numpy(out).to(device, dtype), torch.from_numpy(lse).to(device, sums)
        parts.append(Placed(*data, int(t0), int(h0)))
    return parts


def merged_one_by_one(parts: list[Placed]) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = (x.double().cpu().clone() for x in parts[0][:2])
    for part in parts[1:]:
        tokens, heads = slice(part.token, None), slice(part.head, None)
        _, num_tokens, num_heads, _ = part.out.shape
        rows, row_lse = out[:, tokens, heads], lse[:, heads, tokens]
        more = part.out.double().cpu(), part.lse.double().cpu()
        merge_(rows[:, :num_tokens, :num_heads], row_lse[:, :num_heads, :num_tokens], *more)
    return out, lse


@pytest.mark.parametrize("num", [1, 2, 3, 7])
@pytest.mark.parametrize("in_place", [False, True])
def test_placed_parts_merge_as_one_by_one(num: int, in_place: bool) -> None:
    for seed in range(10):
        parts = placed_parts(num, seed)
        expected = merged_one_by_one(parts)
        out, lse = parts[0][:2] if in_place else (torch.full((2, 9, 4, 8), 7.0), torch.full((2, 4, 9), 7.0).double())
        merge_into(out, lse, parts)
        torch.testing.assert_close((out.double(), lse), expected, rtol=0, atol=1e-12 if in_place else 1e-6)
