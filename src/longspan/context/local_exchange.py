"""One rank's part of Ulysses and USP, without the list of all ranks' moves; see ``context.local``.

Ranks form groups of ``degree``. Inside a group tokens are exchanged for heads, in one stage or several, and the groups'
keys form a ring. What pruning finds out follows from which groups read an atom of the keys: a key is fetched if any
group reads it, is passed on as far as the last group that does, and its gradient goes straight to its owner from every
rank that read it. Queries travel, and outputs come back complete, where a query reads any key.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longspan.context.carry import Exchange
from longspan.context.geometry import Geometry
from longspan.context.reads import Reads, last_hop, reads_of
from longspan.context.schedule import Block, Kind, Move, Piece, Range, homewards
from longspan.context.shares import Share, head_shares


def exchange_part(
    carry: Exchange, geometry: Geometry, num_heads: int, num_kv_heads: int, rank: int, *, keeps: bool
) -> tuple[list[Block], list[Move], list[Move]]:
    """A rank's blocks and moves of the forward phase, and the moves of the keys' gradients.

    ``keeps``: inputs stay with those who fetched them until the end of the backward phase.
    """
    shares = head_shares(num_heads, num_kv_heads, carry.degree, carry.stages)
    part = _Exchange(reads_of(geometry), carry.degree, shares, rank, keeps=keeps)
    blocks = sorted(part.blocks(), key=lambda block: block.step)
    return blocks, [*part.exchanged(), *part.ring()], [*part.gradients()]


class _Exchange:
    """Authors one rank's part."""

    def __init__(self, reads: Reads, degree: int, shares: list[Share], rank: int, *, keeps: bool) -> None:
        self.reads, self.degree, self.rank, self.keeps = reads, degree, rank, keeps
        self.num_groups = (len(reads.edges) - 1) // degree
        self.group, self.place = divmod(rank, degree)
        self.shares, self.own = shares, [share for share in shares if share.place == self.place]
        # (groups, atoms): whether the group reads some key of the atom; some query of the atom reads the group's keys.
        self.keys, self.queries = (
            np.logical_or.reduce(marks.reshape(self.num_groups, degree, -1), axis=1)
            for marks in (reads.keys, reads.queries)
        )

    def _atoms(self, first: int, last: int, marks: np.ndarray) -> np.ndarray:
        """The marked atoms of the owners from ``first`` up to ``last``."""
        start, stop = self.reads.edges[first], self.reads.edges[last]
        return np.flatnonzero(marks[start:stop]) + start

    def _of_group(self, group: int, marks: np.ndarray) -> np.ndarray:
        return self._atoms(group * self.degree, (group + 1) * self.degree, marks)

    def _piece(self, kind: Kind, atoms: np.ndarray, heads: Range) -> Piece:
        return Piece(kind, self.reads.ranges(atoms), heads)

    def blocks(self) -> Iterator[Block]:
        """One for each share of the rank and each group whose keys this rank's group reads."""
        for hop in range(self.num_groups) if self.own else ():
            owner = (self.group - hop) % self.num_groups
            k = self._of_group(owner, self.keys[self.group])
            if len(k):
                q = self._of_group(self.group, self.queries[owner])
                ranges = self.reads.ranges(q), self.reads.ranges(k)
                for share in self.own:
                    yield Block(share.stage + hop + 2, self.rank, *ranges, share.heads)

    def exchanged(self) -> Iterator[Move]:
        """Inside the group, tokens from their owners to those who work on some heads, and outputs back, complete."""
        first = self.group * self.degree
        q, kv = (
            [self._atoms(owner, owner + 1, marks) for owner in range(first, first + self.degree)]
            for marks in (np.logical_or.reduce(side, axis=0) for side in (self.queries, self.keys))
        )
        for place, stage, heads, _, fetched, *_ in self.shares:
            worker = first + place
            for owner in range(first, first + self.degree) if worker == self.rank else (self.rank,):
                if owner == worker:
                    continue
                queries, keys = q[owner - first], kv[owner - first]
                if len(queries):
                    yield Move(stage + 1, owner, worker, self._piece("q", queries, heads), kept=self.keeps)
                    output = self._piece("o", queries, heads)
                    yield homewards(stage + self.num_groups + 2, worker, owner, output, complete=True)
                if len(keys) and fetched[0] < fetched[1]:
                    piece = self._piece("kv", keys, fetched)
                    yield Move(stage, owner, worker, piece, lands=stage + 1, kept=self.keeps)

    def _beyond(self, owner: int, hop: int) -> np.ndarray:
        """The atoms of a group's keys that a group more than ``hop`` hops after it reads."""
        first, stop = self.reads.edges[[owner * self.degree, (owner + 1) * self.degree]]
        hops = self.keys[(owner + np.arange(self.num_groups)) % self.num_groups, first:stop].T
        return np.flatnonzero(last_hop(hops) > hop) + first

    def ring(self) -> Iterator[Move]:
        """Keys that this rank passes on to the next group, and those it gets from the one before."""
        n = self.num_groups
        for hop in range(n - 1) if self.own else ():
            for sender in dict.fromkeys((self.group, (self.group - 1) % n)):
                owner = (sender - hop) % n
                some = self._beyond(owner, hop)
                if len(some):
                    src, dst = (g % n * self.degree + self.place for g in (sender, sender + 1))
                    yield Move(hop + 2, src, dst, self._piece("kv", some, self.own[0].kv_heads))

    def gradients(self) -> Iterator[Move]:
        """Gradients of keys straight to their owners, from every rank that read them, after it last did."""
        readers = np.count_nonzero(self.keys, axis=0)
        world = self.num_groups * self.degree
        for share in self.shares:
            if not share.returns:
                continue
            for group in range(self.num_groups):
                reader = group * self.degree + share.place
                for owner in range(world) if reader == self.rank else (self.rank,):
                    some = self._atoms(owner, owner + 1, self.keys[group])
                    if owner != reader and len(some):
                        step = share.stage + (group - owner // self.degree) % self.num_groups + 3
                        complete = share.complete and bool((readers[some] == 1).all())
                        piece = self._piece("dkv", some, share.kv_heads)
                        yield homewards(step, reader, owner, piece, complete=complete)
