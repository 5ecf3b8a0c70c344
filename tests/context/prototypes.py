"""Methods written to try the schedule language before it is frozen; they become full methods later.

TokenRing (arXiv:2412.20501), LightSeq / DistFlashAttn (arXiv:2310.03294), Ulysses with uneven heads
(arXiv:2309.14509), BurstAttention's backward (arXiv:2403.09347) and a double ring (LoongTrain, arXiv:2406.18485).
"""

from __future__ import annotations

from longspan.context.methods.ring import ring
from longspan.context.passes import replay
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, kv_heads_of, ordered
from longspan.layout.tokens import Layout, even_split


def token_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    world, heads = layout.world, (0, num_heads)
    moves, blocks = [], []
    for step in range(world):
        for rank in range(world):
            source = (rank - step) % world
            q = layout.owned(source)
            blocks.append(Block(step, rank, (q,), (layout.owned(rank),), heads))
            if step < world - 1:
                moves.append(Move(step, rank, (rank + 1) % world, Piece("q", (q,), heads)))
            if step > 0:
                moves.append(Move(step + 1, rank, source, Piece("o", (q,), heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    backward = replay(forward, layout, num_heads, num_kv_heads, dkv="home")
    return Schedule("token_ring", layout, num_heads, num_kv_heads, forward, backward)


def light_seq(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Causal masks on contiguous shards only."""
    world, heads, kv_heads = layout.world, (0, num_heads), (0, num_kv_heads)
    moves = []
    blocks = [Block(0, r, (layout.owned(r),), (layout.owned(r),), heads) for r in range(world)]
    for step in range(1, world // 2 + 1):
        for rank in range(world):
            own = layout.owned(rank)
            if rank >= step:
                k = layout.owned(rank - step)
                moves.append(Move(step - 1, rank - step, rank, Piece("kv", (k,), kv_heads)))
                blocks.append(Block(step, rank, (own,), (k,), heads))
            elif 2 * step < world:
                helped = rank - step + world
                q = layout.owned(helped)
                moves.append(Move(step - 1, helped, rank, Piece("q", (q,), heads)))
                blocks.append(Block(step, rank, (q,), (own,), heads))
                moves.append(Move(step + 1, rank, helped, Piece("o", (q,), heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    backward = replay(forward, layout, num_heads, num_kv_heads, dkv="home")
    return Schedule("light_seq", layout, num_heads, num_kv_heads, forward, backward)


def ulysses(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    world = layout.world
    sizes = even_split(num_heads, world)
    moves, blocks, first = [], [], 0
    everything = ((0, layout.num_tokens),)
    for rank, size in enumerate(sizes):
        heads = (first, first + size)
        first += size
        if not size:
            continue
        kv_heads = kv_heads_of(heads, num_heads // num_kv_heads)
        for other in range(world):
            if other != rank:
                own = (layout.owned(other),)
                moves.append(Move(0, other, rank, Piece("q", own, heads)))
                moves.append(Move(0, other, rank, Piece("kv", own, kv_heads)))
                moves.append(Move(2, rank, other, Piece("o", own, heads)))
        blocks.append(Block(1, rank, everything, everything, heads))
    forward = Phase(ordered(moves, world), tuple(blocks))
    backward = replay(forward, layout, num_heads, num_kv_heads, dkv="home")
    return Schedule("ulysses", layout, num_heads, num_kv_heads, forward, backward)


def burst(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Forward: the ring. Backward: keys stay; q, do and the travelling dq hop round."""
    world, heads = layout.world, (0, num_heads)
    moves, blocks = [], []
    for step in range(world):
        for rank in range(world):
            q, following = layout.owned((rank - step) % world), (rank + 1) % world
            blocks.append(Block(step, rank, (q,), (layout.owned(rank),), heads))
            if step < world - 1:
                moves.append(Move(step, rank, following, Piece("q", (q,), heads)))
                moves.append(Move(step, rank, following, Piece("do", (q,), heads)))
            if step > 0:
                moves.append(Move(step + 1, rank, following, Piece("dq", (q,), heads)))
    forward = ring(layout, num_heads, num_kv_heads).forward
    return Schedule("burst", layout, num_heads, num_kv_heads, forward, Phase(ordered(moves, world), tuple(blocks)))


def double_ring(layout: Layout, num_heads: int, num_kv_heads: int, inner: int = 2) -> Schedule:
    """Windows of ``inner`` ranks: keys hop inside a window while the next window's keys are under way on lane 1."""
    world = layout.world
    assert world % inner == 0
    windows = world // inner
    moves, blocks = [], []
    for outer in range(windows):
        for hop in range(inner):
            step = outer * inner + hop
            for window in range(windows):
                for place in range(inner):
                    rank = window * inner + place
                    keys = layout.owned((window - outer) % windows * inner + (place - hop) % inner)
                    piece = Piece("kv", (keys,), (0, num_kv_heads))
                    blocks.append(Block(step, rank, (layout.owned(rank),), (keys,), (0, num_heads)))
                    if hop < inner - 1:
                        moves.append(Move(step, rank, window * inner + (place + 1) % inner, piece))
                    if hop == 0 and outer < windows - 1:
                        target = (window + 1) % windows * inner + place
                        moves.append(Move(step, rank, target, piece, lands=step + inner - 1, lane=1))
    forward = Phase(ordered(moves, world), tuple(blocks))
    backward = replay(forward, layout, num_heads, num_kv_heads, dkv="home")
    return Schedule("double_ring", layout, num_heads, num_kv_heads, forward, backward)
