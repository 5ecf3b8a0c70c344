"""Estimate: a schedule's time in a few milliseconds, for choosing among many. The coarse sibling of ``simulate``.

``tabulate`` turns a phase into arrays once; ``estimate`` prices them on any topology and device in numpy alone. Coarser
than ``simulate`` in two ways: a wire serves the messages of a step together, all of them through at one time, and then
those of the next step; and a block's calls come from its pieces of bands, of which only rectangles are joined, not from
the exact plan of all of them. Dependencies between ranks are kept: a rank goes on when its own blocks are done and what
lands has come from ranks that had got that far.

Cost: arrays of blocks × pieces; tabulating 64 ranks takes some milliseconds a method, pricing two or three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longspan.attention.bands import Band
from longspan.context.costs import WINDOWED, dtype_of, shapes
from longspan.context.geometry import Geometry, Ranges, count
from longspan.context.pieces import pieces_of
from longspan.context.schedule import SUMS, Schedule, Sizes
from longspan.hardware.profile import DeviceProfile
from longspan.hardware.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A phase as arrays.

    Attributes:
        world, num_steps, backward: of the phase.
        blocks: (B, 7) step, rank, rows, keys, query heads, KV heads, whether a result for its queries is there already.
        num_shapes, shapes: (B,) which pieces each block has: blocks on the same queries and keys may share them.
        pieces: (N, 6) shape, rows, keys, area, lo, hi, as ``pieces.pieces_of`` has them.
        moves: (M, 5) step, src, dst, lands, index among ``KINDS``.
        rows: (M,) tokens × heads of each move.
        complete: (M,) whether it is a complete sum.
        keeps: whether a forward phase keeps arrivals, without which the method's backward phase cannot be.
    """

    world: int
    num_steps: int
    backward: bool
    blocks: np.ndarray
    num_shapes: int
    shapes: np.ndarray
    pieces: np.ndarray
    moves: np.ndarray
    rows: np.ndarray
    complete: np.ndarray
    keeps: bool


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
        num_shapes=len(phase.blocks),
        shapes=np.arange(len(phase.blocks)),
        pieces=pieces_of([(block.q, block.k) for block in phase.blocks], geometry),
        moves=np.array(moves, dtype=np.int64).reshape(-1, 5),
        rows=np.array(sizes, dtype=np.float64),
        complete=np.array(complete, dtype=bool),
        keeps=any(move.kept for move in phase.moves),
    )


class Kernel(NamedTuple):
    """By shape, for a number of heads: seconds of the calls, whether they are several, their rows and keys."""

    seconds: np.ndarray
    several: np.ndarray
    rows: np.ndarray
    keys: np.ndarray


class Known:
    """What is known of tables on one device, by identity; holds the tables, so that no other takes their identity."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[int, int, bool], tuple[np.ndarray, Kernel]] = {}  # by pieces, heads, backward
        self.block_s: dict[int, tuple[Table, np.ndarray]] = {}  # by table


def kernel_of(
    pieces: np.ndarray, num: int, heads: int, device: DeviceProfile, sizes: Sizes, known: Known, *, backward: bool
) -> Kernel:
    """The kernels of ``num`` shapes for some query heads."""
    key = id(pieces), heads, backward
    if key not in known.kernels:
        known.kernels[key] = pieces, _kernel(pieces, num, heads, device, sizes, backward=backward)
    return known.kernels[key][1]


def _kernel(pieces: np.ndarray, num: int, heads: int, device: DeviceProfile, sizes: Sizes, *, backward: bool) -> Kernel:
    index, calls, launches = _calls(pieces, device.kernel)
    group = index if device.packed else np.arange(len(index))
    kernel = device.backward if backward else device.forward
    seconds = device.calls_s(
        calls.astype(np.float64),
        group,
        np.full(len(index), sizes.batch * heads),
        head_dim=sizes.head_dim,
        dtype=dtype_of(sizes),
        backward=backward,
    )
    if not device.packed:
        seconds = np.bincount(index, seconds + (launches - 1) * kernel.call_s, num)
    seconds = np.append(seconds, np.zeros(num - len(seconds)))
    rows, keys = (np.bincount(index, calls[:, axis], num) for axis in (0, 1))
    return Kernel(seconds, np.bincount(index, launches, num) > 1, rows, keys)


def _calls(pieces: np.ndarray, kernel: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The calls of pieces of bands: (n,) the shape of each, (n, 5) a ``Shape`` in each row, (n,) its launches.

    A band bounded above alone stands for a square and up to two rectangles. One bounded below is a call, too, where the
    kernel knows windows; else it goes in tiles, as the kernel cuts it when it is on its own.
    """
    index, rows, keys, area, lo, hi = pieces.T
    above, below = hi < keys - 1, lo > 1 - rows
    calls = np.stack([rows, keys, area, above.astype(np.int64) + below, np.zeros_like(rows)], 1)
    launches = 1 + np.where(above & ~below, (hi > 0).astype(np.int64) + (keys - hi < rows), 0)
    if kernel in WINDOWED or not below.any():
        return index, calls, launches
    bands, which = np.unique(pieces[below][:, [1, 2, 4, 5]], axis=0, return_inverse=True)
    tiles = [np.array(shapes((Band(0, q, 0, k, *diagonals),), kernel)) for q, k, *diagonals in bands.tolist()]
    of_band = [tiles[number] for number in which.ravel().tolist()]
    again = np.repeat(index[below], [len(some) for some in of_band])
    return (
        np.append(index[~below], again),
        np.concatenate([calls[~below], *of_band]),
        np.append(launches[~below], np.ones_like(again)),
    )


def _block_s(table: Table, device: DeviceProfile, sizes: Sizes, known: Known) -> np.ndarray:
    """Seconds of every block."""
    if id(table) not in known.block_s:
        known.block_s[id(table)] = table, _new_block_s(table, device, sizes, known)
    return known.block_s[id(table)][1]


def _new_block_s(table: Table, device: DeviceProfile, sizes: Sizes, known: Known) -> np.ndarray:
    """Kernels, and memory traffic as ``costs`` counts it, less what few blocks need."""
    _, _, rows, keys, heads, kv_heads, again = table.blocks.T
    columns = np.empty((4, len(rows)))
    num = table.num_shapes
    for some in np.unique(heads).tolist():
        kernel = kernel_of(table.pieces, num, some, device, sizes, known, backward=table.backward)
        at = heads == some
        columns[:, at] = np.stack(kernel)[:, table.shapes[at]]
    seconds, several, call_rows, call_keys = columns
    wide = max(4, sizes.inputs)
    widen = 0 if wide == sizes.inputs else wide + sizes.inputs
    result, keys_result = rows * heads, 2 * keys * kv_heads * table.backward
    # A block of several calls adds them up in an accumulator of its own.
    if table.backward:
        call = (sizes.inputs + 2 * wide) * (call_rows * heads + 2 * call_keys * kv_heads)
        inside = wide * (result + keys_result) + call
    else:
        later = np.maximum(call_rows - rows, 0) * heads
        inside = wide * result + (widen or 2 * wide) * result + (widen + 3 * wide) * later
    elements = np.where(several > 0, inside, widen * (result + keys_result)) + 3 * wide * (result * again + keys_result)
    return seconds + device.block_s + sizes.batch * sizes.head_dim * elements / device.memory_bytes_per_s


def _move_bytes(kinds: np.ndarray, rows: np.ndarray, complete: np.ndarray, sizes: Sizes) -> np.ndarray:
    d, stat = sizes.head_dim, max(4, sizes.sums)

    def row_bytes(sums: int) -> np.ndarray:
        inputs = d * sizes.inputs
        return np.array([inputs, 2 * inputs, inputs + 2 * stat, d * sums + stat, d * sums, 2 * d * sums])

    per_row = np.where(complete, row_bytes(sizes.inputs)[kinds], row_bytes(sizes.sums)[kinds])
    return sizes.batch * rows * per_row


def sent_bytes(table: Table, sizes: Sizes) -> np.ndarray:
    """(world,): payload bytes that each rank sends in the phase."""
    num_bytes = _move_bytes(table.moves[:, 4], table.rows, table.complete, sizes)
    return np.bincount(table.moves[:, 1], num_bytes, table.world)


def least_s(table: Table, topology: Topology, device: DeviceProfile, sizes: Sizes, known: Known) -> float:
    """A lower bound of ``estimate``: the busiest rank's blocks, and the busiest wire's bytes. Raises as ``estimate``.

    ``known`` is for one device and sizes; tables that share pieces share their kernels' times there.
    """
    _check_world(table, topology)
    busy = np.bincount(table.blocks[:, 1], _block_s(table, device, sizes, known), table.world)
    _, src, dst, _, kind = table.moves.T
    num_bytes = _move_bytes(kind, table.rows, table.complete, sizes)
    return float(max(busy.max(), wires_s(src * table.world + dst, num_bytes, topology).max()))


def wires_s(pair: np.ndarray, num_bytes: np.ndarray, topology: Topology) -> np.ndarray:
    """(wires + 1,): seconds that messages of so many bytes keep each wire; ``pair`` as in ``routes``."""
    wires, capacity = routes(topology)[0][pair], _capacity(topology)
    return np.bincount(wires.ravel(), np.repeat(num_bytes, wires.shape[1]), len(capacity)) / capacity


def _check_world(table: Table, topology: Topology) -> None:
    if topology.num_ranks != table.world:
        raise ValueError(
            f"topology {topology.name!r} has {topology.num_ranks} ranks, the schedule {table.world}; "
            f"make one for {table.world}"
        )


@lru_cache(maxsize=8)
def narrowest(topology: Topology) -> np.ndarray:
    """(world · world,) by src · world + dst: bytes/s of the narrowest wire between two ranks."""
    return _capacity(topology)[routes(topology)[0]].min(axis=1)


@lru_cache(maxsize=8)
def users(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """bool (world, wires + 1), twice: whether a message from the rank, or to it, may cross the wire."""
    world, wires = topology.num_ranks, routes(topology)[0]
    found = np.zeros((2, world, len(topology.resources) + 1), bool)
    src, dst = np.divmod(np.arange(world * world), world)
    found[0, src[:, None], wires] = found[1, dst[:, None], wires] = True
    return found[0], found[1]


def _capacity(topology: Topology) -> np.ndarray:
    """Bytes/s of every wire, and of one past the last, which stands for none."""
    return np.array([wire.bytes_per_s for wire in topology.resources] + [math.inf])


def estimate(table: Table, topology: Topology, device: DeviceProfile, sizes: Sizes) -> float:
    """Seconds until the last rank is done.

    Raises:
        ValueError: the topology has another number of ranks, or the profile does not know the dtype.
    """
    return estimate_all([table], topology, device, sizes, Known())[0]


def estimate_all(
    tables: list[Table], topology: Topology, device: DeviceProfile, sizes: Sizes, known: Known
) -> list[float]:
    """``estimate`` of several tables at once: all take their steps together, each on ranks and wires of its own.

    ``known`` as in ``least_s``. Raises ValueError as ``estimate``.
    """
    for table in tables:
        _check_world(table, topology)
    world, num_steps = topology.num_ranks, max(table.num_steps for table in tables)
    ranks = len(tables) * world

    def by_step(step: np.ndarray, rank: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        total = np.bincount(step * ranks + rank, seconds, num_steps * ranks)
        return total.astype(np.float64).reshape(num_steps, ranks)  # of nothing, numpy counts in integers

    block_s = np.concatenate([_block_s(table, device, sizes, known) for table in tables])
    first = np.repeat(np.arange(len(tables)) * world, [len(table.blocks) for table in tables])
    blocks = np.concatenate([table.blocks[:, :2] for table in tables])
    busy = by_step(blocks[:, 0], blocks[:, 1] + first, block_s)
    number = np.repeat(np.arange(len(tables)), [len(table.moves) for table in tables])
    step, src, dst, lands, kind = np.concatenate([table.moves for table in tables]).T
    rows, complete = (np.concatenate([getattr(t, name) for t in tables]) for name in ("rows", "complete"))
    pair = src * world + dst
    src, dst = src + number * world, dst + number * world
    num_bytes = _move_bytes(kind, rows, complete, sizes)
    memory_s = 1 / device.memory_bytes_per_s
    sums = kind >= KINDS.index(SUMS[0])
    busy += by_step(step, src, 2 * num_bytes * memory_s * np.where(sums, 1, step == 0))
    merged = 3 * max(4, sizes.inputs) * sizes.batch * sizes.head_dim * rows * np.where(kind == KINDS.index("dkv"), 2, 1)
    busy += by_step(lands, dst, merged * memory_s * sums)
    if topology.byte_s:
        busy += by_step(step, src, num_bytes * topology.byte_s) + by_step(step, dst, num_bytes * topology.byte_s)
    posted = by_step(step, src, np.full(len(src), topology.message_s))
    if topology.blocking:
        busy += posted
    path, caps, latency = (of_pair[pair] for of_pair in routes(topology))
    capacity = _capacity(topology)
    own_s = num_bytes / caps
    if np.isfinite(caps).any():
        same = (step * len(tables) + number) * world * world + pair
        _, inverse = np.unique(same, return_inverse=True)
        own_s = np.bincount(inverse, num_bytes)[inverse] / caps
    wires = path + number[:, None] * len(capacity)
    flight = latency + posted[step, src], own_s, num_bytes[:, None] / capacity[path], wires, number * world**2 + pair
    done = _follow(busy, (step, src, dst, lands), flight, (len(tables), len(capacity)))
    return done.reshape(len(tables), world).max(axis=1).tolist()


@lru_cache(maxsize=8)
def routes(topology: Topology) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    flight: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int],
) -> np.ndarray:
    """When each rank is done; ``shape`` is (tables, wires of each and one that stands for none).

    It walks through the steps: a rank enters the next when it has computed and everything that lands has come.

    A wire takes the messages of a step together, from the first that is there on, and after those of earlier steps; so
    do two ranks, whose messages alone have a limit.
    """
    num_steps, world = busy.shape
    num_wires = shape[0] * shape[1]
    order = np.argsort(moves[0], kind="stable")
    step, src, dst, lands = (x[order] for x in moves)
    before_s, own_s, wire_s, paths, pair = (x[order] for x in flight)
    edges = np.searchsorted(step, np.arange(num_steps + 1))
    entered, due = np.zeros(world), np.zeros((num_steps, world))
    free, over = np.zeros(num_wires), np.zeros(int(pair.max(initial=-1)) + 1)
    for now in range(num_steps):
        some = slice(edges[now], edges[now + 1])
        if edges[now] < edges[now + 1]:
            begun = np.maximum(entered[src[some]], entered[dst[some]])
            wires = paths[some].ravel()
            first = np.full(num_wires, math.inf)
            np.minimum.at(first, wires, np.repeat(begun, paths.shape[1]))
            used = np.isfinite(first)
            until = np.maximum(first, free) + np.bincount(wires, wire_s[some].ravel(), num_wires)
            free[used] = until[used]
            free.reshape(shape)[:, -1] = until.reshape(shape)[:, -1] = 0.0  # stand for no wire
            alone = np.maximum(begun, over[pair[some]]) + own_s[some]
            over[pair[some]] = alone
            through = np.maximum(until[paths[some]].max(axis=1), alone)
            np.maximum.at(due, (lands[some], dst[some]), through + before_s[some])
        entered = np.maximum(entered + busy[now], due[now])
    return entered
