"""Ring attention: keys and values hop round the ranks; every rank computes on each block as it passes.

Paper: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (2023), arXiv:2310.01889, section 3. On the
zigzag layout (zhuzilin/ring-flash-attention) the work of a causal mask is balanced; on the striped layout (Brandon et
al. 2023, arXiv:2311.09431) too. One function serves all of them: only the layout and the ring's direction differ.

What differs here: moves are pruned by the mask, so a rank sends only the keys that somebody further round still needs;
any mask, any length, any head grouping; the key gradient travels in fp32, one hop behind the keys.

Cost per rank with KV = 2·b·n·g·d·e bytes of local keys and values, unpruned: forward (w-1)·KV; backward (w-1)·KV for
the keys and (w-1)·KV·a/e for the gradient sums of a bytes each, thus 3(w-1)·KV for 16-bit inputs and fp32 sums.
"""

from __future__ import annotations

from longspan.context.geometry import Range, Ranges, split_in_two
from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, kv_heads_of, ordered
from longspan.layout.tokens import Layout


def ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """At step t rank r computes its queries on the keys of rank r - t and passes these on to rank r + 1."""
    return _ring("ring", layout, num_heads, num_kv_heads, up=1)


def zigzag_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """The ring on the zigzag layout, whose ranks hold an early and a late part of the sequence each."""
    return _ring("zigzag", layout, num_heads, num_kv_heads, up=1)


def striped_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Striped Attention: the ring on the striped layout, whose ranks hold every w-th token."""
    return _ring("striped", layout, num_heads, num_kv_heads, up=1)


def descending_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """The ring turned round: keys go to rank r - 1, and what nobody further down needs is dropped on the way.

    Ours. On the zigzag layout the late half of a rank's keys is needed by lower ranks only, so under a causal mask a
    downward ring sheds it: exactly 3/4 of the bytes of the unpruned ring, where the upward one must carry it past all
    higher ranks. On contiguous shards, causal: half of the bytes on average.
    """
    return _ring("descending", layout, num_heads, num_kv_heads, up=-1)


def _ring(name: str, layout: Layout, num_heads: int, num_kv_heads: int, *, up: int) -> Schedule:
    world = layout.world
    moves, blocks = [], []
    for step in range(world):
        for rank in range(world):
            keys = layout.owned((rank - up * step) % world)
            blocks.append(Block(step, rank, (layout.owned(rank),), (keys,), (0, num_heads)))
            if step < world - 1:
                moves.append(Move(step, rank, (rank + up) % world, Piece("kv", (keys,), (0, num_kv_heads))))
    forward = Phase(tuple(moves), tuple(blocks))
    return derived(name, layout, num_heads, num_kv_heads, forward, dkv="follow")


def opposing_rings(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Half of the KV heads turns upwards, the other half downwards: both directions of every link carry half a ring.

    Ours. Between neighbours on dedicated links it takes half of a ring's time, at a ring's bytes (TokenRing needs up to
    H : G times as many for the same effect). A single KV head is split by tokens instead.
    """
    world, group_size = layout.world, num_heads // num_kv_heads
    heads = (0, num_heads)
    halves: list[tuple[int, Range]] = [(1, heads), (-1, heads)]
    if num_kv_heads > 1:
        middle = num_kv_heads // 2 * group_size
        halves = [(1, (0, middle)), (-1, (middle, num_heads))]
    moves, blocks = [], []
    for step in range(world):
        for rank in range(world):
            for number, (up, some) in enumerate(halves):
                own = layout.owned((rank - up * step) % world)
                keys: Ranges = (own,) if num_kv_heads > 1 else (split_in_two(own)[number],)
                blocks.append(Block(step, rank, (layout.owned(rank),), keys, some))
                if step < world - 1:
                    piece = Piece("kv", keys, kv_heads_of(some, group_size))
                    moves.append(Move(step, rank, (rank + up) % world, piece))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived("opposing", layout, num_heads, num_kv_heads, forward, dkv="follow")
