"""The estimate against the simulation: nearly the same times, so nearly the same choice, much sooner."""

from __future__ import annotations

import dataclasses
import time
from functools import lru_cache

import numpy as np
import pytest

from longspan.attention import masks
from longspan.attention.bands import total_area
from longspan.context.estimate import Known, estimate, estimate_all, least_s, tabulate
from longspan.context.geometry import Geometry
from longspan.context.schedule import Move, Phase, Piece, Sizes
from longspan.context.simulate import simulate
from longspan.hardware.profile import make_profile
from longspan.hardware.topology import Topology, lab, make_topology
from tests.context.cases import MASKS
from tests.context.simulated import SIZES, UNIT, by_hand, port, pruned

METHODS = (
    "ring",
    "zigzag",
    "striped",
    "descending",
    "opposing",
    "all_gather",
    "mask_aware",
    "kept_keys",
    "ulysses",
    "usp",
    "double_ring",
    "token_ring",
    "burst",
)


@pytest.mark.parametrize("name", ["ring", "zigzag", "striped", "ulysses", "usp:2"])
@pytest.mark.parametrize("mask_name", MASKS)
def test_the_table_has_the_area_of_every_block(name: str, mask_name: str) -> None:
    mask = MASKS[mask_name](53)
    schedule, geometry = pruned(name, mask, 4, 4, 2)
    table = tabulate(schedule, geometry)
    areas = np.bincount(table.pieces[:, 0], table.pieces[:, 3], len(table.blocks))
    assert areas.tolist() == [geometry.area(block.q, block.k) for block in schedule.forward.blocks]
    assert (areas * table.blocks[:, 4]).sum() == total_area(mask.bands) * 4


def test_rectangles_that_touch_are_one_call() -> None:
    schedule, geometry = pruned("zigzag", masks.full(64), 4, 1, 1)
    table = tabulate(schedule, geometry)  # each block is four rectangles of early and late parts
    assert len(table.pieces) == len(schedule.forward.blocks) == 16
    assert (table.pieces[:, 1:4] == (16, 16, 256)).all()


MASKS_16K = {
    "full": masks.full(16384),
    "causal": masks.causal(16384),
    "documents": masks.documents([5000, 700, 3000, 4000, 100, 3584]),
}
NETWORKS: dict[str, tuple[Topology, str]] = {
    "nvlink": (make_topology("h100", 4), "h100"),
    "pcie": (make_topology("a10_pcie", 4), "a10"),
    "port": (lab("port", 4, 10e9), "a100"),
    "mesh": (lab("mesh", 4, 10e9), "a100"),
}


@lru_cache(maxsize=64)
def built(name: str, mask_name: str, group_size: int):
    return pruned(name, MASKS_16K[mask_name], 4, 8, 8 // group_size)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mask_name", MASKS_16K)
@pytest.mark.parametrize("group_size", [1, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_the_choice_is_the_simulation_s(network: str, mask_name: str, group_size: int, backward: bool) -> None:
    topology, device_name = NETWORKS[network]
    device, sizes = make_profile(device_name), Sizes(head_dim=128)
    exact, rough = {}, {}
    for name in METHODS:
        schedule, geometry = built(name, mask_name, group_size)
        exact[name] = simulate(schedule, geometry, topology, device, sizes, backward=backward).time_s
        rough[name] = estimate(tabulate(schedule, geometry, backward=backward), topology, device, sizes)
    errors = {name: rough[name] / exact[name] - 1 for name in METHODS}
    assert max(map(abs, errors.values())) < 0.25, errors
    # What the estimate prefers is at most a little slower than the best.
    assert exact[min(rough, key=rough.__getitem__)] <= 1.06 * min(exact.values())
    # Methods that clearly differ are in the right order.
    for one in METHODS:
        for other in METHODS:
            assert not (exact[one] * 1.35 < exact[other] and rough[one] >= rough[other]), (one, other)


def test_a_wire_that_matters_is_seen() -> None:
    schedule, geometry = pruned("zigzag", masks.full(64), 4, 1, 1)
    table = tabulate(schedule, geometry)
    fast, slow = (estimate(table, lab("port", 4, rate), UNIT, SIZES) for rate in (1e9, 1.0))
    assert fast == pytest.approx(4 * 256, rel=1e-3)
    assert slow == pytest.approx(3 * 16 * 2 * 4 * 8 + 256, rel=1e-3)  # three hops of 128 bytes at 1 bit/s


def test_a_message_queues_behind_an_earlier_step_s() -> None:
    moves = [Move(0, 0, 1, Piece("kv", ((0, 2),), (0, 1)), lands=1), Move(1, 0, 2, Piece("kv", ((0, 2),), (0, 1)))]
    schedule = by_hand(6, 3, Phase(tuple(moves), ()))
    geometry = Geometry(masks.full(6), schedule.layout)
    # 16 bytes each through one port at 1 byte/s, although rank 0 posts the second at once.
    assert estimate(tabulate(schedule, geometry), port(3, 1.0), UNIT, SIZES) == pytest.approx(32)
    assert simulate(schedule, geometry, port(3, 1.0), UNIT, SIZES).time_s == pytest.approx(32)


@pytest.mark.slow
def test_pricing_ten_methods_at_64_ranks_takes_less_than_50_ms() -> None:
    tables = []
    for name in METHODS[:10]:
        schedule, geometry = pruned(name, masks.causal(64 * 1024), 64, 64, 8)
        tables.append(tabulate(schedule, geometry))
    topology, device, sizes = make_topology("h100", 64), make_profile("h100"), Sizes(head_dim=128)
    estimate(tables[0], topology, device, sizes)  # the topology's routes are kept
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        for table in tables:
            estimate(table, topology, device, sizes)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.05, taken


def test_refusals() -> None:
    schedule, geometry = pruned("ring", masks.full(8), 2, 1, 1)
    table = tabulate(schedule, geometry)
    with pytest.raises(ValueError, match="has 3 ranks, the schedule 2"):
        estimate(table, lab("port", 3, 1e6), UNIT, SIZES)
    with pytest.raises(ValueError, match="2, 4 or 8 bytes"):
        estimate(table, lab("port", 2, 1e6), UNIT, dataclasses.replace(SIZES, inputs=1))


def test_what_is_known_of_a_table_is_never_taken_for_another_s() -> None:
    """Times are kept by identity, which Python gives to a new array once the old one is gone."""
    topology, device = make_topology("h200", 4), make_profile("h200")
    known = Known()
    for size in range(40, 120, 4):
        schedule, geometry = pruned("ring", masks.causal(size), 4, 2, 1)
        table = tabulate(schedule, geometry)
        bound = least_s(table, topology, device, Sizes(), known)
        (time_s,) = estimate_all([table], topology, device, Sizes(), known)
        assert bound == least_s(table, topology, device, Sizes(), Known())
        assert time_s == estimate(table, topology, device, Sizes()) >= bound
        del table
