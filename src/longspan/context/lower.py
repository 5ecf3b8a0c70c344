"""Lowering: from a global schedule to what one rank does, with every look-up done once.

The result says for each step which rectangles of which buffers are packed for which peer, which blocks run on which
bands, and where each result or arrival is written: first writes copy (or hand over the whole tensor), later ones merge.
Buffers live from their arrival or first write to their last use. Lowered programs hold plain integers and tuples only,
so that a data worker can build them and send them to the training process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple

from longspan.context.geometry import Atoms, Geometry, Range, Ranges, count, normalise, overlap, stretches
from longspan.context.passes import atoms_of
from longspan.context.program import Buffer, Compute, Fill, Landing, Part, Program, Receive, Region, Send, Step, Write
from longspan.context.schedule import (
    INPUTS,
    KV_KINDS,
    SUMS,
    Kind,
    Move,
    Phase,
    Piece,
    Schedule,
    kv_heads_of,
)


class Joint(NamedTuple):
    """Arrivals of one step that lie end to end in one buffer, by slot, with own tokens that are read along with them.

    ``moves`` are indices among the phase's moves.
    """

    moves: tuple[int, ...]
    piece: Piece
    own: Ranges
    kept: bool


def joints(phase: Phase, rank: int, own: Ranges, group_size: int) -> list[Joint]:
    """How a rank's arrivals of q and kv lie in memory, in the order of their first moves.

    Those that are posted and land together share a buffer: a block that reads them all then reads one tensor.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, move in enumerate(phase.moves):
        if move.dst == rank and move.piece.kind in ("q", "kv"):
            groups[move.piece.kind, move.piece.heads, move.step, move.lands, move.kept].append(index)
    reads: dict[Kind, list[tuple[Ranges, Range]]] = {"q": [], "kv": []}  # of blocks that read own tokens
    for block in phase.blocks:
        if block.rank == rank and overlap(block.q, own):
            reads["q"].append((block.q, block.heads))
        if block.rank == rank and overlap(block.k, own):
            reads["kv"].append((block.k, kv_heads_of(block.heads, group_size)))
    out = []
    for indices in groups.values():
        some = sorted(indices, key=lambda index: phase.moves[index].piece.tokens)
        pieces = [phase.moves[index].piece for index in some]
        apart = all(a.tokens[-1][1] <= b.tokens[0][0] for a, b in pairwise(pieces))
        for members in [tuple(some)] if apart else [(index,) for index in indices]:
            first = phase.moves[members[0]]
            kind, heads = first.piece.kind, first.piece.heads
            tokens = normalise(pair for index in members for pair in phase.moves[index].piece.tokens)
            beside: Ranges = ()
            for read, read_heads in reads[kind] if not overlap(tokens, own) else ():
                inside = heads[0] <= read_heads[0] and read_heads[1] <= heads[1]
                if inside and overlap(read, tokens) == tokens:
                    beside = normalise((*beside, *overlap(read, own)))
            piece = Piece(kind, normalise((*tokens, *beside)), heads)
            out.append(Joint(members, piece, beside, first.kept))
    return out


Held = dict[int, int]  # buffer -> the atoms that are read from it


class _Lowering:
    """Symbolic execution of one rank's part of a phase."""

    def __init__(self, phase: Phase, schedule: Schedule, atoms: Atoms, rank: int, *, backward: bool) -> None:
        self.atoms, self.rank = atoms, rank
        self.steps = tuple(Step() for _ in range(phase.num_steps))
        self.buffers: list[Buffer] = []
        self.where: dict[Kind, list[Held]] = {}  # by head atom
        self.inputs: tuple[Kind, ...] = ("q", "kv", "do") if backward else ("q", "kv")
        self.sums: tuple[Kind, ...] = ("dq", "dkv") if backward else ("o",)
        self.own_tokens: Ranges = (schedule.layout.owned(rank),) if schedule.layout.local_sizes[rank] else ()
        self.own_atoms = atoms.bits(self.own_tokens)
        self.own_sum: dict[Kind, int] = {}
        self._places: dict[Ranges, tuple[list[int], list[int]]] = {}
        self.saved: list[int] = []
        # Buffers of arrivals and own tokens, complete: what lies in one of these is read there.
        self.whole: dict[Kind, list[tuple[int, int, Range]]] = defaultdict(list)
        for kind in (*self.inputs, *self.sums):
            heads = schedule.num_kv_heads if kind in KV_KINDS else schedule.num_heads
            self.where[kind] = [{} for _ in self._head_cuts(kind)[1:]]
            buffer = self.new(Piece(kind, self.own_tokens, (0, heads)), 0)
            self.buffers[buffer].dies = phase.num_steps
            if kind in SUMS:
                self.own_sum[kind] = buffer
            else:
                self.where[kind] = [{buffer: self.own_atoms} for _ in self.where[kind]]
        if backward:
            for joint in joints(schedule.forward, rank, self.own_tokens, schedule.group_size):
                if joint.kept:
                    buffer = self.keep(self.new(joint.piece, 0))
                    for index in joint.moves:
                        self.arrive(schedule.forward.moves[index].piece, buffer)
                    self.complete(joint, buffer)

    def _head_cuts(self, kind: Kind) -> list[int]:
        return self.atoms.kv_head_cuts if kind in KV_KINDS else self.atoms.head_cuts

    def _heads(self, piece: Piece) -> range:
        return self.atoms.heads(piece.heads, kv=piece.kind in KV_KINDS)

    def new(self, piece: Piece, step: int) -> int:
        """A buffer for a piece."""
        self.buffers.append(Buffer(piece, step, step))
        return len(self.buffers) - 1

    def keep(self, buffer: int) -> int:
        """Let a buffer live beyond the phase, among the saved ones."""
        self.buffers[buffer].dies = len(self.steps)
        self.saved.append(buffer)
        return buffer

    def _place(self, tokens: Ranges, slot: int) -> int:
        """How many tokens of the ranges come before a slot."""
        table = self._places.get(tokens)
        if table is None:
            sizes = [stop - start for start, stop in tokens]
            bases = [before - start for before, (start, _) in zip(accumulate(sizes, initial=0), tokens, strict=False)]
            table = self._places[tokens] = [start for start, _ in tokens], bases
        starts, bases = table
        return slot + bases[bisect_right(starts, slot) - 1]

    def place(self, buffer: int, slot: int) -> int:
        """The row of a slot in a buffer."""
        return self._place(self.buffers[buffer].piece.tokens, slot)

    def _parts(self, piece: Piece, columns: list[Held]) -> tuple[Part, ...]:
        """Where the tokens of a piece lie, given for each of its head atoms; heads that lie alike go together."""
        cuts, first_head = self._head_cuts(piece.kind), self._heads(piece).start
        parts: list[Part] = []
        for first, last in stretches(columns):
            head, num_heads = cuts[first_head + first], cuts[first_head + last] - cuts[first_head + first]
            if len(columns[first]) == 1:
                ((buffer, tokens),) = columns[first].items()
                source = self.buffers[buffer].piece
                if source.tokens == piece.tokens and tokens == self.atoms.bits(piece.tokens):
                    heads = head - source.heads[0], head - piece.heads[0]
                    parts.append(Part(buffer, 0, heads[0], 0, heads[1], count(piece.tokens), num_heads))
                    continue
            runs = [
                (self._place(piece.tokens, start), self._place(held_tokens, start), buffer, stop - start)
                for buffer, tokens in columns[first].items()
                for held_tokens in (self.buffers[buffer].piece.tokens,)
                for start, stop in self.atoms.ranges(tokens)
            ]
            joined: list[tuple[int, int, int, int]] = []
            for to_token, token, buffer, num in sorted(runs):
                if joined:
                    last_to, last_token, last_buffer, last_num = joined[-1]
                    if buffer == last_buffer and to_token == last_to + last_num and token == last_token + last_num:
                        joined[-1] = (last_to, last_token, buffer, last_num + num)
                        continue
                joined.append((to_token, token, buffer, num))
            for to_token, token, buffer, num in joined:
                base = self.buffers[buffer].piece.heads[0]
                parts.append(Part(buffer, token, head - base, to_token, head - piece.heads[0], num, num_heads))
        return tuple(parts)

    def _use(self, parts: Iterable[Part], step: int) -> None:
        for part in parts:
            self.buffers[part.buffer].dies = max(self.buffers[part.buffer].dies, step)

    def region(self, piece: Piece, step: int) -> Region:
        """Where the cells of a piece lie now. They must all be present (the checker has seen to it)."""
        tokens, where = self.atoms.bits(piece.tokens), self.where[piece.kind]
        columns = [_within(where[head], tokens) for head in self._heads(piece)]
        if any(len(held) > 1 for held in columns):
            for buffer, cells, heads in self.whole[piece.kind]:
                if not tokens & ~cells and heads[0] <= piece.heads[0] and piece.heads[1] <= heads[1]:
                    columns = [{buffer: tokens}] * len(columns)
                    break
        assert all(_union(held) == tokens for held in columns), f"rank {self.rank} lacks {piece} at step {step}"
        parts = self._parts(piece, columns)
        self._use(parts, step)
        return Region(piece.kind, count(piece.tokens), piece.heads[1] - piece.heads[0], parts)

    def write(self, piece: Piece, step: int) -> Write:
        """Route a result or arrival with the piece's shape into accumulators, making them where there are none."""
        kind, where, heads = piece.kind, self.where[piece.kind], self._heads(piece)
        tokens, own = self.atoms.bits(piece.tokens), self.own_sum[piece.kind]
        merging = [_within(where[head], tokens) for head in heads]
        fresh = [tokens & ~_union(held) for held in merging]
        whole = piece == self.buffers[own].piece
        if all(cells == tokens for cells in fresh) and (whole or not tokens & self.own_atoms):
            buffer = own if whole else self.new(piece, step)
            for head in heads:
                where[head][buffer] = where[head].get(buffer, 0) | tokens
            return Write(kind, buffer, (), ())
        copying: list[Held] = [{own: cells & self.own_atoms} if cells & self.own_atoms else {} for cells in fresh]
        foreign = [cells & ~self.own_atoms for cells in fresh]
        cuts = self._head_cuts(kind)
        for first, last in stretches(foreign):
            if foreign[first]:
                some = cuts[heads.start + first], cuts[heads.start + last]
                buffer = self.new(Piece(kind, self.atoms.ranges(foreign[first]), some), step)
                for held in copying[first:last]:
                    held[buffer] = foreign[first]
        for head, held in zip(heads, copying, strict=True):
            for buffer, cells in held.items():
                where[head][buffer] = where[head].get(buffer, 0) | cells
        copies, merges = self._parts(piece, copying), self._parts(piece, merging)
        self._use((*copies, *merges), step)
        return Write(kind, None, copies, merges)

    def arrive(self, piece: Piece, buffer: int) -> None:
        """An input lands: cells not held already are read from its buffer from now on."""
        tokens = self.atoms.bits(piece.tokens)
        for head in self._heads(piece):
            held = self.where[piece.kind][head]
            fresh = tokens & ~_union(held)
            if fresh:
                held[buffer] = held.get(buffer, 0) | fresh

    def complete(self, joint: Joint, buffer: int) -> None:
        """All of a joint's arrivals have landed in its buffer."""
        if joint.own:
            self.whole[joint.piece.kind].append((buffer, self.atoms.bits(joint.piece.tokens), joint.piece.heads))

    def fill(self, joint: Joint, buffer: int) -> Fill:
        """How a joint's own tokens get to their place."""
        first, last = joint.piece.heads
        parts = tuple(
            Part(
                self.inputs.index(joint.piece.kind),
                start - self.own_tokens[0][0],
                first,
                self._place(joint.piece.tokens, start),
                0,
                stop - start,
                last - first,
            )
            for start, stop in joint.own
        )
        return Fill(joint.piece.kind, buffer, parts)

    def take(self, move: Move, step: int) -> Region:
        """The region of a move; sums leave."""
        region = self.region(move.piece, step)
        if move.piece.kind in SUMS:
            tokens, where = self.atoms.bits(move.piece.tokens), self.where[move.piece.kind]
            for head in self._heads(move.piece):
                where[head] = _within(where[head], ~tokens)
        return region

    def unwritten(self, kind: Kind) -> tuple[Part, ...]:
        """The own sums of a kind that nothing has written."""
        own = self.own_sum[kind]
        columns = [self.own_atoms & ~held.get(own, 0) for held in self.where[kind]]
        return self._parts(self.buffers[own].piece, [{own: cells} if cells else {} for cells in columns])


def _within(held: Held, tokens: int) -> Held:
    return {buffer: some for buffer, cells in held.items() if (some := cells & tokens)}


def _union(held: Held) -> int:
    union = 0
    for cells in held.values():
        union |= cells
    return union


def lower_all(phase: Phase, schedule: Schedule, geometry: Geometry, *, backward: bool) -> list[Program]:
    """Every rank's program of a (pruned, checked) phase."""
    atoms = atoms_of(phase, schedule, geometry)
    ranks = range(schedule.layout.world)
    return [lower(phase, schedule, geometry, rank, backward=backward, atoms=atoms) for rank in ranks]


def lower(
    phase: Phase, schedule: Schedule, geometry: Geometry, rank: int, *, backward: bool, atoms: Atoms | None = None
) -> Program:
    """One rank's program of a (pruned, checked) phase; ``atoms`` where the caller has them already."""
    atoms = atoms_of(phase, schedule, geometry) if atoms is None else atoms
    state = _Lowering(phase, schedule, atoms, rank, backward=backward)
    posted, landing, computed = defaultdict(list), defaultdict(list), defaultdict(list)
    for index, move in enumerate(phase.moves):
        if rank in (move.src, move.dst):
            posted[move.step].append((index, move))
        if rank == move.dst:
            landing[move.lands].append((index, move))
    for block in phase.blocks:
        if block.rank == rank:
            computed[block.step].append(block)
    receive_of: dict[int, int] = {}
    num_sends = 0
    arrival_of: dict[int, int] = {}
    joint_of: dict[int, Joint] = {}
    for joint in joints(phase, rank, state.own_tokens, schedule.group_size):
        first = phase.moves[joint.moves[0]]
        buffer = state.new(joint.piece, first.step)
        state.buffers[buffer].dies = first.lands
        if joint.kept:
            state.keep(buffer)
        if joint.own:
            state.steps[first.step].fills.append(state.fill(joint, buffer))
        for index in joint.moves:
            arrival_of[index], joint_of[index] = buffer, joint
    for number, step in enumerate(state.steps):
        for index, move in posted[number]:
            if move.src == rank:
                region, span = state.take(move, number), move.lands - move.step + 1
                step.sends.append(Send(num_sends, move.dst, move.lane, region, move.complete, span))
                num_sends += 1
                continue
            piece = move.piece
            receive_of[index] = len(receive_of)
            if index not in arrival_of:
                arrival_of[index] = state.new(piece, number)
                state.buffers[arrival_of[index]].dies = move.lands
            num_heads, buffer, token = piece.heads[1] - piece.heads[0], None, 0
            if piece.kind in INPUTS:
                buffer = arrival_of[index]
                token = state.place(buffer, piece.tokens[0][0])
            step.receives.append(
                Receive(
                    receive_of[index],
                    move.src,
                    move.lane,
                    piece.kind,
                    count(piece.tokens),
                    num_heads,
                    buffer,
                    token,
                    move.complete,
                )
            )
        for block in computed[number]:
            kv_heads = kv_heads_of(block.heads, schedule.group_size)
            q = state.region(Piece("q", block.q, block.heads), number)
            kv = state.region(Piece("kv", block.k, kv_heads), number)
            do = state.region(Piece("do", block.q, block.heads), number) if backward else None
            writes = [state.write(Piece("dq" if backward else "o", block.q, block.heads), number)]
            if backward:
                writes.append(state.write(Piece("dkv", block.k, kv_heads), number))
            bands = geometry.bands(block.q, block.k)
            step.computes.append(Compute(q, kv, do, block.heads, kv_heads, bands, tuple(writes)))
        for index, move in landing[number]:
            if move.piece.kind in SUMS:
                step.landings.append(Landing(receive_of[index], state.write(move.piece, number)))
            else:
                state.arrive(move.piece, arrival_of[index])
                joint = joint_of.get(index)
                if joint is not None and index == max(joint.moves):
                    state.complete(joint, arrival_of[index])
                step.landings.append(Landing(receive_of[index], None))
    own = (*state.inputs, *state.sums)
    for index, buffer in enumerate(state.buffers[len(own) :], len(own)):
        if buffer.dies < len(state.steps):
            state.steps[buffer.dies].frees.append(index)
    return Program(
        rank,
        schedule.layout.local_sizes[rank],
        schedule.group_size,
        own,
        state.steps,
        tuple(state.buffers),
        tuple(state.unwritten(kind) for kind in state.sums),
        tuple(state.saved),
        _packed(state),
    )


def _packed(state: _Lowering) -> tuple[int, ...]:
    sent: dict[int, int] = defaultdict(int)
    for step in state.steps:
        for send in step.sends:
            for part in send.region.parts if send.region.kind in ("q", "kv") and len(send.region.parts) == 1 else ():
                piece = state.buffers[part.buffer].piece
                if part.buffer < len(state.inputs) and part.num_heads == piece.heads[1] - piece.heads[0]:
                    sent[part.buffer] += part.num_tokens
    return tuple(buffer for buffer, num in sorted(sent.items()) if num > count(state.own_tokens))
