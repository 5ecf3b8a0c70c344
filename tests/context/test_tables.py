"""Closed-form tables against those of the pruned schedules: the same blocks, pieces and moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.masks import Mask
from longspan.context.choose import CANDIDATES, layout_of
from longspan.context.estimate import Table, tabulate
from longspan.context.geometry import Geometry
from longspan.context.methods import builder, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.tables import World
from longspan.layout.tokens import Layout
from tests.context.cases import MASKS
from tests.context.test_local import LAYOUTS, band_masks


def rows(table: np.ndarray) -> list[tuple]:
    return sorted(map(tuple, table.tolist()))


def in_full(table: Table) -> tuple[list, list]:
    """Blocks, each with its pieces, and moves, each with its rows and completeness; in an order of their own."""
    pieces: dict[int, list] = {}
    for shape, *piece in table.pieces.tolist():
        pieces.setdefault(shape, []).append(tuple(piece))
    blocks = [
        (*block, *sorted(pieces.get(shape, ())))
        for block, shape in zip(table.blocks.tolist(), table.shapes.tolist(), strict=True)
    ]
    return sorted(blocks), rows(np.column_stack([table.moves, table.rows, table.complete]))


def assert_equal_tables(mask: Mask, layout: Layout, h: int, g: int, names: tuple[str, ...] = CANDIDATES) -> None:
    geometry = Geometry(mask, layout)
    world = World(geometry, h, g)
    for name in names:
        tables = None if reason_against(name, mask, layout) else world.table(name)
        if tables is None:
            continue
        schedule = prune_schedule(builder(name, layout.world)(layout, h, g), geometry)
        for backward, mine in enumerate(tables):
            expected = tabulate(schedule, geometry, backward=bool(backward))
            assert in_full(mine)[0] == in_full(expected)[0], (name, backward)
            assert in_full(mine)[1] == in_full(expected)[1], (name, backward)
            assert mine.num_steps == expected.num_steps


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", CANDIDATES)
def test_tables_equal_those_of_the_schedule(name: str, mask_name: str, layout_name: str) -> None:
    for num_tokens, world, h, g in ((31, 2, 4, 2), (37, 3, 3, 3), (53, 4, 8, 2), (64, 6, 6, 3), (6, 8, 16, 4)):
        mask = MASKS[mask_name](num_tokens)
        assert_equal_tables(mask, layout_of(layout_name, mask, world), h, g, (name,))


@settings(max_examples=40, deadline=None)
@given(
    mask=band_masks(),
    world=st.integers(2, 12),
    layout_name=st.sampled_from(LAYOUTS),
    heads=st.sampled_from([(8, 2), (3, 1), (6, 6)]),
)
def test_any_mask(mask: Mask, world: int, layout_name: str, heads: tuple[int, int]) -> None:
    assert_equal_tables(mask, layout_of(layout_name, mask, world), *heads)
