"""Passes over schedules: derive the backward phase, prune what the mask makes idle.

``replay`` turns a forward phase into a backward one: inputs take the paths they took, ``do`` rides with q, dq takes
o's path, and dkv either goes home directly or follows the keys round their path and then home. ``prune`` is liveness
analysis over atoms: an input move keeps only what some later block or move of the receiver needs, a move of sums only
what exists. On a ring that turns towards lower ranks it finds the three-quarter-volume causal forward by itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np

from longspan.context.geometry import Atoms, Geometry, Range, Ranges, normalise, stretches
from longspan.context.schedule import (
    INPUTS,
    KV_KINDS,
    SUMS,
    Block,
    Kind,
    Move,
    Phase,
    Piece,
    Schedule,
    homewards,
    kv_heads_of,
    ordered,
)
from longspan.layout.tokens import Layout


def derived(
    name: str,
    layout: Layout,
    num_heads: int,
    num_kv_heads: int,
    forward: Phase,
    *,
    dkv: Literal["home", "follow"] = "home",
) -> Schedule:
    """A schedule whose backward phase is the replay of its forward phase (and anew when that is pruned)."""
    backward = replay(forward, layout, num_heads // num_kv_heads, dkv=dkv)
    return Schedule(name, layout, num_heads, num_kv_heads, forward, backward, dkv)


def combined(forward: Schedule, backward: Schedule) -> Schedule:
    """The forward phase of one schedule with the backward phase of another, on one layout; nothing is kept between."""
    first, second = (Phase(tuple(replace(m, kept=False) for m in s.forward.moves), s.forward.blocks)
                     for s in (forward, backward))  # fmt: skip
    phase = backward.backward
    if backward.dkv is not None:
        phase = replay(second, backward.layout, backward.group_size, dkv=backward.dkv)
    name = f"{forward.name}+{backward.name}"
    return replace(forward, name=name, forward=first, backward=phase, dkv=backward.dkv, replayed=second)


def replay(forward: Phase, layout: Layout, group_size: int, *, dkv: Literal["home", "follow"]) -> Phase:
    """The backward phase that recomputes every block where the forward phase computed it.

    ``dkv="follow"``: the keys' gradient hops behind the keys, one step later, and its last holder sends it home; for
    keys that hop from rank to rank, so that each rank sends one hop a step. ``dkv="home"``: every rank sends the
    gradient of foreign keys straight to their owner in the step after it last computed on them. Inputs that the
    forward phase keeps are not sent again.
    """
    carried = (_follow if dkv == "follow" else _home)(forward, layout, group_size)
    return Phase(ordered([*again(forward.moves), *carried], layout.world), forward.blocks)


def turned(blocks: Sequence[Block], last: int) -> tuple[Block, ...]:
    """Blocks of steps 0 to ``last`` in the opposite order."""
    return tuple(replace(block, step=last - block.step) for block in reversed(blocks))


def again(moves: Iterable[Move]) -> Iterator[Move]:
    """What a backward phase repeats of a forward phase's moves: all but kept inputs, with do beside q and dq for o."""
    for move in moves:
        kind = move.piece.kind
        if kind == "o":
            yield replace(move, piece=replace(move.piece, kind="dq"))
        elif not move.kept:
            yield move
        if kind == "q":
            yield replace(move, piece=replace(move.piece, kind="do"), kept=False)


def _owners(layout: Layout, tokens: Ranges) -> Iterator[tuple[int, Range]]:
    """The parts of ranges of slots by owner."""
    for start, stop in tokens:
        rank = bisect_right(layout.offsets, start) - 1
        while start < stop:
            end = min(stop, layout.offsets[rank + 1])
            if start < end:
                yield rank, (start, end)
            start, rank = end, rank + 1


def _home(forward: Phase, layout: Layout, group_size: int) -> Iterator[Move]:
    """Each (rank, owner) pair's key gradients, sent once, after the rank's last block on that owner's keys."""
    last: dict[tuple[int, int, Range], tuple[int, list[Range]]] = {}
    for block in forward.blocks:
        kv_heads = kv_heads_of(block.heads, group_size)
        for owner, part in _owners(layout, block.k):
            if owner != block.rank:
                step, seen = last.get((block.rank, owner, kv_heads), (-1, []))
                last[block.rank, owner, kv_heads] = max(step, block.step), [*seen, part]
    for (rank, owner, heads), (step, tokens) in last.items():
        yield homewards(step + 1, rank, owner, Piece("dkv", normalise(tokens), heads))


def _follow(forward: Phase, layout: Layout, group_size: int) -> Iterator[Move]:
    """dkv hops along the keys' own path, over the ranks that computed on them, and then home."""
    hops = sorted((m for m in forward.moves if m.piece.kind == "kv"), key=lambda m: m.step)
    edges = sorted({slot for move in hops for interval in move.piece.tokens for slot in interval})
    paths: dict[tuple[Range, Range], list[Move]] = defaultdict(list)
    for move in hops:
        for start, stop in move.piece.tokens:
            inside = edges[bisect_left(edges, start) : bisect_right(edges, stop)]
            for interval in pairwise(inside):
                paths[interval, move.piece.heads].append(move)
    # Tokens that go the same way go together.
    together: dict[tuple[tuple[Move, ...], Range], list[Range]] = defaultdict(list)
    for (interval, heads), path in paths.items():
        together[tuple(path), heads].append(interval)
    blocks: dict[int, list[tuple[int, Ranges, Range]]] = defaultdict(list)
    for block in forward.blocks:
        blocks[block.rank].append((block.step, block.k, kv_heads_of(block.heads, group_size)))
    for (path, heads), intervals in together.items():
        tokens = normalise(intervals)
        for previous, move in pairwise(path):
            if previous.dst != move.src:
                raise ValueError(
                    f"dkv can follow only keys that hop from rank to rank, but those of rank {path[0].src} go "
                    f"{previous.src}->{previous.dst} and then {move.src}->{move.dst}; use dkv='home'"
                )
        uses = ((move.dst, _last_use(blocks[move.dst], tokens, heads)) for move in path)
        users = [(rank, step) for rank, step in uses if step is not None]
        ready = 0
        for number, (rank, step) in enumerate(users):
            target = users[number + 1][0] if number + 1 < len(users) else path[0].src
            ready = max(ready, step + 1)
            if target != rank:
                yield Move(ready, rank, target, Piece("dkv", tokens, heads))
            ready += 1


def _last_use(blocks: Iterable[tuple[int, Ranges, Range]], tokens: Ranges, heads: Range) -> int | None:
    """The last step at which a block reads some of the tokens of some of the KV heads."""
    steps = [
        step
        for step, k, (first, last) in blocks
        if first < heads[1] and heads[0] < last and any(a < d and c < b for a, b in k for c, d in tokens)
    ]
    return max(steps, default=None)


def atoms_of(phase: Phase, schedule: Schedule, geometry: Geometry) -> Atoms:
    """The atoms fine enough for every piece and block of a phase."""
    group_size = schedule.group_size
    ranges: set[Ranges] = set()
    heads, kv_heads = {(0, schedule.num_heads)}, {(0, schedule.num_kv_heads)}
    for block in phase.blocks:
        ranges.add(block.q)
        ranges.add(block.k)
        heads.add(block.heads)
    kv_heads |= {kv_heads_of(block_heads, group_size) for block_heads in heads}
    kept = (move for move in schedule.forward.moves if move.kept)  # a backward phase starts with these
    for move in (*phase.moves, *kept):
        ranges.add(move.piece.tokens)
        (kv_heads if move.piece.kind in KV_KINDS else heads).add(move.piece.heads)
    slots = {slot for tokens in ranges for pair in tokens for slot in pair}
    return geometry.atoms(slots, (cut for pair in heads for cut in pair), (cut for pair in kv_heads for cut in pair))


class Liveness:
    """For every (rank, kind) and head atom a set of token atoms: what a rank holds, or needs."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self._sets: dict[tuple[int, Kind], list[int]] = {}

    def of(self, rank: int, kind: Kind) -> list[int]:
        """The sets of one rank and kind, by head atom; empty at first."""
        found = self._sets.get((rank, kind))
        if found is None:
            cuts = self.atoms.kv_head_cuts if kind in KV_KINDS else self.atoms.head_cuts
            found = self._sets[rank, kind] = [0] * (len(cuts) - 1)
        return found

    def add(self, rank: int, kind: Kind, tokens: int, heads: Iterable[int]) -> None:
        sets = self.of(rank, kind)
        for head in heads:
            sets[head] |= tokens

    def take(self, rank: int, kind: Kind, tokens: int, heads: Iterable[int]) -> list[int]:
        """Remove tokens of some heads; returns those that were there, by head."""
        sets, taken = self.of(rank, kind), []
        for head in heads:
            taken.append(sets[head] & tokens)
            sets[head] &= ~tokens
        return taken


def prune(phase: Phase, schedule: Schedule, geometry: Geometry, *, backward: bool) -> Phase:
    """The phase without blocks that no pair of the mask needs and without data that nobody reads or that never exists.

    Blocks are narrowed to the rows and columns (at the atoms' resolution) that have an allowed pair.
    """
    atoms = atoms_of(phase, schedule, geometry)
    num_steps, group_size = phase.num_steps, schedule.group_size
    blocks = _narrowed(phase.blocks, atoms)
    by_post: list[list[int]] = [[] for _ in range(num_steps)]
    by_land: list[list[int]] = [[] for _ in range(num_steps)]
    by_block: list[list[tuple[int, int, int, range, range]]] = [[] for _ in range(num_steps)]
    places = []
    for index, move in enumerate(phase.moves):
        by_post[move.step].append(index)
        by_land[move.lands].append(index)
        piece = move.piece
        places.append((atoms.bits(piece.tokens), atoms.heads(piece.heads, kv=piece.kind in KV_KINDS)))
    for block in blocks:
        heads = atoms.heads(block.heads, kv=False)
        kv_heads = atoms.heads(kv_heads_of(block.heads, group_size), kv=True)
        by_block[block.step].append((block.rank, atoms.bits(block.q), atoms.bits(block.k), heads, kv_heads))
    parts: list[list[int]] = [[] for _ in phase.moves]
    needed = Liveness(atoms)
    for step in reversed(range(num_steps)):
        for index in reversed(by_land[step]):
            move = phase.moves[index]
            if move.piece.kind in INPUTS:
                parts[index] = needed.take(move.dst, move.piece.kind, *places[index])
        for rank, q, k, heads, kv_heads in by_block[step]:
            needed.add(rank, "q", q, heads)
            if backward:
                needed.add(rank, "do", q, heads)
            needed.add(rank, "kv", k, kv_heads)
        for index in by_post[step]:
            move = phase.moves[index]
            if move.piece.kind in INPUTS:
                _put(needed.of(move.src, move.piece.kind), places[index][1], parts[index])
    exists = Liveness(atoms)
    for step in range(num_steps):
        for index in by_post[step]:
            move = phase.moves[index]
            if move.piece.kind in SUMS:
                parts[index] = exists.take(move.src, move.piece.kind, *places[index])
        for rank, q, k, heads, kv_heads in by_block[step]:
            exists.add(rank, "dq" if backward else "o", q, heads)
            if backward:
                exists.add(rank, "dkv", k, kv_heads)
        for index in by_land[step]:
            move = phase.moves[index]
            if move.piece.kind in SUMS:
                _put(exists.of(move.dst, move.piece.kind), places[index][1], parts[index])
    moves: list[Move] = []
    for move, (tokens, heads), part in zip(phase.moves, places, parts, strict=True):
        if all(cells == tokens for cells in part) and tokens:
            moves.append(move)
            continue
        cuts = atoms.kv_head_cuts if move.piece.kind in KV_KINDS else atoms.head_cuts
        for first, last in stretches(part):
            if part[first]:
                some = cuts[heads.start + first], cuts[heads.start + last]
                moves.append(replace(move, piece=Piece(move.piece.kind, atoms.ranges(part[first]), some)))
    return Phase(tuple(moves), tuple(blocks))


def _put(sets: list[int], heads: range, parts: list[int]) -> None:
    for head, part in zip(heads, parts, strict=True):
        sets[head] |= part


def _narrowed(blocks: Iterable[Block], atoms: Atoms) -> list[Block]:
    out = []
    for block in blocks:
        columns, q, k = atoms.bits(block.k), 0, 0
        for row in atoms.members(atoms.bits(block.q)):
            some = atoms.allowed[row] & columns
            if some:
                q |= 1 << row
                k |= some
        if q:
            out.append(replace(block, q=atoms.ranges(q), k=atoms.ranges(k)))
    return out


def mark_complete(phase: Phase, schedule: Schedule, geometry: Geometry, *, backward: bool) -> Phase:
    """The (pruned) phase with the moves of sums that lack no contribution marked as complete.

    Every block adds one contribution to each cell (token, head) of its sums; a sum in flight is complete where it has
    collected as many as its cells get in all.
    """
    if not any(move.piece.kind in SUMS for move in phase.moves):
        return phase
    atoms = atoms_of(phase, schedule, geometry)
    kinds: tuple[Kind, ...] = ("dq", "dkv") if backward else ("o",)
    num_heads = {kind: len(atoms.kv_head_cuts if kind in KV_KINDS else atoms.head_cuts) - 1 for kind in kinds}
    total = {kind: np.zeros((num_heads[kind], atoms.num), np.int32) for kind in kinds}
    ranks = range(schedule.layout.world)
    held = {(rank, kind): np.zeros_like(total[kind]) for rank in ranks for kind in kinds}
    by_post, by_land, by_block = defaultdict(list), defaultdict(list), defaultdict(list)

    def cells(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        heads = atoms.heads(piece.heads, kv=piece.kind in KV_KINDS)
        members = np.array(atoms.members(atoms.bits(piece.tokens)), dtype=np.int64)
        return np.arange(heads.start, heads.stop)[:, None], members[None, :]

    for block in phase.blocks:
        kv_heads = kv_heads_of(block.heads, schedule.group_size)
        for kind in kinds:
            at = cells(Piece(kind, block.k, kv_heads) if kind == "dkv" else Piece(kind, block.q, block.heads))
            total[kind][at] += 1
            by_block[block.step].append((held[block.rank, kind], at))
    for index, move in enumerate(phase.moves):
        if move.piece.kind in SUMS:
            by_post[move.step].append((index, move))
            by_land[move.lands].append((index, move))
    moves, carried = list(phase.moves), {}
    for step in range(phase.num_steps):
        for index, move in by_post[step]:
            kind, at = move.piece.kind, cells(move.piece)
            source = held[move.src, kind]
            carried[index] = source[at]
            source[at] = 0
            if np.array_equal(carried[index], total[kind][at]):
                moves[index] = replace(move, complete=True)
        for array, at in by_block[step]:
            array[at] += 1
        for index, move in by_land[step]:
            held[move.dst, move.piece.kind][cells(move.piece)] += carried.pop(index)
    return Phase(tuple(moves), phase.blocks)


def prune_schedule(schedule: Schedule, geometry: Geometry) -> Schedule:
    """Both phases pruned for a mask, with the sums that travel complete marked.

    A derived backward phase is derived from the pruned forward phase: gradients then go home from the last rank that
    adds to them, not from the last that the keys could have reached.
    """
    forward = prune(schedule.forward, schedule, geometry, backward=False)
    schedule = replace(schedule, forward=mark_complete(forward, schedule, geometry, backward=False))
    backward = schedule.backward
    if schedule.dkv is not None:
        if schedule.replayed is not None:
            forward = prune(schedule.replayed, schedule, geometry, backward=False)
        backward = replay(forward, schedule.layout, schedule.group_size, dkv=schedule.dkv)
    backward = prune(backward, schedule, geometry, backward=True)
    return replace(schedule, backward=mark_complete(backward, schedule, geometry, backward=True))
