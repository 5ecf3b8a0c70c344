"""Ring attention: keys and values hop round the ranks; every rank computes on each block as it passes.

Paper: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (2023), arXiv:2310.01889, section 3. On the
zigzag layout (zhuzilin/ring-flash-attention) the work of a causal mask is balanced; on the striped layout (Brandon et
al. 2023, arXiv:2311.09431) too. One function serves all three: only the layout and the ring's direction differ.

What differs here: moves are pruned by the mask, so a rank sends only the keys that somebody further round still needs;
any mask, any length, any head grouping; the key gradient travels in fp32, one hop behind the keys.

Cost per rank with KV = 2·b·n·g·d·e bytes of local keys and values, unpruned: forward (w-1)·KV; backward (w-1)·KV for
the keys and (w-1)·KV·a/e for the gradient sums of a bytes each, thus 3(w-1)·KV for 16-bit inputs and fp32 sums.
"""

from __future__ import annotations

from longspan.context.passes import replay
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule
from longspan.layout.tokens import Layout


def ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """At step t rank r computes its queries on the keys of rank r - t and passes these on to rank r + 1."""
    return _ring("ring", layout, num_heads, num_kv_heads, up=1)


def zigzag_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """The ring turned round: keys go to rank r - 1.

    On the zigzag layout the late half of a rank's keys is needed by lower ranks only, so under a causal mask a downward
    ring drops it on the way: 3/4 of the bytes of the upward one, which must carry it past all higher ranks.
    """
    return _ring("zigzag", layout, num_heads, num_kv_heads, up=-1)


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
    backward = replay(forward, layout, num_heads, num_kv_heads, dkv="follow")
    return Schedule(name, layout, num_heads, num_kv_heads, forward, backward)
