"""TokenRing: keys stay; queries hop round the ranks, and each partial output goes straight home.

Paper: Wang et al., "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional
Communication" (2024), arXiv:2412.20501, section 3 and algorithm 1; ACA-Lab-SJTU/token-ring. At step t rank r holds the
queries of rank r - t; the output computed at step t leaves for its owner at step t + 1, against the queries' direction.

What differs here: partial outputs travel in fp32, so that errors do not grow with the ranks; pruned by the mask; any
layout; a backward, which the paper and its code lack: queries, do and their statistics hop as the queries did, dq takes
the path of the outputs, dkv of foreign keys never exists since keys stay.

Cost per rank with Q = b·n·h·d·e and L = 4·b·n·h bytes, unpruned, sums of a bytes: forward (w-1)(Q + Q·a/e + L);
backward (w-1)(2Q + 2L + Q·a/e). Against a ring: × H : G, so it pays where each query head has its own KV head, on
dedicated links.
"""

from __future__ import annotations

from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, homewards, ordered
from longspan.layout.tokens import Layout


def token_ring(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Queries hop to rank r + 1; outputs go home one step after they were computed."""
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
                moves.append(homewards(step + 1, rank, source, Piece("o", (q,), heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived("token_ring", layout, num_heads, num_kv_heads, forward)
