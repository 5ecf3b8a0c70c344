"""Double ring: small rings inside windows of ranks, while the next window's keys are already under way.

Paper: Gu et al., "LoongTrain: Efficient Training of Long-Sequence LLMs with Head-Context Parallelism" (2024),
arXiv:2406.18485, section 4.4; InternEvo. With windows of m ranks (a node, say) keys hop m - 1 times inside a window;
meanwhile every rank's keys travel to the same place of the next window, so that only w/m - 1 of the w - 1 transfers
cross windows and each has m - 1 steps to arrive.

What differs here: pruned by the mask; dkv goes straight home in fp32 from each rank that computed on foreign keys, in
place of a ring of sums.

Cost per rank, unpruned: forward (w-1)·KV, of which w/m - 1 transfers cross windows; backward (w-1)(1 + a/e)·KV.
"""

from __future__ import annotations

from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, ordered
from longspan.layout.tokens import Layout


def double_ring(layout: Layout, num_heads: int, num_kv_heads: int, inner: int) -> Schedule:
    """Windows of ``inner`` ranks, which must divide the ranks. The outer transfers run on lane 1."""
    world = layout.world
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
    return derived("double_ring", layout, num_heads, num_kv_heads, forward)
