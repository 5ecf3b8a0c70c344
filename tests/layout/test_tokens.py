"""Token layouts hold every token once, invert, are even, and refuse what is not a layout."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from longspan.layout.tokens import LAYOUTS, Layout, Segment, even_split, make_layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_length_and_world(name: str) -> None:
    for s in range(1, 41):
        for world in range(1, 10):
            layout = make_layout(name, s, world)
            assert (layout.num_tokens, layout.world) == (s, world)
            parts = [layout.positions(rank) for rank in range(world)]
            assert sorted(np.concatenate(parts).tolist()) == list(range(s))
            assert {len(part) for part in parts} <= {s // world, -(-s // world)}
            assert layout.local_sizes == tuple(map(len, parts))
            everything = np.arange(s)
            np.testing.assert_array_equal(layout.global_positions[layout.slots], everything)
            np.testing.assert_array_equal(layout.slots[layout.global_positions], everything)
            for rank, part in enumerate(parts):
                start, stop = layout.owned(rank)
                np.testing.assert_array_equal(layout.slots[part], np.arange(start, stop))
            slots = [
                (placed.slot + i, segment.start + i * segment.step)
                for placed in layout.placed
                for segment in (placed.segment,)
                for i in range(segment.num_tokens)
            ]
            assert slots == list(enumerate(layout.global_positions.tolist()))


def test_who_holds_what() -> None:
    def held(name: str) -> list[list[int]]:
        layout = make_layout(name, 11, 3)
        return [layout.positions(rank).tolist() for rank in range(3)]

    assert held("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert held("striped") == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    # Parts r and 5 - r of 6: [0 1] [2 3] [4 5] [6] [7 8] [9 10] would overload; each rank's odd token comes early.
    zigzag = held("zigzag")
    assert [len(part) for part in zigzag] == [4, 4, 3]
    assert zigzag[0][0] == 0 and zigzag[0][-1] == 10
    for part in zigzag:
        assert part == sorted(part)
        assert sum(b - a > 1 for a, b in pairwise(part)) <= 1


def test_zigzag_balances_a_causal_mask() -> None:
    for world in (2, 4, 8):
        layout = make_layout("zigzag", 32 * world, world)
        work = [int((layout.positions(rank) + 1).sum()) for rank in range(world)]
        assert max(work) == min(work)


def test_equal_layouts_are_equal_values() -> None:
    first, second = make_layout("zigzag", 23, 4), make_layout("zigzag", 23, 4)
    assert first == second and hash(first) == hash(second) and first.fingerprint == second.fingerprint
    assert first.fingerprint != make_layout("zigzag", 24, 4).fingerprint
    assert first.fingerprint != make_layout("contiguous", 23, 4).fingerprint


def test_even_split() -> None:
    assert even_split(7, 3) == [3, 2, 2]
    assert even_split(0, 3) == [0, 0, 0]
    assert even_split(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (((Segment(0, 1, 2),), (Segment(3, 1, 2),)), "every position exactly once"),
        (((Segment(0, 1, 3),), (Segment(2, 1, 2),)), "every position exactly once"),
        (((Segment(1, 1, 2),), (Segment(3, 1, 2),)), "every position exactly once"),
        (((Segment(0, 1, 3), Segment(3, 1, -1)), (Segment(3, 1, 2),)), "0 tokens or more"),
        (((Segment(0, 1, 4),), (Segment(4, 1, 2),)), "floor"),
        (((Segment(0, 2, 2),), (Segment(1, 1, 1), Segment(3, 1, 1))), "one step"),
        (((Segment(1, -1, 2),), (Segment(2, 1, 2),)), "positive steps"),
        ((), "at least one rank"),
    ],
)
def test_what_is_not_a_layout_is_refused(ranks, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Layout("odd", ranks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("spiral", 8, 2), "unknown layout 'spiral'; known: contiguous, zigzag, striped"),
        (("zigzag", 0, 2), "at least one token and one rank, got 0 tokens, 2 ranks"),
        (("zigzag", 8, 0), "at least one token and one rank, got 8 tokens, 0 ranks"),
    ],
)
def test_make_layout_refuses(args: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layout(*args)
