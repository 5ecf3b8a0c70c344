"""The balanced token layout: equal tokens and equal work for every rank, under any mask, at few bytes.

After the dispatcher of MagiAttention (SandAI, github.com/SandAI-org/MagiAttention), which deals equal chunks to ranks
so that their mask areas agree. What differs: no chunks and no search, so no length that must divide anything. The work
of a query (the number of its keys) is a piecewise linear function of its position, known exactly from the bands. The
positions above the permitted mean are *heavy*, the others *light*; each rank takes a run of heavy ones, from the
heaviest on, and fills up with a run of light ones so that its area just keeps below the bound. Both runs are
consecutive, so documents stay together; on a causal mask the outcome is zigzag. Parts of the mask that share no token
with others (documents) and fit one rank are heavy or light as a whole, which cuts fewer of them.

Why it is cheap in bytes: a document of L tokens whose share of the work is A per rank needs at least L^2 / 2A ranks,
each of which reads the keys before its queries: L^3 / 3A key tokens. The layout comes close to this for long documents,
and a larger tolerance lowers it in proportion; without a bound it is the contiguous layout.

Cost: O(b log b + w log n) on the host for b bands, w ranks of n tokens. At most ``1 + tolerance`` times the mean
work on any rank wherever one query's work is below ``tolerance`` of a rank's share.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longspan.attention.masks import Mask
from longspan.context.geometry import Ranges
from longspan.layout.tokens import Layout, Segment, even_split

_MILLION = 1_000_000  # tolerances are rounded to parts per million: integers decide, alike on every machine


def balanced(mask: Mask, world: int, *, tolerance: float | None = 0.02) -> Layout:
    """The layout with few key tokens to send whose busiest rank has at most ``1 + tolerance`` times the mean work.

    A pure function of its arguments, in integers: the same on every rank and machine.

    Args:
        mask: any mask; rows without keys are light.
        world: number of ranks; local sizes are floor(s/w) or ceil(s/w), for any s.
        tolerance: how much work above the mean a rank may have, as a part of the mean. Larger means fewer bytes;
            None means contiguous, whatever the work. With few tokens a rank the bound may be out of reach; the
            layout then comes near it.

    Raises:
        ValueError: world is less than 1, or tolerance is negative or not finite.
    """
    if world < 1:
        raise ValueError(f"a layout needs at least one rank, got world={world}; give the number of ranks")
    if tolerance is not None and not 0 <= tolerance < _MILLION:
        raise ValueError(
            f"tolerance is work above the mean as a part of the mean, 0 or more, got {tolerance}; take 0.02, or None "
            "for no bound"
        )
    num = np.array(even_split(mask.num_tokens, world), dtype=np.int64)
    plain = np.stack([np.arange(world), np.cumsum(num) - num, num], axis=1)[num > 0]
    if tolerance is None or world == 1:
        return Layout("balanced", _segments(plain, world))
    work = _Work.of(mask)
    bound = work.total * (_MILLION + round(tolerance * _MILLION)) // (_MILLION * world)

    def rating(runs: np.ndarray) -> tuple[int, int]:
        """Excess over the bound, then key tokens to send."""
        return max(0, int(_areas(work, runs, world).max()) - bound), int(_foreign(mask, runs, world).sum())

    # The first of equals has the fewest segments.
    best = min(
        (plain, _deal(mask, work, world, bound, whole=True), _deal(mask, work, world, bound, whole=False)), key=rating
    )
    return Layout("balanced", _segments(best, world))


def areas(mask: Mask, layout: Layout) -> np.ndarray:
    """int64 (world,): allowed pairs whose query each rank holds. Raises ValueError where the lengths differ."""
    _same_length(mask, layout)
    return _areas(_Work.of(mask), _runs(layout), layout.world)


def imbalance(mask: Mask, layout: Layout) -> float:
    """Work of the busiest rank over the mean; 1 where nothing is allowed. Raises ValueError where lengths differ."""
    work = areas(mask, layout)
    return float(work.max() * layout.world / work.sum()) if work.any() else 1.0


def foreign_tokens(mask: Mask, layout: Layout) -> np.ndarray:
    """int64 (world,): key tokens that each rank's queries read and other ranks hold: what it must receive.

    Raises ValueError where the lengths differ.
    """
    _same_length(mask, layout)
    return _foreign(mask, _runs(layout), layout.world)


def bytes_fraction(mask: Mask, layout: Layout) -> tuple[float, float]:
    """Keys to receive over what a ring without pruning moves, (w-1)·s/w a rank: mean and maximum over the ranks.

    Zero for one rank. Raises ValueError where the lengths differ.
    """
    received = foreign_tokens(mask, layout)
    ring = (layout.world - 1) * layout.num_tokens / layout.world
    return (float(received.mean() / ring), float(received.max() / ring)) if ring else (0.0, 0.0)


def needed(mask: Mask, layout: Layout) -> tuple[Ranges, ...]:
    """For every rank the slots of the keys that its queries read, its own included, as sorted disjoint ranges.

    Raises ValueError where the lengths differ.
    """
    _same_length(mask, layout)
    runs = _runs(layout)
    rank, starts, stops = _read(_table(mask), runs, mask.num_tokens)
    by_position = runs[np.argsort(runs[:, 1], kind="stable")]
    slot_of = layout.slots[by_position[:, 1]]
    item, run = _overlapping(starts, stops, by_position[:, 1])
    first = np.maximum(starts[item], by_position[run, 1])
    last = np.minimum(stops[item], by_position[run, 1] + by_position[run, 2])
    slot = slot_of[run] + first - by_position[run, 1]
    rank, starts, stops = _joined(rank[item], slot, slot + last - first, mask.num_tokens)
    edges = np.searchsorted(rank, np.arange(layout.world + 1)).tolist()
    ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
    return tuple(tuple(ranges[a:b]) for a, b in pairwise(edges))


def read_positions(mask: Mask, layout: Layout, *, of_keys: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions of the keys that each rank's queries read, or of the queries that read each rank's keys.

    Returns (rank, start, stop) arrays, sorted, disjoint within a rank. Raises ValueError where the lengths differ.
    """
    _same_length(mask, layout)
    table = _table(mask)
    if of_keys:
        q0, q1, k0, k1, lo, hi = table.T
        table = np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)
    return _read(table, _runs(layout), mask.num_tokens)


def _same_length(mask: Mask, layout: Layout) -> None:
    if mask.num_tokens != layout.num_tokens:
        raise ValueError(
            f"mask and layout must have one length, got a mask of {mask.num_tokens} and a layout of "
            f"{layout.num_tokens} tokens; build both for the global sequence"
        )


def _table(mask: Mask) -> np.ndarray:
    return np.array(mask.bands, dtype=np.int64).reshape(-1, 6)


def _runs(layout: Layout) -> np.ndarray:
    """int64 (n, 3): rank, first position and length of each run of consecutive positions of one rank."""
    rows = []
    for rank, segments in enumerate(layout.ranks):
        for start, step, num in segments:
            if step == 1 and num:
                rows.append(np.array([[rank, start, num]], dtype=np.int64))
            elif num:
                positions = start + step * np.arange(num, dtype=np.int64)
                rows.append(np.stack([np.full(num, rank), positions, np.ones(num, np.int64)], axis=1))
    return np.concatenate(rows)


def _segments(runs: np.ndarray, world: int) -> tuple[tuple[Segment, ...], ...]:
    """The ranks' segments, by position, touching runs joined."""
    ranks: list[list[Segment]] = [[] for _ in range(world)]
    for rank, start, num in runs[np.lexsort((runs[:, 1], runs[:, 0]))].tolist():
        mine = ranks[rank]
        if mine and mine[-1].start + mine[-1].num_tokens == start:
            mine[-1] = Segment(mine[-1].start, 1, mine[-1].num_tokens + num)
        else:
            mine.append(Segment(start, 1, num))
    return tuple(map(tuple, ranks))


def _sum(first, slope, num):
    """Sum of first + slope * i over 0 <= i < num."""
    return first * num + slope * (num * (num - 1) // 2)


@dataclass(frozen=True, slots=True)
class _Work:
    """Keys per query as a piecewise linear function: piece i has ``first[i] + slope[i] * (q - start[i])`` of them."""

    start: np.ndarray
    num: np.ndarray
    first: np.ndarray
    slope: np.ndarray
    before: np.ndarray  # area of all queries before piece i; one more entry for the end

    @classmethod
    def of(cls, mask: Mask) -> _Work:
        """Exact, from the bands: row q of a tight band has min(k1, q + hi + 1) - max(k0, q + lo) keys."""
        q0, q1, k0, k1, lo, hi = _table(mask).T
        stays, moves = np.clip(k1 - hi, q0, q1), np.clip(k0 - lo + 1, q0, q1)
        at = np.concatenate([q0, stays, moves, q1, [0, mask.num_tokens]])
        one = np.ones(len(q0), np.int64)
        start, piece = np.unique(at, return_inverse=True)
        const, slope = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64)
        np.add.at(const, piece, np.concatenate([hi + 1 - k0, k1 - hi - 1, k0 - lo, lo - k1, [0, 0]]))
        np.add.at(slope, piece, np.concatenate([one, -one, -one, one, [0, 0]]))
        slope = np.cumsum(slope)[:-1]
        first = np.cumsum(const)[:-1] + slope * start[:-1]
        num = np.diff(start)
        return cls(start[:-1], num, first, slope, np.concatenate([[0], np.cumsum(_sum(first, slope, num))]))

    @property
    def total(self) -> int:
        return int(self.before[-1])

    def until(self, position: np.ndarray) -> np.ndarray:
        """Area of the queries before each position."""
        i = np.searchsorted(self.start, position, side="right") - 1
        return self.before[i] + _sum(self.first[i], self.slope[i], position - self.start[i])


def _areas(work: _Work, runs: np.ndarray, world: int) -> np.ndarray:
    total = np.zeros(world, np.int64)
    np.add.at(total, runs[:, 0], work.until(runs[:, 1] + runs[:, 2]) - work.until(runs[:, 1]))
    return total


def _overlapping(starts: np.ndarray, stops: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs (interval, cell) that meet, where the cells begin at the sorted ``edges`` and fill the sequence."""
    first = np.searchsorted(edges, starts, side="right") - 1
    num = np.searchsorted(edges, stops, side="left") - first
    within = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
    return np.repeat(np.arange(len(num)), num), np.repeat(first, num) + within


def _joined(rank: np.ndarray, starts: np.ndarray, stops: np.ndarray, num_tokens: int):
    """The union of each rank's intervals: (rank, start, stop), sorted, with touching ones joined."""
    # One number line with a stretch per rank, one longer than the sequence so that stretches never touch.
    base = rank * (num_tokens + 1)
    order = np.argsort(base + starts, kind="stable")
    begin, end = (base + starts)[order], np.maximum.accumulate((base + stops)[order])
    new = np.flatnonzero(np.concatenate([[True], begin[1:] > end[:-1]])) if len(begin) else np.zeros(0, np.int64)
    last = np.concatenate([new[1:], [len(begin)]]).astype(np.int64)[: len(new)] - 1
    rank = rank[order][new]
    return rank, begin[new] - rank * (num_tokens + 1), end[last] - rank * (num_tokens + 1)


def _read(table: np.ndarray, runs: np.ndarray, num_tokens: int):
    """The positions that each rank's queries read: (rank, start, stop), sorted, disjoint within a rank."""
    runs = runs[np.argsort(runs[:, 1], kind="stable")]
    band, run = _overlapping(table[:, 0], table[:, 1], runs[:, 1])
    q0, q1, k0, k1, lo, hi = table[band].T
    rank, start, num = runs[run].T
    # Consecutive rows of a tight band read one interval, so the first and the last row say all.
    first, last = np.maximum(q0, start), np.minimum(q1, start + num)
    return _joined(rank, np.maximum(k0, first + lo), np.minimum(k1, last + hi), num_tokens)


def _foreign(mask: Mask, runs: np.ndarray, world: int) -> np.ndarray:
    rank, starts, stops = _read(_table(mask), runs, mask.num_tokens)
    received = np.zeros(world, np.int64)
    if not len(rank):
        return received
    np.add.at(received, rank, stops - starts)
    line = mask.num_tokens + 1
    begin, covered = starts + rank * line, np.concatenate([[0], np.cumsum(stops - starts)])

    def read_before(point: np.ndarray) -> np.ndarray:
        i = np.searchsorted(begin, point, side="right") - 1
        return np.where(i < 0, 0, covered[i] + np.minimum(point - begin[i], (stops - starts)[i]))

    own = runs[:, 1] + runs[:, 0] * line
    np.subtract.at(received, runs[:, 0], read_before(own + runs[:, 2]) - read_before(own))
    return received


class _Queue:
    """Positions in the order in which ranks take them: linear pieces, each from its start up or from its end down."""

    def __init__(self, pieces: tuple[np.ndarray, ...], down: np.ndarray) -> None:
        start, num, first, slope = pieces
        first, slope = np.where(down, first + slope * (num - 1), first), np.where(down, -slope, slope)
        self.tokens = [0, *np.cumsum(num).tolist()]
        self.areas = [0, *np.cumsum(_sum(first, slope, num)).tolist()]
        # Lists, not arrays: the search below reads single entries, which numpy does ten times slower.
        self.start, self.num, self.first, self.slope = start.tolist(), num.tolist(), first.tolist(), slope.tolist()
        self.down = down.tolist()

    def area(self, num_tokens: int) -> int:
        """Area of the first ``num_tokens`` positions of the queue."""
        i = bisect_right(self.tokens, num_tokens) - 1
        if i == len(self.num):
            return self.areas[i]
        num = num_tokens - self.tokens[i]
        return self.areas[i] + self.first[i] * num + self.slope[i] * (num * (num - 1) // 2)

    def taken(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(first position, length) of the runs between two places of the queue."""
        out, i = [], bisect_right(self.tokens, begin) - 1
        while begin < end:
            stop = min(end, self.tokens[i + 1])
            a, b = begin - self.tokens[i], stop - self.tokens[i]
            out.append((self.start[i] + (self.num[i] - b if self.down[i] else a), b - a))
            begin, i = stop, i + 1
        return out


def _parts(mask: Mask) -> np.ndarray:
    """First positions of the parts of the sequence that share no pair with other parts (packed documents)."""
    q0, q1, k0, k1, _, _ = _table(mask).T
    starts, stops = np.minimum(q0, k0), np.maximum(q1, k1)
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    new = starts[1:] >= stops[:-1]
    return np.unique(np.concatenate([[0], starts[:1], starts[1:][new]]))


def _crossing(work: _Work, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """For every piece the length of its first part, and whether that, unlike the rest, is above ``limit`` keys.

    A rising piece is light, then heavy; a falling one heavy, then light; either part may be empty.
    """
    steep = np.maximum(np.abs(work.slope), 1)
    above = work.first > limit
    rising = np.where(above, 0, (limit - work.first) // steep + 1)
    falling = np.where(above, -((limit - work.first) // steep), 0)
    lead = np.where(work.slope > 0, rising, np.where(work.slope < 0, falling, work.num))
    return np.minimum(lead, work.num), np.where(work.slope == 0, above, work.slope < 0)


def _queues(mask: Mask, work: _Work, limit: int, whole_up_to: int) -> tuple[_Queue, _Queue]:
    """Heavy positions (more than ``limit`` keys), heaviest run first, and light ones, in order of position.

    Parts of at most ``whole_up_to`` tokens are heavy or light as a whole, by their mean.
    """
    parts = _parts(mask)
    edges = np.append(parts, mask.num_tokens)
    sizes, totals = np.diff(edges), np.diff(work.until(edges))
    # A piece without keys may reach over several parts; it goes with the first.
    part = np.searchsorted(parts, work.start, side="right") - 1
    whole, whole_heavy = (sizes <= whole_up_to)[part], (totals > limit * sizes)[part]
    start, num, first, slope = work.start, work.num, work.first, work.slope
    lead, lead_heavy = _crossing(work, limit)
    lead, lead_heavy = np.where(whole, num, lead), np.where(whole, whole_heavy, lead_heavy)
    halves = [
        np.stack(pair, axis=1).ravel()
        for pair in (
            (start, start + lead),
            (lead, num - lead),
            (first, first + slope * lead),
            (slope, slope),
            (part, part),
            (lead_heavy, ~lead_heavy),
        )
    ]
    *pieces, heavy = (column[halves[1] > 0] for column in halves)
    light = _Queue(tuple(column[~heavy] for column in pieces[:4]), np.zeros(np.count_nonzero(~heavy), bool))
    start, num, first, slope, part = (column[heavy] for column in pieces)
    if not len(start):
        return _Queue((start, num, first, slope), np.zeros(0, bool)), light
    last = first + slope * (num - 1)
    new = np.concatenate([[True], (start[1:] != (start + num)[:-1]) | (part[1:] != part[:-1])])
    run, heads = np.cumsum(new) - 1, np.flatnonzero(new)
    tails = np.append(heads[1:], len(start)) - 1
    peak = np.maximum.reduceat(np.maximum(first, last), heads)
    # Each run is taken from its heavier end on: the heaviest queries meet the lightest ones in one rank, so that as
    # many as possible share the keys they read.
    down = (last[tails] >= first[heads])[run]
    order = np.lexsort((np.where(down, -start, start), run, -peak[run]))
    return _Queue((start[order], num[order], first[order], slope[order]), down[order]), light


def _deal(mask: Mask, work: _Work, world: int, bound: int, *, whole: bool) -> np.ndarray:
    """Runs (rank, start, length): each rank the most heavy positions that the bound permits, the rest light ones."""
    sizes = even_split(mask.num_tokens, world)
    # A query has at most s keys: a higher limit means the same and could overflow.
    limit = min(bound // sizes[0], mask.num_tokens)
    heavy, light = _queues(mask, work, limit, sizes[0] if whole else 0)
    num_heavy, num_light = heavy.tokens[-1], light.tokens[-1]
    rows: list[tuple[int, int, int]] = []
    h = k = 0
    left = work.total
    for rank, size in enumerate(sizes):
        fewest, most = max(0, size - (num_light - k)), min(size, num_heavy - h)
        taken = heavy.area(h) + light.area(k)
        # Whole tokens leave a rank a little below the bound; where that adds up, the later ones share it.
        target = taken + max(bound, -(-left // (world - rank)))
        some = range(fewest, most + 1)
        x = bisect_right(some, target, key=lambda x: heavy.area(h + x) + light.area(k + size - x))
        x = max(fewest, fewest + x - 1)
        rows += [(rank, *run) for run in (*heavy.taken(h, h + x), *light.taken(k, k + size - x))]
        h, k = h + x, k + size - x
        left -= heavy.area(h) + light.area(k) - taken
    return np.array(rows, dtype=np.int64)
