"""Estimate: a schedule's time in a few milliseconds, for choosing among many. The coarse sibling of ``simulate``.

``tabulate`` turns a phase into arrays once; ``estimate`` prices them on any topology and device in numpy alone. Coarser
than ``simulate`` in two ways: a wire serves the messages of a step together, all of them through at one time, and then
those of the next step; and a block's calls come from its pieces of bands, of which only rectangles are joined, not from
the exact plan. Dependencies between ranks are kept: a rank goes on when its own blocks are done and what lands has come
from ranks that had got that far.

Cost: arrays of blocks × pieces; tabulating 64 ranks takes some milliseconds a method, pricing two or three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longspan.context.costs import dtype_of
from longspan.context.geometry import Geometry, Ranges, count
from longspan.context.schedule import SUMS, Schedule, Sizes
from longspan.hardware.profile import DeviceProfile
from longspan.hardware.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A phase as arrays.

    Attributes:
        world, num_steps, backward: of the phase.
        blocks: (B, 7) step, rank, rows, keys, query heads, KV heads, whether a result for its queries is there already.
        pieces: (N, 6) block, rows, keys, area, diagonals, launches.
        moves: (M, 5) step, src, dst, lands, index among ``KINDS``.
        rows: (M,) tokens × heads of each move.
        complete: (M,) whether it is a complete sum.
    """

    world: int
    num_steps: int
    backward: bool
    blocks: np.ndarray
    pieces: np.ndarray
    moves: np.ndarray
    rows: np.ndarray
    complete: np.ndarray


KINDS = ("q", "kv", "do", "o", "dq", "dkv")


def tabulate(schedule: Schedule, geometry: Geometry, *, backward: bool = False) -> Table:
    """The arrays of one phase of a pruned schedule; independent of topology, device and sizes."""
    phase = schedule.backward if backward else schedule.forward
    ranges = {id(r): r for block in phase.blocks for r in (block.q, block.k)}
    ranges |= {id(move.piece.tokens): move.piece.tokens for move in phase.moves}
    tokens = {key: count(r) for key, r in ranges.items()}  # by identity, which the phase keeps alive
    seen: set[tuple[int, Ranges]] = set()
    rows, size = [], schedule.group_size
    for block in phase.blocks:
        q, (first, last), key = block.q, block.heads, (block.rank, block.q)
        kv_heads = -(-last // size) - first // size
        rows.append((block.step, block.rank, tokens[id(q)], tokens[id(block.k)], last - first, kv_heads, key in seen))
        seen.add(key)
    index = {kind: number for number, kind in enumerate(KINDS)}
    pieces = [move.piece for move in phase.moves]
    moves = [(m.step, m.src, m.dst, m.lands, index[p.kind]) for m, p in zip(phase.moves, pieces, strict=True)]
    sizes = [tokens[id(p.tokens)] * (p.heads[1] - p.heads[0]) for p in pieces]
    complete = [move.complete for move in phase.moves]
    return Table(
        world=schedule.layout.world,
        num_steps=phase.num_steps,
        backward=backward,
        blocks=np.array(rows, dtype=np.int64).reshape(-1, 7),
        pieces=_pieces([(block.q, block.k) for block in phase.blocks], geometry),
        moves=np.array(moves, dtype=np.int64).reshape(-1, 5),
        rows=np.array(sizes, dtype=np.float64),
        complete=np.array(complete, dtype=bool),
    )


def _runs(unique: list[Ranges], geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) row in the block, first position and length of each stretch of ranges, and (u + 1,) where ranges start."""
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


def _expand(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges starts .. starts + sizes: (owner of each member, member)."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return owner, np.arange(len(owner)) - first + np.repeat(starts, sizes)


def _pieces(blocks: list[tuple[Ranges, Ranges]], geometry: Geometry) -> np.ndarray:
    """(n, 6) block, rows, keys, area, diagonals, launches of the pieces of bands of blocks."""
    table = geometry.table
    if not blocks or not len(table):
        return np.zeros((0, 6), np.int64)
    index: dict[Ranges, int] = {}
    pairs = np.array([[index.setdefault(ranges, len(index)) for ranges in block] for block in blocks])
    runs, edges = _runs(list(index), geometry)
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
    above, below = hi < k1 - 1 - q0, lo > k0 - (q1 - 1)
    # A band bounded above alone is a square and up to two rectangles.
    launches = 1 + np.where(above & ~below, (q0 + hi > k0).astype(int) + (k1 - hi < q1), 0)
    plain = ~above & ~below
    whole = np.stack([block, q_row + q0, q_row + q1, k_row + k0, k_row + k1], 1)
    rectangles = _joined(_joined(whole[plain], 3, 1), 1, 3)
    sizes = rectangles[:, 2] - rectangles[:, 1], rectangles[:, 4] - rectangles[:, 3]
    ones, zeros = np.ones(len(rectangles), np.int64), np.zeros(len(rectangles), np.int64)
    first = np.stack([rectangles[:, 0], *sizes, sizes[0] * sizes[1], zeros, ones], 1)
    rest = np.stack([block, q1 - q0, k1 - k0, area, above.astype(int) + below, launches], 1)[~plain]
    return np.concatenate([first, rest])


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


def _block_s(table: Table, device: DeviceProfile, sizes: Sizes) -> np.ndarray:
    """Seconds of every block: kernels, and memory traffic as ``costs`` counts it, less what few blocks need."""
    _, _, rows, keys, heads, kv_heads, again = table.blocks.T
    block, launches = table.pieces[:, 0], table.pieces[:, 5]
    shape = table.pieces[:, 1:5].astype(np.float64)
    group = block if device.packed else np.arange(len(block))
    kernel = device.backward if table.backward else device.forward
    seconds = device.calls_s(
        shape,
        group,
        sizes.batch * heads[block],
        head_dim=sizes.head_dim,
        dtype=dtype_of(sizes),
        backward=table.backward,
    )
    num = len(table.blocks)
    if not device.packed:
        seconds = np.bincount(block, seconds + (launches - 1) * kernel.call_s, num)
    seconds = np.append(seconds, np.zeros(num - len(seconds)))
    wide = max(4, sizes.inputs)
    widen = 0 if wide == sizes.inputs else wide + sizes.inputs
    result, keys_result = rows * heads, 2 * keys * kv_heads * table.backward
    # A block of several calls adds them up in an accumulator of its own.
    several = np.bincount(block, launches, num) > 1
    call_rows, call_keys = (np.bincount(block, shape[:, axis], num) for axis in (0, 1))
    if table.backward:
        call = (sizes.inputs + 2 * wide) * (call_rows * heads + 2 * call_keys * kv_heads)
        inside = wide * (result + keys_result) + call
    else:
        later = np.maximum(call_rows - rows, 0) * heads
        inside = wide * result + (widen or 2 * wide) * result + (widen + 3 * wide) * later
    elements = np.where(several, inside, widen * (result + keys_result)) + 3 * wide * (result * again + keys_result)
    return seconds + device.block_s + sizes.batch * sizes.head_dim * elements / device.memory_bytes_per_s


def _move_bytes(table: Table, sizes: Sizes) -> np.ndarray:
    d, stat = sizes.head_dim, max(4, sizes.sums)

    def row_bytes(sums: int) -> np.ndarray:
        inputs = d * sizes.inputs
        return np.array([inputs, 2 * inputs, inputs + 2 * stat, d * sums + stat, d * sums, 2 * d * sums])

    kinds = table.moves[:, 4]
    per_row = np.where(table.complete, row_bytes(sizes.inputs)[kinds], row_bytes(sizes.sums)[kinds])
    return sizes.batch * table.rows * per_row


def estimate(table: Table, topology: Topology, device: DeviceProfile, sizes: Sizes) -> float:
    """Seconds until the last rank is done.

    Raises:
        ValueError: the topology has another number of ranks, or the profile does not know the dtype.
    """
    if topology.num_ranks != table.world:
        raise ValueError(
            f"topology {topology.name!r} has {topology.num_ranks} ranks, the schedule {table.world}; "
            f"make one for {table.world}"
        )
    world, num_steps = table.world, table.num_steps
    busy = np.zeros((num_steps, world))
    np.add.at(busy, (table.blocks[:, 0], table.blocks[:, 1]), _block_s(table, device, sizes))
    step, src, dst, lands, kind = table.moves.T
    num_bytes = _move_bytes(table, sizes)
    memory_s = 1 / device.memory_bytes_per_s
    sums = kind >= KINDS.index(SUMS[0])
    np.add.at(busy, (step, src), 2 * num_bytes * memory_s * np.where(sums, 1, step == 0))
    merged = (
        3
        * max(4, sizes.inputs)
        * sizes.batch
        * sizes.head_dim
        * table.rows
        * np.where(kind == KINDS.index("dkv"), 2, 1)
    )
    np.add.at(busy, (lands, dst), merged * memory_s * sums)
    if topology.blocking:
        np.add.at(busy, (step, src), topology.message_s)
    pair = src * world + dst
    routes, caps, latency = (of_pair[pair] for of_pair in _routes(topology))
    capacity = np.array([wire.bytes_per_s for wire in topology.resources] + [math.inf])
    same = step * world * world + pair
    own_s = np.bincount(same, num_bytes, num_steps * world * world)[same] / caps
    posted = np.zeros((num_steps, world))
    np.add.at(posted, (step, src), topology.message_s)
    flight = latency + posted[step, src], own_s, num_bytes[:, None] / capacity[routes], routes
    return _follow(busy, (step, src, dst, lands), flight, len(capacity))


@lru_cache(maxsize=8)
def _routes(topology: Topology) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By src * world + dst: wires, filled up with one past the last, limit of a message alone, and latency."""
    world, none = topology.num_ranks, len(topology.resources)
    paths = {(a, b): topology.path(a, b) for a in range(world) for b in range(world) if a != b}
    width = max((len(path.resources) for path in paths.values()), default=1)
    wires = np.full((world * world, width), none)
    caps, latency = np.full(world * world, math.inf), np.zeros(world * world)
    for (a, b), path in paths.items():
        pair = a * world + b
        wires[pair, : len(path.resources)] = path.resources
        caps[pair], latency[pair] = path.flow_bytes_per_s, path.latency_s
    return wires, caps, latency


def _follow(
    busy: np.ndarray,
    moves: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    flight: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    num_wires: int,
) -> float:
    """Walk through the steps: a rank enters the next when it has computed and everything that lands has come.

    A wire takes the messages of a step together, from the first that is there on, and after those of earlier steps.
    """
    num_steps, world = busy.shape
    order = np.argsort(moves[0], kind="stable")
    step, src, dst, lands = (x[order] for x in moves)
    before_s, own_s, wire_s, routes = (x[order] for x in flight)
    edges = np.searchsorted(step, np.arange(num_steps + 1))
    entered, due = np.zeros(world), np.zeros((num_steps, world))
    free = np.zeros(num_wires)
    for now in range(num_steps):
        some = slice(edges[now], edges[now + 1])
        if edges[now] < edges[now + 1]:
            begun = np.maximum(entered[src[some]], entered[dst[some]])
            wires = routes[some].ravel()
            first = np.full(num_wires, math.inf)
            np.minimum.at(first, wires, np.repeat(begun, routes.shape[1]))
            used = np.isfinite(first)
            until = np.maximum(first, free) + np.bincount(wires, wire_s[some].ravel(), num_wires)
            free[used] = until[used]
            free[-1] = until[-1] = 0.0  # stands for no wire
            through = np.maximum(until[routes[some]].max(axis=1), begun + own_s[some])
            np.maximum.at(due, (lands[some], dst[some]), through + before_s[some])
        entered = np.maximum(entered + busy[now], due[now])
    return float(entered.max(initial=0.0))
