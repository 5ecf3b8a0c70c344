"""Every schedule, emulated, against dense attention in float64: masks x shapes x ranks at tiny prime sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from longspan.attention import masks
from longspan.attention.kernels import pick
from longspan.context.check import ScheduleError
from longspan.context.emulate import emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.methods.ring import ring, zigzag_ring
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Block, Phase
from longspan.layout.tokens import make_layout
from tests.context import prototypes
from tests.context.cases import LAYOUTS, MASKS, SHAPES, assert_equal, emulated, inputs
from tests.oracles.attention import dense_attention


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("mask", MASKS)
def test_ring_is_exact(mask: str, world: int) -> None:
    """Masks x shapes x ranks, on layouts that take turns so that each layout meets every mask, shape and rank count."""
    turn = world + list(MASKS).index(mask)
    for number, layout in enumerate(LAYOUTS):
        build = zigzag_ring if layout == "zigzag" else ring
        for h, g in (SHAPES[(2 * number + turn + i) % len(SHAPES)] for i in range(2)):
            assert_equal(*emulated(build, MASKS[mask](23), make_layout(layout, 23, world), h, g))
    # Fewer tokens than ranks for most worlds.
    layout = LAYOUTS[turn % len(LAYOUTS)]
    assert_equal(*emulated(ring, MASKS[mask](5), make_layout(layout, 5, world), *SHAPES[-1]))


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("name", ["token_ring", "ulysses", "burst", "double_ring"])
def test_prototypes_are_exact(name: str, world: int) -> None:
    if name == "double_ring" and world % 2:
        pytest.skip("two windows need an even number of ranks")
    build = getattr(prototypes, name)
    for number, (mask, (h, g)) in enumerate(itertools.product(MASKS, SHAPES)):
        layout = LAYOUTS[(number + number // len(SHAPES) + world) % len(LAYOUTS)]
        assert_equal(*emulated(build, MASKS[mask](23), make_layout(layout, 23, world), h, g))


@pytest.mark.parametrize("world", range(1, 9))
def test_light_seq_is_exact_on_causal(world: int) -> None:
    for s, (h, g) in itertools.product((7, 23), SHAPES):
        assert_equal(*emulated(prototypes.light_seq, masks.causal(s), make_layout("contiguous", s, world), h, g))


def test_light_seq_is_refused_on_a_full_mask() -> None:
    with pytest.raises(ScheduleError, match="computed 0 times"):
        emulated(prototypes.light_seq, masks.full(12), make_layout("contiguous", 12, 4), 1, 1)


def test_softcap() -> None:
    assert_equal(*emulated(ring, masks.causal(11), make_layout("zigzag", 11, 3), 4, 2, softcap=2.0))


def test_a_wrong_method_fails() -> None:
    """The oracle bites: computing with one block's keys replaced, or without merging, is noticed."""
    mask, layout = masks.causal(11), make_layout("contiguous", 11, 2)

    def wrong(layout, h, g):
        schedule = ring(layout, h, g)
        blocks = tuple(
            Block(b.step, b.rank, b.q, ((0, 3),), b.heads) if b.step == 1 and b.rank == 1 else b
            for b in schedule.forward.blocks
        )
        return replace(schedule, forward=Phase(schedule.forward.moves, blocks))

    with pytest.raises(ScheduleError):
        emulated(wrong, mask, layout, 1, 1)
    geometry = Geometry(mask, layout)
    schedule = prune_schedule(wrong(layout, 1, 1), geometry)
    q, k, v, dout = inputs(11, 1, 1)
    got = emulate(schedule, geometry, q, k, v, Settings(pick(q, softcap=None, name="reference"), 1.0, None))
    out = dense_attention(q, k, v, dout, mask.dense().numpy(), scale=1.0).out
    assert np.abs(got.out.numpy() - out).max() > 1e-3
