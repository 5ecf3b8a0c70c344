"""LightSeq (DistFlashAttn): a causal schedule in which early ranks help late ones, in half of a ring's steps.

Paper: Li et al., "DISTFLASHATTN: Distributed Memory-efficient Attention for Long-context LLMs Training" (2023),
arXiv:2310.03294, section 3.1 and algorithms 1-2; RulinShao/LightSeq. Contiguous shards. At step t a rank r >= t takes
the keys of rank r - t; a rank below, which has none left, takes the queries of rank r - t + w and sends its partial
output back. Its checkpointing (section 3.4) is ``recompute="attention"`` of a plan.

What differs here: any mask whose keys do not lie in later shards than the queries; odd w as well as even; partial
outputs in fp32.

Cost, mean over ranks, unpruned, KV, Q, L as elsewhere and sums of a bytes: even w, forward (3w-2)/8·KV +
(w-2)/8·(Q + Q·a/e + L); backward (3w-2)/8·(1 + a/e)·KV + (w-2)/8·(2Q + 2L + Q·a/e). The busiest rank sends up to twice
the mean.
"""

from __future__ import annotations

from itertools import pairwise

from longspan.attention.masks import Mask
from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, homewards, ordered
from longspan.layout.tokens import Layout


def looks_ahead(mask: Mask, layout: Layout) -> str | None:
    """Why LightSeq cannot compute a mask on a layout, or None."""
    if layout.name != "contiguous":
        return f"it takes the contiguous layout, not {layout.name!r}"
    edges = layout.offsets
    for band in mask.bands:
        # The last key that a query of each shard sees must lie in that shard or an earlier one.
        for start, stop in pairwise(edges):
            last = min(stop, band.q1) - 1
            if last >= max(start, band.q0) and min(band.k1 - 1, last + band.hi) >= stop:
                return "it takes masks whose queries see no keys of later shards, as causal ones do"
    return None


def light_seq(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """w/2 + 1 steps; what a rank lacks in own work it does for the rank w - t above it."""
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
                moves.append(homewards(step + 1, rank, helped, Piece("o", (q,), heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived("light_seq", layout, num_heads, num_kv_heads, forward)
