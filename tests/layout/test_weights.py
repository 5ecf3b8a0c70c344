"""Shares of heads, channels and words: every one on some rank, parts as equal as can be."""

from __future__ import annotations

import pytest

from longspan.layout.weights import heads, share


def test_shares_tile_and_differ_by_one() -> None:
    for total in range(0, 40):
        for parts in range(1, 9):
            found = [share(total, parts, part) for part in range(parts)]
            assert [i for part in found for i in part] == list(range(total))
            sizes = [len(part) for part in found]
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2), (7, 1), (6, 3), (10, 5), (9, 3), (12, 4)])
def test_every_query_head_reads_its_own_kv_head(num_heads: int, num_kv_heads: int) -> None:
    group = num_heads // num_kv_heads
    for parts in range(1, num_heads + 1):
        found = [heads(num_heads, num_kv_heads, parts, part) for part in range(parts)]
        assert [head for own in found for head in own.query] == list(range(num_heads))
        assert {head for own in found for head in own.kv} == set(range(num_kv_heads))
        assert all(own.shared == (num_kv_heads < parts) for own in found)
        for own in found:
            plain = len(own.query) // len(own.kv)
            reads = own.expand or [i // plain for i in range(len(own.query))]
            assert [own.kv.start + i for i in reads] == [head // group for head in own.query]
            assert len(own.query) % own.num_kv_heads == 0


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="a query head for every rank, got 3 heads on 4 ranks"):
        heads(3, 3, 4, 0)
