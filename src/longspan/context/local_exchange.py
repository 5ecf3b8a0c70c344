"""One rank's part of Ulysses and USP, without the list of all ranks' moves; see ``context.local``.

Ranks form groups of ``degree``. Inside a group tokens are exchanged for heads, and the groups' keys form a ring. What
pruning finds out follows from which groups read an atom of the keys: a key is fetched if any group reads it, is passed
on as far as the last group that does, and its gradient goes straight to its owner from every rank that read it. Queries
travel, and outputs come back complete, where a query reads any key.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longspan.context.geometry import Geometry
from longspan.context.reads import Reads, last_hop, reads_of
from longspan.context.schedule import (
    Block,
    Kind,
    Move,
    Phase,
    Piece,
    Range,
    Schedule,
    head_ranges,
    kv_heads_of,
    ordered,
)


def exchange_schedule(
    name: str, degree: int, geometry: Geometry, num_heads: int, num_kv_heads: int, rank: int
) -> Schedule:
    """The moves from and to a rank and its blocks, pruned, in the global order. ``degree`` divides the ranks."""
    part = _Exchange(reads_of(geometry), degree, num_heads, num_heads // num_kv_heads, rank)
    world, blocks = geometry.layout.world, tuple(part.blocks())
    fetched, ring = [*part.inputs("q"), *part.inputs("kv")], [*part.ring()]
    forward = Phase(ordered([*fetched, *ring, *part.results("o")], world), blocks)
    again = [*part.inputs("do"), *ring, *part.results("dq"), *part.gradients()]
    return Schedule(name, geometry.layout, num_heads, num_kv_heads, forward, Phase(ordered(again, world), blocks))


def _any(marks: np.ndarray, axis: int) -> np.ndarray:
    return np.logical_or.reduce(marks, axis=axis)


class _Exchange:
    """Authors one rank's part."""

    def __init__(self, reads: Reads, degree: int, num_heads: int, group_size: int, rank: int) -> None:
        world = len(reads.edges) - 1
        self.reads, self.degree, self.rank, self.num_groups = reads, degree, rank, world // degree
        self.group, self.place = divmod(rank, degree)
        self.shares = head_ranges(num_heads, degree)
        self.kv_shares = [kv_heads_of(share, group_size) for share in self.shares]
        # (groups, atoms): whether the group reads some key of the atom; some query of the atom reads the group's keys.
        self.keys, self.queries = (
            _any(marks.reshape(self.num_groups, degree, -1), 1) for marks in (reads.keys, reads.queries)
        )
        self.mates = [mate for mate in range(self.group * degree, (self.group + 1) * degree) if mate != rank]

    def _has_heads(self, place: int) -> bool:
        return self.shares[place][0] < self.shares[place][1]

    def _atoms(self, first: int, last: int, marks: np.ndarray) -> np.ndarray:
        """The marked atoms of the owners from ``first`` up to ``last``."""
        start, stop = self.reads.edges[first], self.reads.edges[last]
        return np.flatnonzero(marks[start:stop]) + start

    def _of_group(self, group: int, marks: np.ndarray) -> np.ndarray:
        return self._atoms(group * self.degree, (group + 1) * self.degree, marks)

    def _piece(self, kind: Kind, atoms: np.ndarray, heads: Range) -> Piece:
        return Piece(kind, self.reads.ranges(atoms), heads)

    def blocks(self) -> Iterator[Block]:
        """One for each group whose keys this rank's group reads."""
        if not self._has_heads(self.place):
            return
        for hop in range(self.num_groups):
            owner = (self.group - hop) % self.num_groups
            k = self._of_group(owner, self.keys[self.group])
            if len(k):
                q = self._of_group(self.group, self.queries[owner])
                ranges = self.reads.ranges
                yield Block(hop + 1, self.rank, ranges(q), ranges(k), self.shares[self.place])

    def _legs(self) -> Iterator[tuple[int, int, int]]:
        """(owner of tokens, who works on them, place of the latter) inside the group, this rank being one of both."""
        for mate in self.mates:
            for owner, worker in ((mate, self.rank), (self.rank, mate)):
                place = worker % self.degree
                if self._has_heads(place):
                    yield owner, worker, place

    def inputs(self, kind: Kind) -> Iterator[Move]:
        """Tokens from their owners to those who work on them: q and kv, kept for the backward phase, and do there."""
        read, shares = (self.keys, self.kv_shares) if kind == "kv" else (self.queries, self.shares)
        for owner, worker, place in self._legs():
            some = self._atoms(owner, owner + 1, _any(read, 0))
            if len(some):
                yield Move(0, owner, worker, self._piece(kind, some, shares[place]), kept=kind != "do")

    def results(self, kind: Kind) -> Iterator[Move]:
        """Outputs, or the queries' gradients, home to the owners of the tokens: nobody else adds to them."""
        for owner, worker, place in self._legs():
            some = self._atoms(owner, owner + 1, _any(self.queries, 0))
            if len(some):
                piece = self._piece(kind, some, self.shares[place])
                yield Move(self.num_groups + 1, worker, owner, piece, complete=True)

    def _beyond(self, owner: int, hop: int) -> np.ndarray:
        """The atoms of a group's keys that a group more than ``hop`` hops after it reads."""
        first, stop = self.reads.edges[[owner * self.degree, (owner + 1) * self.degree]]
        hops = self.keys[(owner + np.arange(self.num_groups)) % self.num_groups, first:stop].T
        return np.flatnonzero(last_hop(hops) > hop) + first

    def ring(self) -> Iterator[Move]:
        """Keys that this rank passes on to the next group, and those it gets from the one before."""
        if not self._has_heads(self.place):
            return
        heads, n = self.kv_shares[self.place], self.num_groups
        for hop in range(n - 1):
            for sender in dict.fromkeys((self.group, (self.group - 1) % n)):
                owner = (sender - hop) % n
                some = self._beyond(owner, hop)
                if len(some):
                    src, dst = (g % n * self.degree + self.place for g in (sender, sender + 1))
                    yield Move(hop + 1, src, dst, self._piece("kv", some, heads))

    def gradients(self) -> Iterator[Move]:
        """Gradients of keys straight to their owners, from every rank that read them, after it last did."""
        n, readers = self.num_groups, self.keys.sum(0)
        alone = [sum(a < d and c < b for c, d in self.kv_shares if c < d) == 1 for a, b in self.kv_shares]

        def home(reader: int, owner: int) -> Iterator[Move]:
            group, place = divmod(reader, self.degree)
            if reader == owner or not self._has_heads(place):
                return
            some = self._atoms(owner, owner + 1, self.keys[group])
            if len(some):
                hop = (group - owner // self.degree) % n
                complete = alone[place] and bool((readers[some] == 1).all())
                piece = self._piece("dkv", some, self.kv_shares[place])
                yield Move(hop + 2, reader, owner, piece, complete=complete)

        for other in range(n * self.degree):
            yield from home(self.rank, other)
            yield from home(other, self.rank)
