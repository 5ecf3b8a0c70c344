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
from longspan.context.methods import METHODS, builder
from longspan.context.methods.ring import ring
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Block, Phase
from longspan.layout.tokens import make_layout
from tests.context.cases import LAYOUTS, MASKS, SHAPES, assert_equal, emulated, inputs
from tests.oracles.attention import dense_attention


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("mask", MASKS)
def test_ring_is_exact(mask: str, world: int) -> None:
    """Masks x shapes x ranks, on layouts that take turns so that each layout meets every mask, shape and rank count."""
    turn = world + list(MASKS).index(mask)
    for number, layout in enumerate(LAYOUTS):
        for h, g in (SHAPES[(2 * number + turn + i) % len(SHAPES)] for i in range(2)):
            assert_equal(*emulated(ring, MASKS[mask](23), make_layout(layout, 23, world), h, g))
    # Fewer tokens than ranks for most worlds.
    layout = LAYOUTS[turn % len(LAYOUTS)]
    assert_equal(*emulated(ring, MASKS[mask](5), make_layout(layout, 5, world), *SHAPES[-1]))


ANY_MASK = [name for name in METHODS if name not in ("ring", "light_seq", "distributed_mha")]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, *(pytest.param(w, marks=pytest.mark.slow) for w in (6, 7, 8))])
@pytest.mark.parametrize("name", ANY_MASK)
def test_methods_are_exact(name: str, world: int) -> None:
    """Every method on every mask and shape; layouts take turns."""
    build = builder(name, world)
    for number, (mask, (h, g)) in enumerate(itertools.product(MASKS, SHAPES)):
        layout = LAYOUTS[(number + number // len(SHAPES) + world) % len(LAYOUTS)]
        assert_equal(*emulated(build, MASKS[mask](23), make_layout(layout, 23, world), h, g))
    assert_equal(*emulated(build, MASKS["causal"](5), make_layout("contiguous", 5, world), *SHAPES[-1]))


@pytest.mark.parametrize(("name", "world"), [("usp:2", 8), ("usp:3", 6), ("usp:6", 6), ("double_ring:3", 6)])
def test_degrees_are_exact(name: str, world: int) -> None:
    for mask, (h, g) in itertools.product(("causal", "documents", "holes"), SHAPES):
        assert_equal(*emulated(builder(name, world), MASKS[mask](23), make_layout("zigzag", 23, world), h, g))


@pytest.mark.parametrize("name", ["ulysses+burst", "usp+descending", "mask_aware+ulysses", "ring+token_ring"])
def test_one_forward_with_another_backward_is_exact(name: str) -> None:
    for number, (mask, world) in enumerate(itertools.product(MASKS, (1, 3, 4))):
        layout = make_layout(LAYOUTS[number % 3], 23, world)
        assert_equal(*emulated(builder(name, world), MASKS[mask](23), layout, *SHAPES[number % len(SHAPES)]))
    layout = make_layout("contiguous", 24, 4)
    schedule = prune_schedule(builder(name, 4)(layout, 4, 2), Geometry(masks.full(24), layout))
    assert not any(move.kept for move in schedule.forward.moves)


@pytest.mark.parametrize("world", range(1, 9))
def test_light_seq_is_exact_on_masks_that_look_back(world: int) -> None:
    layouts = [make_layout("contiguous", s, world) for s in (7, 23)]
    for layout, (h, g) in itertools.product(layouts, SHAPES):
        s = layout.num_tokens
        for mask in (masks.causal(s), masks.documents([s - 3, 3]), masks.sliding_window(s, 4, 0)):
            assert METHODS["light_seq"].reason_against(mask, layout) is None
            assert_equal(*emulated(METHODS["light_seq"].build, mask, layout, h, g))


def test_light_seq_refuses_what_it_cannot_compute() -> None:
    light_seq, layout = METHODS["light_seq"], make_layout("contiguous", 12, 4)
    assert "later shards" in (light_seq.reason_against(masks.full(12), layout) or "")
    assert "later shards" in (light_seq.reason_against(masks.sliding_window(12, 2, 1), layout) or "")
    assert "contiguous" in (light_seq.reason_against(masks.causal(12), make_layout("zigzag", 12, 4)) or "")
    # Documents that end with the shards look ahead, but not into later shards.
    assert light_seq.reason_against(masks.documents([3, 3, 3, 3], causal=False), layout) is None
    with pytest.raises(ScheduleError, match="computed 0 times"):
        emulated(light_seq.build, masks.full(12), layout, 1, 1)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("usp:3", "must divide the 4 ranks"),
        ("usp:0", "must divide the 4 ranks"),
        ("usp:x", "must divide the 4 ranks"),
        ("ring:2", "takes no degree"),
        ("ring+usp:3", "must divide the 4 ranks"),
        ("ring+rings", "unknown context-parallel method"),
        ("rings", "unknown context-parallel method"),
    ],
)
def test_unfit_methods_are_refused(name: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        builder(name, 4)


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
