"""Who reads what: a mask on a layout, on atoms, as arrays over all ranks.

Where methods move whole shards over known paths, all that pruning would find follows from this (``local``, ``tables``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from longspan.attention.masks import Mask
from longspan.context.balance import read_positions
from longspan.context.geometry import Atoms, Geometry, Ranges, split_in_two
from longspan.layout.tokens import Layout, Segment


@dataclass(frozen=True, slots=True)
class Reads:
    """Who reads what of a mask on a layout, on atoms (see ``geometry``).

    Attributes:
        cuts: (atoms + 1,) slots.
        owner: (atoms,) rank.
        edges: (world + 1,) first atom of each rank.
        keys: bool (world, atoms): whether some query of the rank reads some key of the atom.
        queries: bool (world, atoms): whether some query of the atom reads some key of the rank.
    """

    cuts: np.ndarray
    owner: np.ndarray
    edges: np.ndarray
    keys: np.ndarray
    queries: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """(atoms,) tokens of each."""
        return np.diff(self.cuts)

    def ranges(self, some: np.ndarray) -> Ranges:
        """Joined ranges of slots of sorted atoms."""
        if not len(some):
            return ()
        breaks = np.flatnonzero(np.diff(some) > 1)
        first, last = some[np.append(0, breaks + 1)], some[np.append(breaks, len(some) - 1)]
        return tuple(zip(self.cuts[first].tolist(), self.cuts[last + 1].tolist(), strict=True))


def reads_of(geometry: Geometry, shards: Layout | None = None) -> Reads:
    """The reads of a mask on a layout; ``shards``, a finer division of the same slots, takes the place of the ranks."""
    layout = shards or geometry.layout
    cuts = np.array(sorted({*geometry.cuts, *layout.offsets}), dtype=np.int64)
    edges = np.searchsorted(cuts, layout.offsets)
    owner = np.repeat(np.arange(layout.world), np.diff(edges))
    if geometry.step == 1:
        keys, queries = (_marked(geometry.mask, layout, cuts, of_keys=of_keys) for of_keys in (False, True))
    else:
        pairs = Atoms(geometry, cuts.tolist(), (), ()).allowed_pairs()
        keys = np.stack([pairs[a:b].any(0) for a, b in pairwise(edges)])
        queries = np.stack([pairs[:, a:b].any(1) for a, b in pairwise(edges)])
    return Reads(cuts, owner, edges, keys, queries)


def halves_of(geometry: Geometry) -> tuple[Reads, Reads]:
    """The reads of the first halves of all ranks' keys, and those of the second halves (``split_in_two``)."""
    layout, shards = geometry.layout, []
    for rank, segments in enumerate(layout.ranks):
        (start, room), _ = split_in_two(layout.owned(rank))
        room, halves = room - start, ([], [])
        for start, step, num in segments:
            first = min(num, room)
            room -= first
            halves[0].append(Segment(start, step, first))
            halves[1].append(Segment(start + step * first, step, num - first))
        shards += map(tuple, halves)
    found = reads_of(geometry, Layout("halves", tuple(shards)))
    keys = np.logical_or.reduce(found.keys.reshape(layout.world, 2, -1), axis=1)
    first, second = (
        Reads(found.cuts, found.owner // 2, found.edges[::2], keys & (found.owner % 2 == half), found.queries[half::2])
        for half in (0, 1)
    )
    return first, second


def _marked(mask: Mask, layout: Layout, cuts: np.ndarray, *, of_keys: bool) -> np.ndarray:
    """bool (world, atoms): the atoms that meet the positions which each rank reads, or is read by."""
    slots, starts = np.array([p.slot for p in layout.placed]), np.array([p.segment.start for p in layout.placed])
    segment = np.searchsorted(slots, cuts[:-1], "right") - 1
    first = starts[segment] + cuts[:-1] - slots[segment]
    by_position = np.argsort(first)
    begin = first[by_position]
    rank, start, stop = read_positions(mask, layout, of_keys=of_keys)
    change = np.zeros((layout.world, len(begin) + 1), np.int32)
    np.add.at(change, (rank, np.searchsorted(begin, start, "right") - 1), 1)
    np.add.at(change, (rank, np.searchsorted(begin, stop, "left")), -1)
    marked = np.empty((len(change), len(begin)), bool)
    marked[:, by_position] = np.cumsum(change, axis=1)[:, :-1] > 0
    return marked


class Side:
    """One half of the reads, bool (world, atoms) with a rank of the other side first: per shard and along rings."""

    def __init__(self, reads: Reads, marks: np.ndarray) -> None:
        self.reads, self.marks, self.world = reads, marks, len(marks)
        self._hops: dict[int, np.ndarray] = {}
        self._carried: dict[int, np.ndarray] = {}
        self.count = marks.sum(0)  # ranks of the other side that each atom meets

    def per_owner(self, columns: np.ndarray) -> np.ndarray:
        """(..., world): sums over each owner's atoms, which are the last axis."""
        total = np.zeros((*columns.shape[:-1], columns.shape[-1] + 1), columns.dtype)
        np.cumsum(columns, axis=-1, out=total[..., 1:])
        return total[..., self.reads.edges[1:]] - total[..., self.reads.edges[:-1]]

    def tokens_of(self, marks: np.ndarray) -> np.ndarray:
        """(..., world): each owner's tokens in the marked atoms."""
        return self.per_owner(marks * self.reads.sizes)

    @cached_property
    def tokens(self) -> np.ndarray:
        """(world, owner): tokens that meet the rank of the other side."""
        return self.tokens_of(self.marks)

    @cached_property
    def alone(self) -> np.ndarray:
        """bool (world, owner): whether no atom of the two meets a third rank: what is summed there is complete."""
        return self.per_owner((self.marks & (self.count != 1)).astype(np.int64)) == 0

    def hops(self, up: int) -> np.ndarray:
        """bool (atoms, world): whether the rank so many hops after the owner meets the atom."""
        if up not in self._hops:
            rank = (self.reads.owner[:, None] + up * np.arange(self.world)) % self.world
            self._hops[up] = self.marks[rank, np.arange(len(rank))[:, None]]
        return self._hops[up]

    def carried(self, up: int) -> np.ndarray:
        """(world - 1, owner): tokens that leave the rank so many hops after the owner: somebody ahead meets them."""
        if up not in self._carried:
            self._carried[up] = self.tokens_of(last_hop(self.hops(up)) > np.arange(self.world - 1)[:, None])
        return self._carried[up]


def last_hop(hops: np.ndarray) -> np.ndarray:
    """The last true column of each row; 0 where there is none."""
    return np.where(hops.any(-1), hops.shape[-1] - 1 - hops[..., ::-1].argmax(-1), 0)
