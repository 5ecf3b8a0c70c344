"""The static checker: a schedule is proved right for a mask before anything runs.

It executes both phases symbolically on atoms and refuses, naming the step, the ranks and the tokens, a schedule that
reads an input before it has arrived, sends a sum that does not exist, leaves a partial sum with a rank that does not
own it, or computes any allowed (head, query, key) triple other than exactly once. Moves are one list seen by both
ends, so sends match receives and all ranks post in one order by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from operator import mul

import numpy as np

from longspan.attention.bands import total_area
from longspan.context.geometry import Geometry, Range
from longspan.context.passes import Liveness, atoms_of
from longspan.context.schedule import KV_KINDS, Block, Kind, Phase, Schedule, kv_heads_of


class ScheduleError(ValueError):
    """A schedule that would not compute attention."""


def check(schedule: Schedule, geometry: Geometry) -> None:
    """Prove both phases. Raises ScheduleError with the first fault found."""
    if schedule.num_heads % schedule.num_kv_heads:
        raise ScheduleError(
            f"query heads must be a multiple of KV heads, got {schedule.num_heads} and {schedule.num_kv_heads}"
        )
    _check_phase(schedule.forward, schedule, geometry, backward=False)
    _check_phase(schedule.backward, schedule, geometry, backward=True)


def check_own(schedule: Schedule, geometry: Geometry, rank: int, triples: tuple[int, int]) -> None:
    """Check one rank's part of a schedule: what it has to compute is computed once.

    ``triples``: how many allowed (head, query, key) are the rank's in each phase. Whether its peers send what it
    expects only ``check`` can tell; that what it computes on has arrived, lowering asserts.

    Raises ScheduleError where blocks overlap, or do not cover the triples.
    """
    phases = ("forward", schedule.forward, triples[0]), ("backward", schedule.backward, triples[1])
    for name, phase, expected in phases:
        twice = _computed_twice(phase.blocks)
        if twice is not None:
            raise ScheduleError(f"{name}: rank {rank} computes on keys of slots {twice[0]}..{twice[1]} more than once")
        areas = (total_area(geometry.bands(block.q, block.k)) for block in phase.blocks)  # the bands that are lowered
        heads = (block.heads[1] - block.heads[0] for block in phase.blocks)
        found = sum(map(mul, areas, heads))
        if found != expected:
            raise ScheduleError(
                f"{name}: rank {rank} computes {found} of {expected} allowed (head, query, key) "
                "triples; every one must be once"
            )


def _computed_twice(blocks: Iterable[Block]) -> Range | None:
    """Slots of keys that two blocks take with a common query and head, or None."""
    found = [(*q, *k, *block.heads) for block in blocks for q in block.q for k in block.k]
    boxes = np.array(found, np.int64).reshape(-1, 6)
    # Of two boxes that overlap, the later begins before the earlier ends; seek along the axis with fewer such pairs.
    sorts = []
    for axis in (0, 2):
        sorted_boxes = boxes[np.argsort(boxes[:, axis], kind="stable")]
        after = np.searchsorted(sorted_boxes[:, axis], sorted_boxes[:, axis + 1]) - np.arange(len(boxes)) - 1
        sorts.append((int(after.sum()), sorted_boxes, after))
    _, boxes, after = min(sorts, key=lambda sort: sort[0])
    first = np.repeat(np.arange(len(boxes)), after)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(after) - after, after)
    a, b = boxes[first], boxes[second]
    low, high = np.maximum(a[:, ::2], b[:, ::2]), np.minimum(a[:, 1::2], b[:, 1::2])
    twice = np.flatnonzero((low < high).all(1))
    return (int(low[twice[0], 1]), int(high[twice[0], 1])) if len(twice) else None


def areas(schedule: Schedule, geometry: Geometry) -> tuple[int, ...]:
    """Allowed (head, query, key) triples that each rank computes in the forward phase."""
    totals = [0] * schedule.layout.world
    for block in schedule.forward.blocks:
        totals[block.rank] += geometry.area(block.q, block.k) * (block.heads[1] - block.heads[0])
    return tuple(totals)


def _check_form(phase: Phase, schedule: Schedule, name: str, kinds: Iterable[Kind]) -> None:
    """Every rank, slot and head that the phase speaks of is one that the schedule has."""
    known = frozenset(kinds)
    ranks = range(schedule.layout.world)
    for move in phase.moves:
        kind = move.piece.kind
        if kind not in known:
            raise ScheduleError(f"{name}: {kind} cannot move in this phase; known: {sorted(known)}")
        num_heads = schedule.num_kv_heads if kind in KV_KINDS else schedule.num_heads
        if move.src not in ranks or move.dst not in ranks or not _fits(move.piece.heads, num_heads):
            raise ScheduleError(f"{name}: ranks are 0..{len(ranks) - 1} and heads 0..{num_heads}, got {move}")
    for block in phase.blocks:
        if block.rank not in ranks or not _fits(block.heads, schedule.num_heads):
            raise ScheduleError(f"{name}: ranks are 0..{len(ranks) - 1} and heads 0..{schedule.num_heads}, got {block}")
    tokens = {move.piece.tokens for move in phase.moves} | {r for block in phase.blocks for r in (block.q, block.k)}
    for ranges in tokens:
        last = 0
        for start, stop in ranges:
            if not last <= start <= stop <= schedule.layout.num_tokens:
                raise ScheduleError(
                    f"{name}: slots must be sorted and disjoint ranges within {schedule.layout.num_tokens} tokens, "
                    f"got {ranges}"
                )
            last = stop


def _fits(heads: Range, num_heads: int) -> bool:
    return 0 <= heads[0] < heads[1] <= num_heads


def _check_phase(phase: Phase, schedule: Schedule, geometry: Geometry, *, backward: bool) -> None:
    name = "backward" if backward else "forward"
    input_kinds: tuple[Kind, ...] = ("q", "kv", "do") if backward else ("q", "kv")
    sum_kinds: tuple[Kind, ...] = ("dq", "dkv") if backward else ("o",)
    _check_form(phase, schedule, name, (*input_kinds, *sum_kinds))
    atoms = atoms_of(phase, schedule, geometry)
    have = Liveness(atoms)
    owned = [atoms.bits((schedule.layout.owned(rank),)) for rank in range(schedule.layout.world)]
    for rank, tokens in enumerate(owned):
        for kind in input_kinds:
            have.add(rank, kind, tokens, range(len(have.of(rank, kind))))
    for move in schedule.forward.moves if backward else ():
        if move.kept:  # proved to arrive by the forward phase's own check
            heads = atoms.heads(move.piece.heads, kv=move.piece.kind in KV_KINDS)
            have.add(move.dst, move.piece.kind, atoms.bits(move.piece.tokens), heads)
    posted, landing, computed = defaultdict(list), defaultdict(list), defaultdict(list)
    for move in phase.moves:
        cells = atoms.bits(move.piece.tokens), atoms.heads(move.piece.heads, kv=move.piece.kind in KV_KINDS)
        posted[move.step].append((move, cells))
        landing[move.lands].append((move, cells))
    for block in phase.blocks:
        computed[block.step].append(block)
    # For every (head, query) the keys computed at least once, and more than once.
    once = [[0] * atoms.num for _ in atoms.head_cuts[1:]]
    again = [[0] * atoms.num for _ in atoms.head_cuts[1:]]
    for step in range(phase.num_steps):
        for move, (tokens, heads) in posted[step]:
            kind = move.piece.kind
            missing = _missing(have.of(move.src, kind), tokens, heads)
            if missing:
                raise ScheduleError(
                    f"{name} step {step}: rank {move.src} sends {kind} of slots {atoms.ranges(missing)} to rank "
                    f"{move.dst} but does not hold it"
                )
            if kind in sum_kinds:
                have.take(move.src, kind, tokens, heads)
        for block in computed[step]:
            rows, columns = atoms.bits(block.q), atoms.bits(block.k)
            heads = atoms.heads(block.heads, kv=False)
            kv_heads = atoms.heads(kv_heads_of(block.heads, schedule.group_size), kv=True)
            for kind in input_kinds:
                place = (columns, kv_heads) if kind in KV_KINDS else (rows, heads)
                missing = _missing(have.of(block.rank, kind), *place)
                if missing:
                    raise ScheduleError(
                        f"{name} step {step}: rank {block.rank} computes on {kind} of slots {atoms.ranges(missing)} "
                        "before it has arrived"
                    )
            for kind in sum_kinds:
                have.add(block.rank, kind, *((columns, kv_heads) if kind in KV_KINDS else (rows, heads)))
            members = atoms.members(rows)
            for head in heads:
                head_once, head_again = once[head], again[head]
                for row in members:
                    head_again[row] |= head_once[row] & columns
                    head_once[row] |= columns
        for move, (tokens, heads) in landing[step]:
            have.add(move.dst, move.piece.kind, tokens, heads)
    for rank, tokens in enumerate(owned):
        for kind in sum_kinds:
            kept = 0
            for held in have.of(rank, kind):
                kept |= held & ~tokens
            if kept:
                where = atoms.ranges(kept)
                raise ScheduleError(f"{name}: rank {rank} keeps {kind} of slots {where}, which it does not own")
    for head, cut in enumerate(atoms.head_cuts[:-1]):
        for row, allowed in enumerate(atoms.allowed):
            never, twice = allowed & ~once[head][row], allowed & again[head][row]
            if never or twice:
                times = "0 times" if never else "more than once"
                raise ScheduleError(
                    f"{name}: head {cut}, queries of slots {atoms.ranges(1 << row)}, keys of slots "
                    f"{atoms.ranges(never or twice)} are computed {times}; every allowed pair must be once"
                )


def _missing(held: list[int], tokens: int, heads: Iterable[int]) -> int:
    missing = 0
    for head in heads:
        missing |= tokens & ~held[head]
    return missing
