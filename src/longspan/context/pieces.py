"""The pieces of bands of blocks as arrays: what the kernels of many blocks have to compute, in a few numpy calls.

Coarser than ``Geometry.bands``: of the pieces of a block only rectangles are joined.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longspan.context.geometry import Geometry, Ranges
from longspan.context.reads import Reads

Runs = tuple[np.ndarray, np.ndarray]  # (n, 3) row in the block, first position and length; (u + 1,) where sets start


def _runs(unique: list[Ranges], geometry: Geometry) -> Runs:
    """The stretches of consecutive positions of each of some ranges of slots."""
    placed = geometry.layout.placed
    slots = np.array([p.slot for p in placed])
    ends = slots + np.array([p.segment.num_tokens for p in placed])
    starts = np.array([p.segment.start for p in placed])
    rows, edges = [], [0]
    for ranges in unique:
        row, following = 0, None
        for start, stop in ranges:
            first, last = np.searchsorted(ends, start, "right"), np.searchsorted(slots, stop, "left")
            for index in range(first, last):
                a, b = max(start, slots[index]), min(stop, ends[index])
                position = starts[index] + geometry.step * (a - slots[index])
                if position == following:  # goes on where the last stretch ended
                    rows[-1][2] += b - a
                else:
                    rows.append([row, position, b - a])
                row, following = row + b - a, position + geometry.step * (b - a)
        edges.append(len(rows))
    return np.array(rows, dtype=np.int64).reshape(-1, 3), np.array(edges)


def runs_of(reads: Reads, geometry: Geometry, marks: np.ndarray) -> Runs:
    """The stretches of consecutive positions of sets of atoms, bool (sets, atoms)."""
    placed, step = geometry.layout.placed, geometry.step
    slots, starts = np.array([p.slot for p in placed]), np.array([p.segment.start for p in placed])
    segment = np.searchsorted(slots, reads.cuts[:-1], "right") - 1
    position = starts[segment] + step * (reads.cuts[:-1] - slots[segment])
    number, atom = np.nonzero(marks)
    position, size = position[atom], reads.sizes[atom]
    follows = (number[1:] == number[:-1]) & (position[1:] == (position + step * size)[:-1])
    first = np.flatnonzero(np.append(True, ~follows)) if len(number) else np.zeros(0, np.int64)
    before, edges = np.cumsum(size) - size, np.searchsorted(number[first], np.arange(len(marks) + 1))
    length = np.add.reduceat(size, first) if len(first) else size
    row = before[first] - before[np.searchsorted(number, number[first])]
    return np.stack([row, position[first], length], 1), edges


def _expand(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges starts .. starts + sizes: (owner of each member, member)."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return owner, np.arange(len(owner)) - first + np.repeat(starts, sizes)


class Fragments(NamedTuple):
    """Pieces of bands before rectangles are joined: arrays of block, rows q0..q1, columns k0..k1, and what is allowed.

    Attributes:
        area: allowed pairs.
        lo, hi: of the tight band in the piece's own rows and columns; rectangles reach from 1 - rows to keys - 1.
    """

    block: np.ndarray
    q0: np.ndarray
    q1: np.ndarray
    k0: np.ndarray
    k1: np.ndarray
    area: np.ndarray
    lo: np.ndarray
    hi: np.ndarray

    def joined(self) -> np.ndarray:
        """(n, 6) block, rows, keys, area, lo, hi, with rectangles that touch made one."""
        sizes = self.q1 - self.q0, self.k1 - self.k0
        plain = (self.lo <= 1 - sizes[0]) & (self.hi >= sizes[1] - 1)
        rest = np.stack([self.block, *sizes, self.area, self.lo, self.hi], 1)[~plain]
        whole = np.stack(self[:5], 1)[plain]
        rectangles = _joined(_joined(whole, 3, 1), 1, 3)
        sizes = rectangles[:, 2] - rectangles[:, 1], rectangles[:, 4] - rectangles[:, 3]
        first = np.stack([rectangles[:, 0], *sizes, sizes[0] * sizes[1], 1 - sizes[0], sizes[1] - 1], 1)
        return np.concatenate([first, rest])


def pieces_of(blocks: list[tuple[Ranges, Ranges]], geometry: Geometry) -> np.ndarray:
    """(n, 6) block, rows, keys, area, lo, hi of the pieces of bands of blocks; lo and hi as in ``Fragments``."""
    if not blocks or not len(geometry.table):
        return np.zeros((0, 6), np.int64)
    index: dict[Ranges, int] = {}
    pairs = np.array([[index.setdefault(ranges, len(index)) for ranges in block] for block in blocks])
    return fragments(_runs(list(index), geometry), pairs, geometry).joined()


def fragments(sets: Runs, pairs: np.ndarray, geometry: Geometry) -> Fragments:
    """The pieces of bands of blocks; ``pairs`` (n, 2) are which of the ``sets`` are their queries and keys."""
    table = geometry.table
    runs, edges = sets
    num = np.diff(edges)
    # Stretches of queries, then of keys, then the bands that may meet them.
    block, q = _expand(edges[pairs[:, 0]], num[pairs[:, 0]])
    keys = pairs[block, 1]
    owner, k = _expand(edges[keys], num[keys])
    block, (q_row, q_start, num_q), (k_row, k_start, num_k) = block[owner], runs[q[owner]].T, runs[k].T
    table = table[np.argsort(table[:, 0], kind="stable")]
    step = geometry.step
    low = np.searchsorted(np.maximum.accumulate(table[:, 1]), q_start, "right")
    high = np.searchsorted(table[:, 0], q_start + step * (num_q - 1) + 1, "left")
    owner, band = _expand(low, np.maximum(high - low, 0))
    near = (table[band, 2] < (k_start + step * num_k)[owner]) & (table[band, 3] > k_start[owner])
    owner, band = owner[near], band[near]
    q0, q1, k0, k1, lo, hi = table[band].T
    q_start, num_q, k_start, num_k = q_start[owner], num_q[owner], k_start[owner], num_k[owner]
    offset = k_start - q_start
    cut = [
        np.maximum(0, -((q_start - q0) // step)),
        np.minimum(num_q, -((q_start - q1) // step)),
        np.maximum(0, -((k_start - k0) // step)),
        np.minimum(num_k, -((k_start - k1) // step)),
        -((offset - lo) // step),
        (hi - offset) // step,
    ]
    q0, q1, k0, k1, lo, hi = _tight(cut)
    some = (q0 < q1) & (k0 < k1) & (lo <= hi)
    block, q_row, k_row = block[owner][some], q_row[owner][some], k_row[owner][some]
    q0, q1, k0, k1, lo, hi = (x[some] for x in (q0, q1, k0, k1, lo, hi))
    area = _areas(q0, q1, k0, k1, lo, hi)
    own = q0 - k0
    return Fragments(block, q_row + q0, q_row + q1, k_row + k0, k_row + k1, area, lo + own, hi + own)


def _tight(cut: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """``bands.tighten`` on arrays."""
    q0, q1, k0, k1, lo, hi = cut
    return (
        np.maximum(q0, k0 - hi),
        np.minimum(q1, k1 - lo),
        np.maximum(k0, q0 + lo),
        np.minimum(k1, q1 + hi),
        np.maximum(lo, k0 - q1 + 1),
        np.minimum(hi, k1 - 1 - q0),
    )


def _areas(q0, q1, k0, k1, lo, hi) -> np.ndarray:
    """``bands.area`` on arrays."""
    num_q, num_k = q1 - q0, k1 - k0

    def triangle(x: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0)
        return np.where(x <= num_k, x * (x + 1) // 2, num_k * (num_k + 1) // 2 + (x - num_k) * num_k)

    def at_most(diagonal: np.ndarray) -> np.ndarray:
        first = diagonal + q0 - k0 + 1
        return triangle(first + num_q - 1) - triangle(first - 1)

    return at_most(hi) - at_most(lo - 1)


def _joined(rectangles: np.ndarray, same: int, along: int) -> np.ndarray:
    """Rectangles (block, q0, q1, k0, k1) of a block that agree in one axis and touch in the other, joined."""
    if len(rectangles) < 2:
        return rectangles
    r = rectangles[np.lexsort((rectangles[:, along], rectangles[:, same + 1], rectangles[:, same], rectangles[:, 0]))]
    equal = (r[1:, [0, same, same + 1]] == r[:-1, [0, same, same + 1]]).all(1)
    starts = np.flatnonzero(np.append(True, ~(equal & (r[1:, along] == r[:-1, along + 1]))))
    out = r[starts].copy()
    out[:, along + 1] = r[np.append(starts[1:], len(r)) - 1, along + 1]
    return out
