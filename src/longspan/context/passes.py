"""Passes over schedules: derive the backward phase, prune what the mask makes idle.

``replay`` turns a forward phase into a backward one: inputs take the paths they took, ``do`` rides with q, dq takes
o's path, and dkv either goes home directly or follows the keys round their path and then home. ``prune`` is liveness
analysis over atoms: an input move keeps only what some later block or move of the receiver needs, a move of sums only
what exists. On a ring that turns towards lower ranks it finds the three-quarter-volume causal forward by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from longspan.context.geometry import Atoms, Geometry, Range, Ranges, count, normalise, stretches
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
    kv_heads_of,
    ordered,
)
from longspan.layout.tokens import Layout


def replay(
    forward: Phase, layout: Layout, num_heads: int, num_kv_heads: int, *, dkv: Literal["home", "follow"]
) -> Phase:
    """The backward phase that recomputes every block where the forward phase computed it.

    ``dkv="follow"``: the keys' gradient hops behind the keys, one step later, and its last holder sends it home; for
    keys that hop from rank to rank, so that each rank sends one hop a step. ``dkv="home"``: every rank sends the
    gradient of foreign keys straight to their owner in the step after it last computed on them.
    """
    moves: list[Move] = []
    for move in forward.moves:
        kind = move.piece.kind
        if kind == "o":
            moves.append(replace(move, piece=replace(move.piece, kind="dq")))
            continue
        moves.append(move)
        if kind == "q":
            moves.append(replace(move, piece=replace(move.piece, kind="do")))
    carried = _follow(forward, layout) if dkv == "follow" else _home(forward, layout, num_heads // num_kv_heads)
    return Phase(ordered([*moves, *carried], layout.world), forward.blocks)


def _owners(layout: Layout, tokens: Ranges) -> list[tuple[int, Ranges]]:
    """The parts of ranges of slots by owner."""
    parts = []
    for rank in range(layout.world):
        start, stop = layout.owned(rank)
        mine = tuple((max(a, start), min(b, stop)) for a, b in tokens if max(a, start) < min(b, stop))
        if mine:
            parts.append((rank, mine))
    return parts


def _home(forward: Phase, layout: Layout, group_size: int) -> Iterable[Move]:
    """Each (rank, owner) pair's key gradients, sent once, after the rank's last block on that owner's keys."""
    last: dict[tuple[int, int, Range], tuple[int, set[tuple[int, int]]]] = {}
    for block in forward.blocks:
        for owner, tokens in _owners(layout, block.k):
            if owner == block.rank:
                continue
            key = (block.rank, owner, kv_heads_of(block.heads, group_size))
            step, seen = last.get(key, (-1, set()))
            last[key] = (max(step, block.step), seen | set(tokens))
    for (rank, owner, heads), (step, tokens) in last.items():
        yield Move(step + 1, rank, owner, Piece("dkv", normalise(tokens), heads))


def _follow(forward: Phase, layout: Layout) -> Iterable[Move]:
    """dkv hops along the keys' own path, starting at the first rank after the owner, and then home."""
    hops: dict[tuple[Ranges, Range], list[Move]] = defaultdict(list)
    for move in sorted((m for m in forward.moves if m.piece.kind == "kv"), key=lambda m: m.step):
        if count(move.piece.tokens):  # with fewer tokens than ranks, some ranks have no keys to send
            hops[move.piece.tokens, move.piece.heads].append(move)
    last_use: dict[int, list[tuple[int, Ranges]]] = defaultdict(list)
    for block in forward.blocks:
        last_use[block.rank].append((block.step, block.k))
    for (tokens, heads), path in hops.items():
        for previous, move in pairwise(path):
            if previous.dst != move.src:
                raise ValueError(
                    f"dkv can follow only keys that hop from rank to rank, but those of rank {path[0].src} go "
                    f"{previous.src}->{previous.dst} and then {move.src}->{move.dst}; use dkv='home'"
                )
        ready = 0
        for move, following in zip(path, [*path[1:], None], strict=True):
            rank = move.dst
            used = [step for step, k in last_use[rank] if any(a < d and c < b for a, b in k for c, d in tokens)]
            ready = max([ready, *(step + 1 for step in used)])
            target = path[0].src if following is None else following.dst
            if target != rank:
                yield Move(ready, rank, target, Piece("dkv", tokens, heads))
            ready += 1


def atoms_of(phase: Phase, schedule: Schedule, geometry: Geometry) -> Atoms:
    """The atoms fine enough for every piece and block of a phase."""
    group_size = schedule.group_size
    ranges = {move.piece.tokens for move in phase.moves}
    heads, kv_heads = {(0, schedule.num_heads)}, {(0, schedule.num_kv_heads)}
    for block in phase.blocks:
        ranges.add(block.q)
        ranges.add(block.k)
        heads.add(block.heads)
    kv_heads |= {kv_heads_of(block_heads, group_size) for block_heads in heads}
    for move in phase.moves:
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


def prune_schedule(schedule: Schedule, geometry: Geometry) -> Schedule:
    """Both phases pruned for a mask."""
    return replace(
        schedule,
        forward=prune(schedule.forward, schedule, geometry, backward=False),
        backward=prune(schedule.backward, schedule, geometry, backward=True),
    )
