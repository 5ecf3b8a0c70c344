"""Every schedule, emulated, against dense attention in float64: masks x shapes x ranks at tiny prime sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from longspan.attention import masks
from longspan.attention.kernels import pick
from longspan.context.check import ScheduleError, check
from longspan.context.emulate import emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.methods.ring import ring
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Block, Phase
from longspan.layout.tokens import make_layout
from tests.context import prototypes
from tests.oracles.dense import dense_attention

MASKS = {
    "full": lambda s: masks.full(s),
    "causal": lambda s: masks.causal(s),
    "documents": lambda s: masks.documents([s // 3, s // 5, s - s // 3 - s // 5], causal=True),
    "window": lambda s: masks.sliding_window(s, 3, 1),
    "prefix": lambda s: masks.prefix_lm(s, s // 4),
    # Rows without keys, and keys that nobody reads.
    "holes": lambda s: masks.from_bands([(2, s // 2, 1, s // 3, -s, s), (s // 2 + 1, s, s // 2, s, -s, 0)], s),
}
SHAPES = [(1, 1), (2, 1), (3, 3), (6, 3)]  # query heads, KV heads
LAYOUTS = ("contiguous", "zigzag", "striped")


def inputs(s: int, h: int, g: int, dtype=torch.float64, d: int = 3, b: int = 2):
    generator = torch.Generator().manual_seed(s * 100 + h * 10 + g)
    return [torch.randn(b, s, heads, d, generator=generator, dtype=torch.float64).to(dtype) for heads in (h, g, g, h)]


def emulated(build, mask, layout, h, g, softcap=None):
    q, k, v, dout = inputs(mask.num_tokens, h, g)
    geometry = Geometry(mask, layout)
    schedule = prune_schedule(build(layout, h, g), geometry)
    check(schedule, geometry)
    settings = Settings(pick(q, softcap=softcap, name="reference"), 0.7, softcap)
    return emulate(schedule, geometry, q, k, v, settings, dout), dense_attention(
        q, k, v, mask.dense(), dout=dout, scale=0.7, softcap=softcap
    )


def assert_equal(got, expected) -> None:
    out, lse, *grads = expected
    torch.testing.assert_close(got.out, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.lse, lse, rtol=0, atol=1e-12)
    for mine, reference in zip(got.grads, grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_ring_is_exact(mask: str, layout: str, world: int) -> None:
    for s, (h, g) in itertools.product((5, 23), SHAPES):
        chosen = MASKS[mask](s)
        assert_equal(*emulated(ring, chosen, make_layout(layout, s, world), h, g))


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["token_ring", "ulysses", "burst", "double_ring"])
def test_prototypes_are_exact(name: str, world: int) -> None:
    if name == "double_ring" and world % 2:
        pytest.skip("two windows need an even number of ranks")
    build = getattr(prototypes, name)
    for mask, layout, (h, g) in itertools.product(MASKS, LAYOUTS, SHAPES):
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
    q, k, v, _ = inputs(11, 1, 1)
    got = emulate(schedule, geometry, q, k, v, Settings(pick(q, softcap=None, name="reference"), 1.0, None))
    out = dense_attention(q, k, v, mask.dense(), scale=1.0)[0]
    assert (got.out - out).abs().max() > 1e-3
