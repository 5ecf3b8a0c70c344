"""One rank's own part against the projection of the global pruned schedule: the same moves and blocks, in order."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import masks
from longspan.attention.masks import Mask
from longspan.context.build import build, checked_schedule
from longspan.context.carry import Ring
from longspan.context.check import ScheduleError, check_own
from longspan.context.choose import layout_of
from longspan.context.geometry import Geometry
from longspan.context.local import local_schedule, own_triples
from longspan.context.lower import lower
from longspan.context.methods import builder, carries, method, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.program import Program, Step
from longspan.context.schedule import Phase
from longspan.layout.tokens import Layout
from tests.context.cases import MASKS

METHODS = (
    "ring",
    "descending",
    "opposing",
    "double_ring",
    "all_gather",
    "mask_aware",
    "kept_keys",
    "ulysses",
    "staged_ulysses",
    "usp",
    "token_ring",
    "light_seq",
    "burst",
)
PAIRS = ("descending+all_gather", "ring+mask_aware:1", "ulysses+burst", "token_ring+usp", "staged_ulysses+opposing")
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


def projected(phase: Phase, rank: int) -> Phase:
    """What of a global phase concerns a rank."""
    moves = tuple(move for move in phase.moves if rank in (move.src, move.dst))
    return Phase(moves, tuple(block for block in phase.blocks if block.rank == rank))


def assert_local_is_projection(name: str, mask: Mask, layout: Layout, ranks, h: int = 4, g: int = 2) -> None:
    if reason_against(name, mask, layout) is not None:
        return
    geometry = Geometry(mask, layout)
    whole = prune_schedule(builder(name, layout.world)(layout, h, g), geometry)
    found = carries(name, layout.world)
    for rank in ranks:
        mine = local_schedule(name, found, geometry, h, g, rank)
        check_own(mine, geometry, rank, own_triples(found, geometry, h, rank))
        assert mine.forward == projected(whole.forward, rank)
        assert mine.backward == projected(whole.backward, rank)


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_rank_s_part_is_the_projection_of_the_whole(name: str, mask_name: str, layout_name: str) -> None:
    for num_tokens, world in ((29, 1), (31, 2), (37, 3), (53, 4), (61, 7), (6, 8), (97, 16)):
        mask = MASKS[mask_name](num_tokens)
        assert_local_is_projection(name, mask, layout_of(layout_name, mask, world), range(world))


@st.composite
def band_masks(draw) -> Mask:
    """Disjoint bands in stacked rectangles of rows, with gaps: windows, documents, rows without keys."""
    s = draw(st.integers(3, 80))
    edges = sorted(draw(st.sets(st.integers(0, s), min_size=2, max_size=7)))
    bands = []
    for q0, q1 in itertools.pairwise(edges):
        k0 = draw(st.integers(0, s - 1))
        k1 = draw(st.integers(k0 + 1, s))
        lo = draw(st.integers(-s, s))
        bands.append((q0, q1, k0, k1, lo, draw(st.integers(lo, s))))
    return masks.from_bands(bands, s)


@settings(max_examples=150, deadline=None)
@given(mask=band_masks(), world=st.integers(1, 16), layout_name=st.sampled_from(LAYOUTS), name=st.sampled_from(METHODS))
def test_any_mask(mask: Mask, world: int, layout_name: str, name: str) -> None:
    assert_local_is_projection(name, mask, layout_of(layout_name, mask, world), range(world))


@settings(max_examples=100, deadline=None)
@given(
    mask=band_masks(),
    groups=st.integers(1, 6),
    degree=st.integers(1, 5),
    layout_name=st.sampled_from(LAYOUTS),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 4), (6, 3), (5, 5), (8, 2)]),
)
def test_any_groups_and_heads(mask: Mask, groups: int, degree: int, layout_name: str, heads: tuple[int, int]) -> None:
    """Heads that do not divide, KV heads that two ranks share, and ranks without any."""
    world = groups * degree
    layout = layout_of(layout_name, mask, world)
    assert_local_is_projection(f"usp:{degree}", mask, layout, range(world), *heads)


@settings(max_examples=100, deadline=None)
@given(
    mask=band_masks(),
    world=st.integers(1, 9),
    name=st.sampled_from(
        ["staged_ulysses:1", "staged_ulysses:2", "staged_ulysses:3", "staged_ulysses:9", "opposing", *PAIRS]
    ),
    layout_name=st.sampled_from(LAYOUTS),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 4), (6, 3), (5, 5), (8, 2), (12, 4)]),
)
def test_any_stages_halves_and_pairs(
    mask: Mask, world: int, name: str, layout_name: str, heads: tuple[int, int]
) -> None:
    """Stages that share a KV head, a single KV head split by tokens, phases of two methods."""
    assert_local_is_projection(name, mask, layout_of(layout_name, mask, world), range(world), *heads)


@settings(max_examples=50, deadline=None)
@given(mask=band_masks(), windows=st.integers(1, 5), inner=st.integers(1, 5), layout_name=st.sampled_from(LAYOUTS))
def test_any_windows(mask: Mask, windows: int, inner: int, layout_name: str) -> None:
    world = windows * inner
    assert_local_is_projection(f"double_ring:{inner}", mask, layout_of(layout_name, mask, world), range(world))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_64_ranks(name: str) -> None:
    lengths = np.random.default_rng(0).integers(20, 3000, 40).tolist()
    mask = masks.documents(lengths)
    assert_local_is_projection(name, mask, layout_of(method(name).layout, mask, 64), (0, 1, 31, 63), 8, 2)


def assert_alike(mine: Program, whole: Program) -> None:
    """The same steps; those of the whole may go on where this rank has nothing left to do."""
    for step, expected in itertools.zip_longest(mine.steps, whole.steps, fillvalue=Step()):
        for field in ("sends", "receives", "computes", "landings"):
            assert getattr(step, field) == getattr(expected, field)


@pytest.mark.parametrize("name", [*METHODS, *PAIRS])
def test_build_is_the_same_as_by_the_whole(name: str) -> None:
    mask = masks.documents([30, 40, 3, 25])
    layout = layout_of("contiguous" if name == "light_seq" else "balanced", mask, 9)
    geometry = Geometry(mask, layout)
    whole = checked_schedule(mask, layout, name, 4, 2)
    digests = set()
    for rank in range(9):
        built = build(mask, world=9, rank=rank, num_heads=4, num_kv_heads=2, method=name, layout=layout)
        assert_alike(built.forward, lower(whole.forward, whole, geometry, rank, backward=False))
        assert_alike(built.backward, lower(whole.backward, whole, geometry, rank, backward=True))
        digests.add(built.fingerprint)
    assert len(digests) == 1


def test_what_ranks_must_agree_on_is_in_the_digest() -> None:
    causal = masks.causal(90)

    def digest(mask: Mask = causal, method: str = "ring", layout: str = "zigzag", h: int = 4, g: int = 2):
        return build(mask, world=9, rank=3, num_heads=h, num_kv_heads=g, method=method, layout=layout).fingerprint

    others = [
        digest(masks.full(90)),
        digest(method="descending"),
        digest(layout="contiguous"),
        digest(h=8),
        digest(g=4),
    ]
    assert len({digest(), *others}) == 6


def test_a_rank_s_own_check_refuses() -> None:
    mask, layout = masks.causal(90), layout_of("zigzag", masks.causal(90), 9)
    geometry = Geometry(mask, layout)
    good = local_schedule("ring", (Ring(1),), geometry, 4, 2, 3)
    triples = own_triples((Ring(1),), geometry, 4, 3)
    check_own(good, geometry, 3, triples)
    blocks = good.forward.blocks
    fewer = dataclasses.replace(good, forward=Phase(good.forward.moves, blocks[1:]))
    with pytest.raises(ScheduleError, match="allowed"):
        check_own(fewer, geometry, 3, triples)
    twice = dataclasses.replace(good, backward=Phase(good.backward.moves, (blocks[0], *blocks)))
    with pytest.raises(ScheduleError, match="more than once"):
        check_own(twice, geometry, 3, triples)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [3, 512])  # with and without heads of 64, where these are exchanged among all ranks
def test_a_rank_of_1024_is_built_in_seconds(name: str, rank: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(7.5, 1.2, 3000).astype(int) + 16, 30_000)
    for mask in (masks.causal(8192 * 1024), masks.documents(lengths.tolist())):
        layout = layout_of(method(name).layout, mask, 1024)
        start = time.process_time()
        build(mask, world=1024, rank=rank, num_heads=64, num_kv_heads=8, method=name, layout=layout)
        assert time.process_time() - start < 4


@pytest.mark.parametrize("name", ["usp", "double_ring"])
def test_a_rank_of_256_is_built_soon(name: str) -> None:
    mask = masks.causal(1 << 18)
    layout = layout_of("zigzag", mask, 256)
    start = time.process_time()
    build(mask, world=256, rank=100, num_heads=64, num_kv_heads=8, method=name, layout=layout)
    assert time.process_time() - start < 2


def test_what_is_not_pruned_is_refused_on_many_ranks() -> None:
    with pytest.raises(ValueError, match="at most 128 ranks, got 1024; for more take one rank's pruned part"):
        build(masks.causal(4096), world=1024, rank=0, num_heads=4, num_kv_heads=2, method="ring", pruned=False)
