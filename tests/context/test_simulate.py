"""The simulator against times worked out by hand: bytes over rates, what hides behind what, and who waits for whom."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest

from longspan.attention import masks
from longspan.context.geometry import Geometry
from longspan.context.schedule import Block, Move, Phase, Piece, Sizes, bytes_sent
from longspan.context.simulate import fair_rates, simulate
from tests.context.simulated import SIZES, UNIT, by_hand, mesh, on_layout, port, pruned

ONE = (0, 1)


def two_rank_ring(rate: float, latency_s: float = 0.0, device=UNIT, **changes):
    schedule, geometry = pruned("ring", masks.full(8), 2, 1, 1)
    topology = port(2, rate, latency_s=latency_s, **changes)
    return simulate(schedule, geometry, topology, device, SIZES)


def test_a_ring_that_waits_for_its_wire() -> None:
    # Each rank: 16 pairs (16 s) on its own keys, then 16 on the other's, of 4 tokens x 2 x 4 bytes = 32 bytes.
    slow = two_rank_ring(rate=1.0, latency_s=3.0)
    assert slow.time_s == pytest.approx(3 + 32 + 16)
    assert slow.compute_s == pytest.approx((32, 32)) and slow.exposed_s == pytest.approx((19, 19))
    assert slow.max_exposed_s == slow.mean_exposed_s == pytest.approx(19)
    assert slow.link_bytes == dict.fromkeys(("rank 0 out", "rank 0 in", "rank 1 out", "rank 1 in"), 32)


def test_a_ring_whose_wire_hides_behind_computation() -> None:
    fast = two_rank_ring(rate=2.1)
    assert fast.time_s == pytest.approx(32) and fast.exposed_s == (0, 0)
    assert not [event for event in fast.events if event.kind == "wait"]
    # 32 bytes at 2 bytes/s are there exactly when the first block is done; a limit on one message alone is as good.
    assert two_rank_ring(rate=2.0).time_s == pytest.approx(32)
    assert two_rank_ring(rate=100.0, flow_bytes_per_s=1.0).time_s == pytest.approx(32 + 16)


def test_posting_costs_the_message_or_the_rank() -> None:
    assert two_rank_ring(rate=2.0, message_s=1.0).time_s == pytest.approx(1 + 16 + 16)
    # A rank that is held up computes later; its message, ready at 1, is there at 17 as its block is done.
    held = two_rank_ring(rate=2.0, message_s=1.0, blocking=True)
    assert held.time_s == pytest.approx(1 + 16 + 16) and held.exposed_s == (0, 0)


def test_memory_traffic_and_blocks_have_their_price() -> None:
    # Widening costs nothing in fp32; the second block merges 4 rows of 4 bytes three times over; a message is packed
    # from the own keys (twice 32 bytes).
    device = dataclasses.replace(UNIT, memory_bytes_per_s=8.0, block_s=0.5)
    got = two_rank_ring(rate=1e9, device=device)
    assert got.time_s == pytest.approx(32 + 2 * 0.5 + 3 * 16 / 8 + 64 / 8, rel=1e-6)


def test_an_arrival_is_passed_on_without_packing() -> None:
    # Three ranks, two hops: only the own keys are packed, 2 tokens x 2 x 4 bytes, read and written.
    schedule, geometry = pruned("ring", masks.full(6), 3, 1, 1)
    device = dataclasses.replace(UNIT, memory_bytes_per_s=1.0)
    got = simulate(schedule, geometry, port(3, 1e9), device, SIZES)
    packing = [event for event in got.events if event.kind == "pack"]
    assert len(packing) == 3 and all(e.stop_s - e.start_s == pytest.approx(2 * 16) for e in packing)


def test_one_port_carries_two_messages_at_half_the_rate_each() -> None:
    schedule, geometry = pruned("all_gather", masks.full(6), 3, 1, 1)
    # 2 tokens x 2 x 4 = 16 bytes to each of two ranks; then 2 x 6 pairs in one call.
    on_port = simulate(schedule, geometry, port(3, 4.0), UNIT, SIZES)
    on_mesh = simulate(schedule, geometry, mesh(3, 4.0), UNIT, SIZES)
    assert on_port.time_s == pytest.approx(2 * 16 / 4 + 12)
    assert on_mesh.time_s == pytest.approx(16 / 4 + 12)
    assert sum(on_mesh.link_bytes.values()) == sum(bytes_sent(schedule.forward, 3, SIZES)) == 6 * 16


def test_token_ring_gains_on_links_of_its_own_only() -> None:
    times = {}
    for name in ("zigzag", "token_ring"):
        schedule, geometry = pruned(name, masks.full(16), 4, 1, 1)
        sizes = Sizes(head_dim=64, inputs=4, sums=4)
        for topology in (port(4, 8.0), mesh(4, 8.0)):
            times[name, topology.name] = simulate(schedule, geometry, topology, UNIT_64, sizes).time_s
    assert times["token_ring", "mesh"] < 0.9 * times["zigzag", "mesh"]
    assert times["token_ring", "port"] > 0.95 * times["zigzag", "port"]


UNIT_64 = dataclasses.replace(UNIT, peak_flop_per_s=(("float32", 4.0 * 64),))


def move(step: int, src: int, dst: int, tokens: tuple[int, int], **changes) -> Move:
    return Move(step, src, dst, Piece("kv", (tokens,), ONE), **changes)


def run(phase: Phase, num_tokens: int = 4, world: int = 2, rate: float = 1.0):
    """By hand: every token is 8 bytes of kv, a pair takes a second."""
    schedule = by_hand(num_tokens, world, phase)
    return simulate(schedule, Geometry(masks.full(num_tokens), schedule.layout), port(world, rate), UNIT, SIZES)


def test_a_message_that_lands_later_is_not_waited_for() -> None:
    work = tuple(Block(step, 1, ((2, 4),), ((2, 4),), ONE) for step in (0, 1, 2))
    early = run(Phase((move(0, 0, 1, (0, 2)),), work))
    late = run(Phase((move(0, 0, 1, (0, 2), lands=2),), work))
    assert early.time_s == pytest.approx(16 + 4 + 4) and early.exposed_s == pytest.approx((0, 12))
    assert late.time_s == pytest.approx(16) and late.exposed_s == pytest.approx((0, 4))


def test_a_message_waits_until_its_receiver_has_posted() -> None:
    # Rank 1 posts step 1 after 4 s of work at step 0; rank 0 has nothing else to do.
    got = run(Phase((move(1, 0, 1, (0, 2)),), (Block(0, 1, ((2, 4),), ((2, 4),), ONE),)))
    (send,) = [event for event in got.events if event.kind == "send"]
    assert (send.start_s, send.stop_s, send.num_bytes, send.peer) == (pytest.approx(4), pytest.approx(20), 16, 1)
    assert got.exposed_s == pytest.approx((0, 16)) and got.time_s == pytest.approx(20)


def test_messages_of_a_pair_go_in_order_and_lanes_side_by_side() -> None:
    def stops(lane: int) -> list[float]:
        first = move(0, 0, 1, (0, 1), lands=1)
        second = move(0, 0, 1, (0, 2), lands=1, lane=lane)
        events = run(Phase((first, second), ())).events
        return sorted(event.stop_s for event in events if event.kind == "send")

    assert stops(lane=0) == pytest.approx([8, 24])  # one after the other
    assert stops(lane=1) == pytest.approx([16, 24])  # 8 bytes at half the rate, then the rest of 16
    alone = [event for event in run(Phase((move(0, 0, 1, (0, 2)),), ())).events if event.kind == "send"]
    assert alone[0].stop_s == pytest.approx(16)


def test_a_short_message_frees_its_share() -> None:
    # Rank 0 sends 16 bytes to rank 1 and 8 to rank 2 through one port: both at 1/2 until 16 s, then 1 alone.
    got = run(Phase((move(0, 0, 1, (0, 2)), move(0, 0, 2, (0, 1))), ()), num_tokens=6, world=3)
    stops = {event.peer: event.stop_s for event in got.events if event.kind == "send"}
    assert stops == {2: pytest.approx(16), 1: pytest.approx(24)}


def test_rates_are_max_min_fair() -> None:
    # Wire 0 of 10 carries messages 0 and 1, wire 1 of 4 messages 1 and 2: 1 gets 2, which leaves 8 for 0.
    routes, capacity = np.array([[0, 2], [0, 1], [1, 2]]), np.array([10.0, 4.0, math.inf])
    assert fair_rates(routes, np.full(3, math.inf), capacity).tolist() == pytest.approx([8, 2, 2])
    assert fair_rates(routes, np.array([5.0, math.inf, 1.0]), capacity).tolist() == pytest.approx([5, 3, 1])


@pytest.mark.parametrize("name", ["zigzag", "token_ring", "ulysses", "light_seq", "double_ring:2", "burst"])
@pytest.mark.parametrize("backward", [False, True])
def test_time_is_conserved_and_bytes_are_counted(name: str, backward: bool) -> None:
    schedule, geometry = pruned(name, masks.causal(37), 4, 4, 2)
    sizes = Sizes(head_dim=64, inputs=4, sums=4)
    got = simulate(schedule, geometry, port(4, 1e3, latency_s=0.1), UNIT_64, sizes, backward=backward, memory=True)
    phase = schedule.backward if backward else schedule.forward
    sent = bytes_sent(phase, 4, sizes)
    assert [got.link_bytes[f"rank {rank} out"] for rank in range(4)] == sent
    assert sum(event.num_bytes for event in got.events if event.kind == "send") == sum(sent)
    for rank in range(4):
        own = sorted((e.start_s, e.stop_s) for e in got.events if e.rank == rank and e.kind != "send")
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(own))
        assert sum(stop - start for start, stop in own) == pytest.approx(got.compute_s[rank] + got.exposed_s[rank])
    assert got.time_s >= max(max(got.compute_s), max(sent) / 1e3)
    assert got.time_s == pytest.approx(max(event.stop_s for event in got.events))
    assert len(got.peak_bytes) == 4 and got.peak_memory_bytes == max(got.peak_bytes)


def test_the_slowest_rank_sets_the_time() -> None:
    schedule, geometry = on_layout("ring", masks.causal(8), by_hand(8, 2, Phase((), ())).layout, 1, 1)
    got = simulate(schedule, geometry, port(2, 1e9), UNIT, SIZES)
    # Rank 0: the 10 pairs of its diagonal, each key tile that it cuts counted whole; rank 1: those and 16 more.
    assert got.compute_s[1] - got.compute_s[0] == pytest.approx(16, rel=1e-6)
    assert got.time_s == pytest.approx(got.compute_s[1], rel=1e-6)


def test_peak_memory_by_hand() -> None:
    schedule, geometry = pruned("ring", masks.full(8), 2, 1, 1)
    got = simulate(schedule, geometry, port(2, 1.0), UNIT, SIZES, memory=True)
    # Own q, kv, o with lse, the other's kv; a second result is merged from the kernel's own buffer.
    assert got.peak_bytes == (4 * (4 + 8 + 8 + 8),) * 2


def test_refusals() -> None:
    schedule, geometry = pruned("ring", masks.full(8), 2, 1, 1)
    with pytest.raises(ValueError, match="has 3 ranks, the schedule 2"):
        simulate(schedule, geometry, port(3, 1.0), UNIT, SIZES)
    with pytest.raises(ValueError, match="no peak for 'bfloat16'"):
        simulate(schedule, geometry, port(2, 1.0), UNIT, Sizes(inputs=2))
    with pytest.raises(ValueError, match="2, 4 or 8 bytes"):
        simulate(schedule, geometry, port(2, 1.0), UNIT, Sizes(inputs=3))
    with pytest.raises(ValueError, match="did not count memory"):
        _ = simulate(schedule, geometry, port(2, 1.0), UNIT, SIZES).peak_memory_bytes
