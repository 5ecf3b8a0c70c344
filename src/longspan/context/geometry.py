"""A mask seen through a layout: bands of any block of slots, and the atoms on which schedules are analysed.

A schedule addresses tokens by slot (see ``layout.tokens``). ``Geometry.bands`` turns a block of slots into bands in
the block's own rows and columns, which is what a kernel takes. *Atoms* are the intervals of slots between all the cut
points that matter to a schedule (owners, pieces, edges of the mask and their images along its diagonals), so that
liveness and coverage are exact enough to prune on and cheap enough to compute for thousands of moves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from longspan.attention.bands import Band, Bands, coalesce, tighten, total_area
from longspan.attention.masks import Mask
from longspan.layout.tokens import Layout

Range = tuple[int, int]
Ranges = tuple[Range, ...]
_FEW_BANDS = 24  # above this many bands, a block looks up those near it in numpy


def normalise(ranges: Iterable[Range]) -> Ranges:
    """Sorted, disjoint, non-empty, with touching ranges joined."""
    out: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


def count(ranges: Ranges) -> int:
    """Number of tokens (or heads) of disjoint ranges."""
    return sum(stop - start for start, stop in ranges)


def overlap(first: Ranges, second: Ranges) -> Ranges:
    """What two sorted, disjoint ranges have in common."""
    out, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            out.append((start, stop))
        i, j = (i + 1, j) if first[i][1] < second[j][1] else (i, j + 1)
    return normalise(out)


def split_in_two(interval: Range) -> tuple[Range, Range]:
    """An interval as two that differ by one at most."""
    start, stop = interval
    middle = (start + stop) // 2
    return (start, middle), (middle, stop)


class Geometry:
    """A mask on a layout. Raises ValueError where their lengths differ."""

    def __init__(self, mask: Mask, layout: Layout) -> None:
        if mask.num_tokens != layout.num_tokens:
            raise ValueError(
                f"mask and layout must have one length, got a mask of {mask.num_tokens} and a layout of "
                f"{layout.num_tokens} tokens; build both for the global sequence"
            )
        self.mask, self.layout = mask, layout
        self.table = np.array(mask.bands, dtype=np.int64).reshape(-1, 6)
        self.step = layout.placed[0].segment.step if layout.placed else 1
        self._slots = [placed.slot for placed in layout.placed]
        self._blocks: dict[tuple[Ranges, Ranges], Bands] = {}
        self._grids: dict[tuple[frozenset[int], ...], Atoms] = {}

    def _runs(self, ranges: Ranges) -> list[tuple[int, int, int]]:
        """(row of the block, first global position, number of tokens) of each stretch of evenly spaced ones."""
        runs: list[tuple[int, int, int]] = []
        row, following = 0, None
        for start, stop in ranges:
            index = bisect_right(self._slots, start) - 1
            while start < stop:
                slot, segment = self.layout.placed[index]
                n = min(stop, slot + segment.num_tokens) - start
                position = segment.start + segment.step * (start - slot)
                if position == following:  # goes on where the last stretch ended
                    before, first, num = runs[-1]
                    runs[-1] = before, first, num + n
                else:
                    runs.append((row, position, n))
                following = position + segment.step * n
                row, start, index = row + n, start + n, index + 1
        return runs

    def _cut(self, q: Ranges, k: Ranges) -> list[Band]:
        out: list[Band] = []
        k_runs = self._runs(k)
        for row, q_start, num_q in self._runs(q):
            for column, k_start, num_k in k_runs:
                near = self._near(q_start, q_start + self.step * num_q, k_start, k_start + self.step * num_k)
                d = column - row
                out.extend(
                    Band(q0 + row, q1 + row, k0 + column, k1 + column, lo + d, hi + d)
                    for q0, q1, k0, k1, lo, hi in strided(near, self.step, (q_start, num_q), (k_start, num_k))
                )
        return out

    def _near(self, q0: int, q1: int, k0: int, k1: int) -> Iterable[Band]:
        """The bands whose rectangles meet a rectangle of positions."""
        if len(self.table) <= _FEW_BANDS:
            return self.mask.bands
        table = self.table
        near = (table[:, 0] < q1) & (table[:, 1] > q0) & (table[:, 2] < k1) & (table[:, 3] > k0)
        return map(Band._make, table[near].tolist())

    def bands(self, q: Ranges, k: Ranges) -> Bands:
        """Bands of the block of slots q x k, in rows and columns of the block, as few as possible."""
        found = self._blocks.get((q, k))
        if found is None:
            parts = self._cut(q, k)
            found = self._blocks[q, k] = tuple(parts) if len(parts) <= 1 else coalesce(parts)
        return found

    def area(self, q: Ranges, k: Ranges) -> int:
        """Allowed pairs of a block of slots."""
        return total_area(self._cut(q, k))

    def atoms(self, slots: Iterable[int], heads: Iterable[int], kv_heads: Iterable[int]) -> Atoms:
        """The atoms between ``cuts`` and further slots, and between head numbers. Equal arguments give one object."""
        key = frozenset(self.cuts) | frozenset(slots), frozenset(heads), frozenset(kv_heads)
        if key not in self._grids:
            self._grids[key] = Atoms(self, *key)
        return self._grids[key]

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Slots at which the mask or the ownership changes, with the images of these edges along active diagonals."""
        edges = {self.layout.num_tokens, 0}
        if self.step == 1:
            edges |= {edge for _, (start, _, num) in self.layout.placed for edge in (start, start + num)}
        table = self.table
        if len(table):
            edges |= set(np.unique(table[:, :4]).tolist())
        base = np.array(sorted(edges), dtype=np.int64)
        images = [base]
        for q0, q1, k0, k1, lo, hi in table.tolist():
            q_edges = base[(base >= q0) & (base <= q1)]
            k_edges = base[(base >= k0) & (base <= k1)]
            if hi and hi < k1 - 1 - q0:  # the upper diagonal cuts the rectangle; the main one maps edges on edges
                images += [np.clip(q_edges + hi, k0, k1), np.clip(k_edges - hi, q0, q1)]
            if lo > k0 - q1 + 1:
                images += [np.clip(q_edges + lo, k0, k1), np.clip(k_edges - lo + 1, q0, q1)]
        points = np.unique(np.concatenate(images))
        slots = [np.array(self.layout.offsets)]
        if self.step == 1:
            placed = sorted((segment.start, slot) for slot, segment in self.layout.placed)
            starts, at = np.array(placed).T
            segment = np.searchsorted(starts, points, "right") - 1
            return tuple(np.unique(np.concatenate([*slots, at, at[segment] + points - starts[segment]])).tolist())
        for slot, (start, step, num) in self.layout.placed:
            local = -((start - points) // step)
            slots += [np.array([slot]), slot + local[(local >= 0) & (local <= num)]]
        return tuple(np.unique(np.concatenate(slots)).tolist())


def strided(bands: Iterable[Band], step: int, q: tuple[int, int], k: tuple[int, int]) -> Iterator[Band]:
    """The bands on positions q[0] + step * i and k[0] + step * j, in (i, j) with i < q[1] and j < k[1], tightened."""
    (q_start, num_q), (k_start, num_k) = q, k
    offset = k_start - q_start
    for band in bands:
        tight = tighten(
            Band(
                max(0, -((q_start - band.q0) // step)),
                min(num_q, -((q_start - band.q1) // step)),
                max(0, -((k_start - band.k0) // step)),
                min(num_k, -((k_start - band.k1) // step)),
                -((offset - band.lo) // step),
                (band.hi - offset) // step,
            )
        )
        if tight is not None:
            yield tight


class Atoms:
    """The grid on which a schedule is analysed: intervals of slots, and intervals of query and of KV heads.

    A set of atoms is an integer with one bit per atom: set operations cost a fraction of a microsecond each, and a
    schedule of 64 ranks needs a hundred thousand of them.
    """

    def __init__(self, geometry: Geometry, cuts: Iterable[int], heads: Iterable[int], kv_heads: Iterable[int]) -> None:
        self.geometry = geometry
        self.cuts = sorted(cuts)
        self.num = len(self.cuts) - 1
        self.head_cuts, self.kv_head_cuts = sorted(heads), sorted(kv_heads)
        self._index = {cut: index for index, cut in enumerate(self.cuts)}
        self._head_index = {cut: index for index, cut in enumerate(self.head_cuts)}
        self._kv_head_index = {cut: index for index, cut in enumerate(self.kv_head_cuts)}
        self._bits: dict[Ranges, int] = {}
        self._ranges: dict[int, Ranges] = {}

    def bits(self, ranges: Ranges) -> int:
        """The atoms of ranges of slots. Raises ValueError where the ranges are not sorted and disjoint."""
        found = self._bits.get(ranges)
        if found is None:
            found, last = 0, 0
            for start, stop in ranges:
                if not last <= start <= stop:
                    raise ValueError(f"ranges of slots must be sorted and disjoint, got {ranges}; use normalise")
                found |= (1 << self._index[stop]) - (1 << self._index[start])
                last = stop
            self._bits[ranges] = found
        return found

    def ranges(self, bits: int) -> Ranges:
        """Joined ranges of slots of a set of atoms."""
        found = self._ranges.get(bits)
        if found is None:
            parts, rest, at = [], bits, 0
            while rest:
                gap = (rest & -rest).bit_length() - 1
                rest >>= gap
                length = (~rest & (rest + 1)).bit_length() - 1
                parts.append((self.cuts[at + gap], self.cuts[at + gap + length]))
                rest >>= length
                at += gap + length
            found = self._ranges[bits] = tuple(parts)
        return found

    def members(self, bits: int) -> list[int]:
        """Indices of the atoms of a set."""
        return [i for start, stop in self.ranges(bits) for i in range(self._index[start], self._index[stop])]

    def heads(self, heads: Range, *, kv: bool) -> range:
        """Indices of the head atoms of a range of query (or KV) heads."""
        index = self._kv_head_index if kv else self._head_index
        return range(index[heads[0]], index[heads[1]])

    @cached_property
    def allowed(self) -> tuple[int, ...]:
        """For every query atom the key atoms with which some pair is allowed."""
        packed = np.packbits(self.allowed_pairs(), axis=1, bitorder="little")
        return tuple(int.from_bytes(row.tobytes(), "little") for row in packed)

    def allowed_pairs(self) -> np.ndarray:
        """bool (num, num): whether any pair of (query atom, key atom) is allowed."""
        layout, table = self.geometry.layout, self.geometry.table
        cuts = np.array(self.cuts, dtype=np.int64)
        starts, sizes = layout.global_positions[cuts[:-1]], np.diff(cuts)
        step = self.geometry.step
        stops = starts + step * (sizes - 1) + 1
        out = np.zeros((self.num, self.num), dtype=bool)
        for q0, q1, k0, k1, lo, hi in table.tolist():
            rows = np.flatnonzero((starts < q1) & (stops > q0))
            columns = np.flatnonzero((starts < k1) & (stops > k0))
            if not len(rows) or not len(columns):
                continue
            # First and last position of each atom inside the rectangle, in units of the layout's step.
            first_q = np.maximum(0, -((starts[rows] - q0) // step))
            last_q = np.minimum(sizes[rows], -((starts[rows] - q1) // step)) - 1
            first_k = np.maximum(0, -((starts[columns] - k0) // step))
            last_k = np.minimum(sizes[columns], -((starts[columns] - k1) // step)) - 1
            offset = starts[columns][None, :] - starts[rows][:, None]
            low = -((offset - lo) // step)
            high = (hi - offset) // step
            some = (last_q >= first_q)[:, None] & (last_k >= first_k)[None, :]
            some &= (low <= last_k[None, :] - first_q[:, None]) & (high >= first_k[None, :] - last_q[:, None])
            some &= low <= high
            out[np.ix_(rows, columns)] |= some
        return out


def stretches(columns: Sequence[object]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of equal neighbours: heads that go the same way go together."""
    out: list[tuple[int, int]] = []
    for index, column in enumerate(columns):
        if out and columns[out[-1][0]] == column:
            out[-1] = (out[-1][0], index + 1)
        else:
            out.append((index, index + 1))
    return out
