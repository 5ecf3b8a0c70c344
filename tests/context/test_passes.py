"""What schedules send and hold: bytes equal the published formulas, corrected by counting; pruning and peak memory.

Notation: KV = 2·b·n·g·d·e and Q = b·n·h·d·e bytes of one rank's keys with values and of its queries, L = 4·b·n·h.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longspan.attention.kernels import pick
from longspan.context.engine import Settings, Worker
from longspan.context.geometry import Geometry
from longspan.context.lower import lower_all
from longspan.context.methods import builder
from longspan.context.methods.ring import ring
from longspan.context.passes import mark_complete, prune, prune_schedule, replay
from longspan.context.program import Program
from longspan.context.records import Record
from longspan.context.schedule import Move, Phase, Piece, Schedule, Sizes, bytes_sent, ordered
from longspan.layout.tokens import make_layout
from tests.context.cases import MASKS, inputs

H, G, D, N = 8, 4, 16, 12  # query heads, KV heads, head dim, tokens of a rank
WORLDS = range(2, 9)
Method = Callable[..., Schedule]


class Unit:
    """Bytes of one rank's own tensors."""

    def __init__(self, sums: int = 4) -> None:
        self.sizes = Sizes(batch=1, head_dim=D, inputs=2, sums=sums)
        self.kv, self.q, self.lse = 2 * N * G * D * 2, N * H * D * 2, 4 * N * H
        self.dq, self.dkv = self.q * sums // 2, self.kv * sums // 2


def _schedule(method: str | Method, world: int, mask: str = "full", layout: str = "contiguous", *, pruned: bool = True):
    geometry = Geometry(MASKS[mask](N * world), make_layout(layout, N * world, world))
    build = builder(method, world) if isinstance(method, str) else method
    schedule = build(geometry.layout, H, G)
    return prune_schedule(schedule, geometry) if pruned else schedule


def _sent(schedule: Schedule, unit: Unit) -> tuple[list[int], list[int]]:
    world = schedule.layout.world
    return bytes_sent(schedule.forward, world, unit.sizes), bytes_sent(schedule.backward, world, unit.sizes)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_ring(world: int, pruned: bool) -> None:
    unit = Unit()
    for layout in ("contiguous", "zigzag", "striped"):
        forward, backward = _sent(_schedule("ring", world, layout=layout, pruned=pruned), unit)
        assert forward == [(world - 1) * unit.kv] * world
        assert backward == [3 * (world - 1) * unit.kv] * world
    _, backward = _sent(_schedule("ring", world, pruned=pruned), Unit(sums=2))
    assert backward == [2 * (world - 1) * unit.kv] * world


@pytest.mark.parametrize("world", WORLDS)
def test_a_causal_mask_prunes_the_ring(world: int) -> None:
    unit = Unit()
    forward, _ = _sent(_schedule("ring", world, "causal"), unit)
    # Rank r passes on its own keys and those of all lower ranks; the last rank's keys are nobody's.
    assert forward == [(rank + 1) * unit.kv for rank in range(world - 1)] + [0]
    assert sum(forward) == world * (world - 1) * unit.kv // 2 and max(forward) == (world - 1) * unit.kv
    unpruned, _ = _sent(_schedule("ring", world, "causal", pruned=False), unit)
    assert unpruned == [(world - 1) * unit.kv] * world
    forward, _ = _sent(_schedule("descending", world, "causal", "zigzag"), unit)
    upward, _ = _sent(_schedule("ring", world, "causal", "zigzag"), unit)
    assert sum(upward) > sum(forward) or world == 2


@pytest.mark.parametrize("world", WORLDS)
def test_token_ring(world: int) -> None:
    for unit in (Unit(sums=2), Unit(sums=4)):
        forward, backward = _sent(_schedule("token_ring", world), unit)
        assert forward == [(world - 1) * (unit.q + unit.dq + unit.lse)] * world
        # q with do, lse and delta go out; dq comes home, and nothing of the keys moves.
        assert backward == [(world - 1) * (2 * unit.q + 2 * unit.lse + unit.dq)] * world


@pytest.mark.parametrize("world", WORLDS)
def test_light_seq_mean(world: int) -> None:
    unit = Unit(sums=2)
    forward, backward = _sent(_schedule("light_seq", world, "causal"), unit)
    p = Fraction(world)
    if world % 2:
        keys, helped = (p - 1) * (3 * p - 1) / (8 * p), (p * p - 1) / (8 * p)
    else:
        keys, helped = (3 * p - 2) / 8, (p - 2) / 8
    assert Fraction(sum(forward), world) == keys * unit.kv + helped * (2 * unit.q + unit.lse)
    assert Fraction(sum(backward), world) == 2 * keys * unit.kv + helped * (3 * unit.q + 2 * unit.lse)
    wide = Unit(sums=4)
    _, backward = _sent(_schedule("light_seq", world, "causal"), wide)
    assert Fraction(sum(backward), world) == 3 * keys * wide.kv + helped * (4 * wide.q + 2 * wide.lse)


@pytest.mark.parametrize("world", WORLDS)
def test_burst_and_double_ring(world: int) -> None:
    unit = Unit()
    forward, backward = _sent(_schedule("burst", world), unit)
    assert forward == [(world - 1) * unit.kv] * world
    assert backward == [(world - 1) * (2 * unit.q + 2 * unit.lse + unit.dq)] * world
    if world % 2 == 0:
        schedule = _schedule("double_ring:2", world)
        forward, backward = _sent(schedule, unit)
        assert forward == [(world - 1) * unit.kv] * world
        assert backward == [3 * (world - 1) * unit.kv] * world
        across = bytes_sent(Phase(tuple(m for m in schedule.forward.moves if m.lane), ()), world, unit.sizes)
        assert across == [(world // 2 - 1) * unit.kv] * world


@pytest.mark.parametrize("world", [2, 4])
def test_ulysses(world: int) -> None:
    """Heads divide: (P-1)/P of q, kv and o with its lse go out, of do, dq and dkv come back; all sums are complete."""
    share = Fraction(world - 1, world)
    for unit in (Unit(sums=2), Unit(sums=4)):
        forward, backward = _sent(_schedule("ulysses", world), unit)
        assert forward == [share * (2 * unit.q + unit.kv + unit.lse)] * world
        assert backward == [share * (2 * unit.q + unit.kv + 2 * unit.lse)] * world


def test_ulysses_in_two_stages_sends_no_more() -> None:
    unit = Unit()
    for world in (2, 4, 8):
        assert _sent(_schedule("staged_ulysses", world), unit) == _sent(_schedule("ulysses", world), unit)


def test_ulysses_in_fp32_where_a_kv_head_is_shared() -> None:
    """On 8 ranks each of the 4 KV heads is read by two: kv goes out twice, and its gradient comes back in two parts."""
    unit, share = Unit(), Fraction(7, 8)
    forward, backward = _sent(_schedule("ulysses", 8), unit)
    assert forward == [share * (2 * unit.q + 2 * unit.kv + unit.lse)] * 8
    assert backward == [share * (2 * unit.q + 2 * unit.dkv + 2 * unit.lse)] * 8


def test_ulysses_with_uneven_heads_touches_more_kv_heads() -> None:
    """H = 6, G = 3 on 4 ranks: query heads 0-1, 2-3, 4, 5 read 1 + 1 + 1 + 1 KV heads, the last one twice."""
    schedule = builder("ulysses", 4)(make_layout("contiguous", 4 * N, 4), 6, 3)
    moved = {m.dst: m.piece.heads for m in schedule.forward.moves if m.piece.kind == "kv"}
    assert moved == {0: (0, 1), 1: (1, 2), 2: (2, 3), 3: (2, 3)}


@pytest.mark.parametrize(("world", "degree"), [(4, 2), (8, 2), (8, 4), (6, 3)])
def test_usp(world: int, degree: int) -> None:
    """The exchange inside a group, and a ring of super-shards between groups, whose dkv goes home to each owner."""
    unit, share, rounds = Unit(), Fraction(degree - 1, degree), world // degree - 1
    touched = sum(-(-b // 2) - a // 2 for a, b in _shares(degree))  # KV heads that the ranks of a group read, of 4
    kv, dkv = Fraction(unit.kv * touched, G), Fraction(unit.dkv * touched, G)
    schedule = _schedule(f"usp:{degree}", world)
    forward, backward = _sent(schedule, unit)
    assert Fraction(sum(forward), world) == share * (2 * unit.q + unit.lse + kv) + rounds * kv
    # Between groups keys travel again, and partial sums of each KV head go home in fp32.
    assert Fraction(sum(backward), world) == (
        share * (2 * unit.q + 2 * unit.lse) + share * dkv + rounds * (kv + dkv)
    )  # fmt: skip


def _shares(degree: int) -> list[tuple[int, int]]:
    edges = [0]
    for rank in range(degree):
        edges.append(edges[-1] + H // degree + (rank < H % degree))
    return list(pairwise(edges))


@pytest.mark.parametrize("world", WORLDS)
def test_all_gather_and_mask_aware(world: int) -> None:
    unit = Unit()
    for method in ("all_gather", "mask_aware"):
        forward, backward = _sent(_schedule(method, world), unit)
        assert forward == [(world - 1) * unit.kv] * world
        assert backward == [(world - 1) * (unit.kv + unit.dkv)] * world


@pytest.mark.parametrize("world", WORLDS)
def test_kept_keys_are_sent_once(world: int) -> None:
    unit = Unit()
    forward, backward = _sent(_schedule("kept_keys", world), unit)
    assert forward == [(world - 1) * unit.kv] * world
    assert backward == [(world - 1) * unit.dkv] * world


@pytest.mark.parametrize("name", ["kept_keys+ring", "ring+kept_keys:2"])
def test_kept_keys_go_with_no_other_method(name: str) -> None:
    with pytest.raises(ValueError, match="goes with no other method"):
        builder(name, 4)


@pytest.mark.parametrize("world", WORLDS)
def test_opposing_rings_send_a_rings_bytes_half_each_way(world: int) -> None:
    unit = Unit()
    schedule = _schedule("opposing", world)
    forward, backward = _sent(schedule, unit)
    assert forward == [(world - 1) * unit.kv] * world
    assert backward == [3 * (world - 1) * unit.kv] * world
    links = defaultdict(int)
    for move in schedule.forward.moves:
        links[move.src, move.dst] += unit.sizes.of_move(move)
    if world > 2:
        assert set(links.values()) == {(world - 1) * unit.kv // 2}


@pytest.mark.parametrize("world", WORLDS)
def test_the_descending_ring_sheds_a_quarter_of_both_phases(world: int) -> None:
    """Causal, zigzag: keys, and their gradients behind them, go no further than the last rank that computes on them."""
    unit = Unit()
    forward, backward = _sent(_schedule("descending", world, "causal", "zigzag"), unit)
    assert Fraction(sum(forward), world * (world - 1) * unit.kv) == Fraction(3, 4)
    assert Fraction(sum(backward), world * (world - 1) * unit.kv) == 3 * Fraction(3, 4)


def test_only_sums_that_lack_nothing_are_complete() -> None:
    """Dropping one contribution of a complete sum, or adding one elsewhere, makes it incomplete."""
    schedule = _schedule("ulysses", 4)
    geometry = Geometry(MASKS["full"](4 * N), schedule.layout)
    complete = [m.complete for m in schedule.forward.moves if m.piece.kind == "o"]
    assert complete and all(complete)
    assert not any(m.complete for m in _schedule("token_ring", 4).forward.moves)
    block = schedule.forward.blocks[0]
    half = [replace(block, rank=1, k=((0, N),)), *schedule.forward.blocks]
    again = mark_complete(_plain(Phase(schedule.forward.moves, tuple(half))), schedule, geometry, backward=False)
    found = {(m.src, m.complete) for m in again.moves if m.piece.kind == "o"}
    assert found == {(0, False), (1, True), (2, True), (3, True)}


def _plain(phase: Phase) -> Phase:
    return Phase(tuple(replace(m, complete=False) for m in phase.moves), phase.blocks)


def test_what_is_kept_is_not_sent_again() -> None:
    schedule = _schedule("usp:2", 4)
    kept = [m for m in schedule.forward.moves if m.kept]
    assert {(m.piece.kind, m.step, m.lands) for m in kept} == {("kv", 0, 1), ("q", 1, 1)}
    again = {(m.src, m.dst, m.piece) for m in schedule.backward.moves}
    assert not again & {(m.src, m.dst, m.piece) for m in kept}
    with pytest.raises(ValueError, match="only q and kv can be kept"):
        Move(0, 0, 1, Piece("do", ((0, 1),), (0, 1)), kept=True)


def test_prune_keeps_relays_and_drops_what_nobody_reads() -> None:
    geometry = Geometry(MASKS["documents"](60), make_layout("contiguous", 60, 4))
    schedule = prune_schedule(ring(geometry.layout, 2, 1), geometry)
    # Documents of 20, 12 and 28 tokens on ranks of 15: rank 0 needs nothing, each other rank its left neighbour.
    assert [(m.step, m.src, m.dst, m.piece.tokens) for m in schedule.forward.moves] == [
        (0, 0, 1, ((0, 15),)),
        (0, 1, 2, ((20, 30),)),
        (0, 2, 3, ((32, 45),)),
    ]
    assert all(block.step <= 1 for block in schedule.forward.blocks)
    again = prune(schedule.forward, schedule, geometry, backward=False)
    assert again == schedule.forward


def test_prune_splits_by_heads() -> None:
    """A rank that reads one KV head of two is sent one."""
    layout = make_layout("contiguous", 8, 2)
    geometry = Geometry(MASKS["full"](8), layout)
    schedule = ring(layout, 4, 2)
    blocks = [replace(b, heads=heads) for b in schedule.forward.blocks for heads in ((0, 2), (2, 4))]
    one = [b for b in blocks if b.rank == 1 or b.step == 0 or b.heads == (0, 2)]
    pruned = prune(Phase(schedule.forward.moves, tuple(one)), schedule, geometry, backward=False)
    assert {(m.dst, m.piece.heads) for m in pruned.moves} == {(1, (0, 2)), (0, (0, 1))}


def test_keys_that_do_not_hop_cannot_be_followed() -> None:
    layout = make_layout("contiguous", 9, 3)
    own = Piece("kv", (layout.owned(0),), (0, 1))
    forward = Phase((Move(0, 0, 1, own), Move(0, 0, 2, own)), ())
    with pytest.raises(ValueError, match=r"dkv can follow only keys that hop.*use dkv='home'"):
        replay(forward, layout, 1, dkv="follow")


def test_moves_of_a_step_are_ordered_by_distance() -> None:
    piece = Piece("kv", ((0, 1),), (0, 1))
    moves = [Move(0, src, dst, piece) for src in range(4) for dst in range(4) if src != dst]
    distances = [(m.dst - m.src) % 4 for m in ordered(moves, 4)]
    assert distances == sorted(distances)
    assert [m.src for m in ordered(moves, 4)[:4]] == [0, 1, 2, 3]


def test_sizes() -> None:
    sizes = Sizes(batch=2, head_dim=8, inputs=2, sums=4)
    assert {kind: sizes.of(Piece(kind, ((0, 3), (5, 7)), (1, 3))) for kind in ("q", "kv", "do", "o", "dq", "dkv")} == {
        "q": 20 * 16,
        "kv": 20 * 32,
        "do": 20 * 24,
        "o": 20 * 36,
        "dq": 20 * 32,
        "dkv": 20 * 64,
    }


def _live(worker: Worker, messages: list[Tensor]) -> int:
    """Bytes of all tensors that are held; of the arena those parts in which one of them lies."""
    storages, parts = {}, []
    held = (t for record in worker.records.values() for t in record)
    for tensor in (*messages, *worker.flats.values(), *held):
        storage = tensor.untyped_storage()
        if storage.data_ptr() != worker._arena.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        elif tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            parts.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    total, end = sum(storages.values()), 0
    for start, stop in sorted(parts):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _peaks(programs: list[Program], workers: list[Worker]) -> list[int]:
    """Largest number of live bytes of each rank, counted while the programs run."""
    pending: list[list[tuple]] = [[] for _ in workers]
    queues: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
    peaks = [0] * len(workers)
    for number in range(len(programs[0].steps)):
        for program, worker in zip(programs, workers, strict=True):
            for send in program.steps[number].sends:
                queues[program.rank, send.peer, send.lane].append(worker.outgoing(send).clone())
        for rank, (program, worker, arrivals) in enumerate(zip(programs, workers, pending, strict=True)):
            step = program.steps[number]
            for receive in step.receives:
                flat = worker.incoming(receive).copy_(queues[receive.peer, rank, receive.lane].popleft())
                arrivals.append((receive, flat))
            for fill in step.fills:
                worker.fill(fill)
            for compute in step.computes:
                worker.compute(compute)
            peaks[rank] = max(peaks[rank], _live(worker, [arrival[1] for arrival in arrivals if arrival]))
            for landing in step.landings:
                receive, flat = arrivals[landing.receive]
                worker.arrive(receive, flat, landing.write)
                arrivals[landing.receive] = ()
            worker.free(step.frees)
    return peaks


@pytest.mark.parametrize(
    ("method", "layout", "mask"),
    [
        ("ring", "contiguous", "full"),
        ("descending", "zigzag", "causal"),
        ("usp", "contiguous", "full"),
        ("mask_aware", "contiguous", "documents"),
        ("token_ring", "contiguous", "full"),
        ("light_seq", "contiguous", "causal"),
        ("ulysses", "contiguous", "full"),
        ("burst", "contiguous", "full"),
        ("double_ring:2", "contiguous", "full"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_peak_bytes_are_what_is_alive(method: str, layout: str, mask: str, backward: bool) -> None:
    world, sizes = 4, Sizes(batch=1, head_dim=8, inputs=4, sums=4)
    geometry = Geometry(MASKS[mask](16 * world), make_layout(layout, 16 * world, world))
    schedule = prune_schedule(builder(method, world)(geometry.layout, 4, 2), geometry)
    q, k, v, dout = inputs(16 * world, 4, 2, dtype=torch.float32, d=8, b=1)
    settings = Settings(pick(q, softcap=None, name="reference"), 0.7, None)
    programs = lower_all(schedule.backward if backward else schedule.forward, schedule, geometry, backward=backward)
    workers = []
    for program in programs:
        own = torch.from_numpy(geometry.layout.positions(program.rank))
        records: list[Record] = [(q[:, own],), (k[:, own], v[:, own])]
        if backward:
            records.append((dout[:, own], torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)))
        saved = sum(sizes.of(program.buffers[buffer].piece) for buffer in program.saved) if backward else 0
        workers.append(Worker(program, records, settings, torch.zeros(saved, dtype=torch.uint8) if saved else None))
    measured = _peaks(programs, workers)
    for program, bytes_alive in zip(programs, measured, strict=True):
        assert bytes_alive <= program.peak_bytes(sizes) <= 1.1 * bytes_alive


@pytest.mark.parametrize("world", [4, 8])
def test_a_ring_holds_two_blocks_of_foreign_keys_whatever_the_ranks(world: int) -> None:
    unit = Unit()
    schedule = _schedule("ring", world)
    geometry = Geometry(MASKS["full"](N * world), schedule.layout)
    own = unit.q + unit.kv + (unit.dq + unit.lse)
    for program in lower_all(schedule.forward, schedule, geometry, backward=False):
        assert program.peak_bytes(unit.sizes) == own + 2 * unit.kv
    own = unit.q + unit.kv + (unit.q + 2 * unit.lse) + unit.dq + unit.dkv
    for program in lower_all(schedule.backward, schedule, geometry, backward=True):
        # Two blocks of keys; their gradient so far, the next one arriving, and the one this block just made.
        assert program.peak_bytes(unit.sizes) == own + 2 * unit.kv + 3 * unit.dkv
