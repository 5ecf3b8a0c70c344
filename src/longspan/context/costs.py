"""What each block and each move of a phase costs one rank: kernel calls, merges, copies into and out of messages.

The counts follow what ``engine`` and the kernels do. A block is the calls that ``attention.kernels.calls`` cuts its
bands into; results are widened to the accumulator's dtype and merged where a partial result lies already (three passes
of it over memory); inputs that lie in several buffers are joined first; a message is packed unless it is an arrival
passed on. Merges are counted one by one, while ``engine`` merges outputs several at a time: they come out dearer here.
Cost here: exact bands of every block, 30-60 microseconds each.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longspan.attention.bands import Bands, total_area
from longspan.attention.kernels.calls import Call, plan_calls, plan_windows
from longspan.context.geometry import Geometry, Range, Ranges, count
from longspan.context.schedule import INPUTS, KV_KINDS, SUMS, Block, Kind, Phase, Piece, Schedule, Sizes, kv_heads_of
from longspan.hardware.profile import DeviceProfile, Shape

DTYPES = {2: "bfloat16", 4: "float32", 8: "float64"}
WINDOWED = ("cudnn", "cuda_flash")  # kernels that take both diagonals of a band in one call
MIN_SQUARE = 256  # of ``kernels.cudnn``, which needs CUDA's torch to be of use; the plan is the same everywhere


class Costs(NamedTuple):
    """Seconds of one rank's own time, by block and by move of a phase, and by rank at its end."""

    kernel_s: np.ndarray  # per block: the library calls
    memory_s: np.ndarray  # per block: joining inputs, widening and merging results, and the device's ``block_s``
    pack_s: np.ndarray  # per move, of the sender
    land_s: np.ndarray  # per move, of the receiver
    final_s: np.ndarray  # per rank: its results in the inputs' dtype
    num_bytes: np.ndarray  # per move, on the wire

    @property
    def block_s(self) -> np.ndarray:
        return self.kernel_s + self.memory_s


def dtype_of(sizes: Sizes) -> str:
    """The inputs' dtype as profiles name it. Raises ValueError for a width that no dtype has."""
    if sizes.inputs not in DTYPES:
        raise ValueError(f"inputs must have 2, 4 or 8 bytes per element, got {sizes.inputs}; correct the sizes")
    return DTYPES[sizes.inputs]


@lru_cache(maxsize=1 << 15)
def plan(bands: Bands, kernel: str) -> tuple[Call, ...]:
    """The library calls of a block for a back end."""
    if kernel in WINDOWED:
        return plan_windows(bands, MIN_SQUARE if kernel == "cudnn" else None)
    return plan_calls(bands)


@lru_cache(maxsize=1 << 15)
def shapes(bands: Bands, kernel: str) -> tuple[Shape, ...]:
    """The calls of a block as the profile sees them.

    A masked call computes its whole rectangle, and the first of those with equal masks makes the mask for all.
    """
    found, made = [], set()
    for q0, q1, k0, k1, kind, parts, _ in plan(bands, kernel):
        rows, keys = q1 - q0, k1 - k0
        if kind == "causal":
            found.append(Shape(rows, keys, rows * (rows + 1) // 2, 1))
        elif kind == "window":
            (band,) = parts
            diagonals = (band.hi < keys - 1) + (band.lo > 1 - rows)
            found.append(Shape(rows, keys, total_area(parts), diagonals))
        else:
            makes = kind == "masked" and (parts, rows, keys) not in made
            made.add((parts, rows, keys))
            found.append(Shape(rows, keys, rows * keys, mask=makes * rows * keys))
    return tuple(found)


def phase_costs(
    phase: Phase, schedule: Schedule, geometry: Geometry, device: DeviceProfile, sizes: Sizes, *, backward: bool
) -> Costs:
    """Costs of a pruned phase. Raises ValueError for sizes of no dtype, or one that the device's profile lacks."""
    tally = _Tally(schedule, sizes)
    memory = np.zeros(len(phase.blocks))
    pack, land = np.zeros(len(phase.moves)), np.zeros(len(phase.moves))
    posted, landing, computed = defaultdict(list), defaultdict(list), defaultdict(list)
    for index, move in enumerate(phase.moves):
        posted[move.step].append((index, move))
        landing[move.lands].append((index, move))
    for index, block in enumerate(phase.blocks):
        computed[block.step].append((index, block))
    if backward:
        for move in schedule.forward.moves:
            if move.kept:
                tally.arrived[move.dst, move.piece.kind].append(move.piece.tokens)
    for step in range(phase.num_steps):
        for index, move in posted[step]:
            pack[index] = tally.send(move.src, move.piece, sizes.of_move(move))
        for index, block in computed[step]:
            bands = geometry.bands(block.q, block.k)
            memory[index] = tally.block(block, plan(bands, device.kernel), backward=backward)
        for index, move in landing[step]:
            land[index] = tally.land(move.dst, move.piece)
    final = np.array([tally.result(rank, backward=backward) for rank in range(schedule.layout.world)])
    return Costs(
        kernel_s=_kernel_s(phase, geometry, device, sizes, backward=backward),
        memory_s=memory / device.memory_bytes_per_s + device.block_s,
        pack_s=pack / device.memory_bytes_per_s,
        land_s=land / device.memory_bytes_per_s,
        final_s=final / device.memory_bytes_per_s,
        num_bytes=np.array([sizes.of_move(move) for move in phase.moves], dtype=np.float64),
    )


def _kernel_s(phase: Phase, geometry: Geometry, device: DeviceProfile, sizes: Sizes, *, backward: bool) -> np.ndarray:
    table, owner, heads = [], [], []
    for index, block in enumerate(phase.blocks):
        calls = shapes(geometry.bands(block.q, block.k), device.kernel)
        table += calls
        owner += [index] * len(calls)
        heads += [sizes.batch * (block.heads[1] - block.heads[0])] * len(calls)
    owners = np.array(owner, dtype=np.int64)
    group = owners if device.packed else np.arange(len(owners))
    rows = np.array(table, dtype=np.float64).reshape(-1, len(Shape._fields))
    seconds = device.calls_s(
        rows, group, np.array(heads), head_dim=sizes.head_dim, dtype=dtype_of(sizes), backward=backward
    )
    return seconds if device.packed else np.bincount(owners, seconds, len(phase.blocks))


class _Tally:
    """Bytes of memory read and written, and what they depend on: which sums and arrivals a rank holds."""

    def __init__(self, schedule: Schedule, sizes: Sizes) -> None:
        self.schedule, self.sizes = schedule, sizes
        self.wide = max(4, sizes.inputs)  # bytes of an accumulator's element
        self.widen = 0 if sizes.inputs == self.wide else sizes.inputs + self.wide
        self.sums: dict[tuple[int, Kind], dict[Piece, None]] = defaultdict(dict)
        self.arrived: dict[tuple[int, Kind], list[Ranges]] = defaultdict(list)

    def _elements(self, num_tokens: int, heads: Range, kind: Kind) -> int:
        tensors = 2 if kind in KV_KINDS else 1
        return self.sizes.batch * num_tokens * (heads[1] - heads[0]) * self.sizes.head_dim * tensors

    def _add(self, rank: int, piece: Piece) -> int:
        """Put a partial result in place: bytes of merging it with what lies there."""
        held, tokens = self.sums[rank, piece.kind], count(piece.tokens)
        if piece in held:
            shared = self._elements(tokens, piece.heads, piece.kind)
        else:
            cells = sum(_common(piece.tokens, other.tokens) * _length(piece.heads, other.heads) for other in held)
            cells = min(cells, tokens * (piece.heads[1] - piece.heads[0]))
            shared = self._elements(cells, (0, 1), piece.kind)
            held[piece] = None
        return 3 * self.wide * shared

    def send(self, rank: int, piece: Piece, num_bytes: int) -> int:
        if piece.kind in SUMS:
            self.sums[rank, piece.kind].pop(piece, None)
        elif piece.tokens in self.arrived[rank, piece.kind]:
            return 0
        return 2 * num_bytes

    def land(self, rank: int, piece: Piece) -> int:
        if piece.kind in INPUTS:
            self.arrived[rank, piece.kind].append(piece.tokens)
            return 0
        return self._add(rank, piece)

    def _join(self, rank: int, piece: Piece) -> int:
        """Bytes of joining an input that lies in several buffers."""
        own = (self.schedule.layout.owned(rank),)
        if _within(piece.tokens, own):
            return 0
        # Most blocks read what came last.
        if any(_within(piece.tokens, tokens) for tokens in reversed(self.arrived[rank, piece.kind])):
            return 0
        return 2 * self.sizes.of(piece)

    def block(self, block: Block, calls: tuple[Call, ...], *, backward: bool) -> int:
        kv_heads = kv_heads_of(block.heads, self.schedule.group_size)
        q, kv = Piece("q", block.q, block.heads), Piece("kv", block.k, kv_heads)
        num = self._join(block.rank, q) + self._join(block.rank, kv)
        rows, keys = count(block.q), count(block.k)
        if not backward:
            whole = len(calls) == 1 and calls[0].q1 - calls[0].q0 == rows
            num += self._elements(rows, block.heads, "o") * (self.widen if whole else self.wide)
            for call in calls if not whole else ():
                passes = (self.widen or 2 * self.wide) if call.fresh else self.widen + 3 * self.wide
                num += self._elements(call.q1 - call.q0, block.heads, "o") * passes
            return num + self._add(block.rank, Piece("o", block.q, block.heads))
        num += self._join(block.rank, Piece("do", block.q, block.heads))
        whole = len(calls) == 1 and (calls[0].q1 - calls[0].q0, calls[0].k1 - calls[0].k0) == (rows, keys)
        results: tuple[tuple[Kind, Ranges, Range], ...] = (("dq", block.q, block.heads), ("dkv", block.k, kv_heads))
        for kind, tokens, heads in results:
            num += self._elements(count(tokens), heads, kind) * (self.widen if whole else self.wide)
            for call in calls if not whole else ():
                size = call.q1 - call.q0 if kind == "dq" else call.k1 - call.k0
                num += self._elements(size, heads, kind) * (self.sizes.inputs + 2 * self.wide)
            num += self._add(block.rank, Piece(kind, tokens, heads))
        return num

    def result(self, rank: int, *, backward: bool) -> int:
        """Bytes of handing a rank's sums over in the inputs' dtype."""
        tokens, schedule = self.schedule.layout.local_sizes[rank], self.schedule
        if not backward:
            return self.widen * self._elements(tokens, (0, schedule.num_heads), "o")
        both = self._elements(tokens, (0, schedule.num_heads), "dq")
        return self.widen * (both + self._elements(tokens, (0, schedule.num_kv_heads), "dkv"))


def _length(a: Range, b: Range) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _common(a: Ranges, b: Ranges) -> int:
    return sum(_length(x, y) for x in a for y in b)


def _within(inner: Ranges, outer: Ranges) -> bool:
    return all(any(o[0] <= i[0] and i[1] <= o[1] for o in outer) for i in inner)
