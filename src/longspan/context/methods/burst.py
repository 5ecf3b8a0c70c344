"""BurstAttention: a ring forward, and a backward in which the keys stay and the queries hop.

Paper: Sun et al., "BurstAttention: An Efficient Distributed Attention Framework for Extremely Long Sequences" (2024),
arXiv:2403.09347, section 3.2 and algorithm 2; thunlp/BurstEngine. The backward sends q, do and dq instead of kv and
dkv; do carries lse and delta, which spares sending the output.

What differs here: pruned by the mask; dq travels in fp32 until it is complete.

Cost per rank with KV, Q, L as elsewhere and sums of a bytes, unpruned: forward (w-1)·KV; backward
(w-1)(2Q + 2L + Q·a/e). Less than a ring's backward where H : G is 1 and sums are in fp32; more with grouped heads.
"""

from __future__ import annotations

from longspan.context.methods.ring import ring
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, ordered
from longspan.layout.tokens import Layout


def burst(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """In the backward rank r computes at step t on the queries of rank r - t, whose dq follows them one step behind."""
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
