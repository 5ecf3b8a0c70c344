"""Ulysses and USP: heads are split between ranks for the time of the attention, alone or with a ring over the rest.

Papers: Jacobs et al., "DeepSpeed Ulysses" (2023), arXiv:2309.14509, section 3; Fang and Zhao, "USP: A Unified Sequence
Parallelism Approach for Long Context Generative AI" (2024), arXiv:2405.07719, section 3 and figure 2. In USP the ranks
form groups of u; inside a group tokens are exchanged for heads, and the groups' super-shards form a ring. Ulysses is
u = w. ``distributed_mha`` stands for the distributed multi-head attention of Li et al., "A Unified View of
Long-Sequence Models towards Modeling Million-Scale Dependencies" (2023), arXiv:2302.06218: heads and sequence split
together, as USP does; only its abstract could be read, so it is USP here.

What differs here: heads and KV heads need not divide by u (an uneven split; a KV head that two ranks' query heads share
goes to both); pruned by the mask; the gathered q, k and v are kept for the backward phase, as published; outputs and
gradients that are complete travel in the inputs' dtype, others in fp32.

Cost per rank with G' the KV heads that a group's ranks touch, added up (g where u divides g): forward
(u-1)/u·(2Q + L + 2·b·n·G'·d·e) + (w/u-1)·2·b·n·G'·d·e; backward of the exchange (u-1)/u·(2Q + 2L + 2·b·n·G'·d·e), of
the ring as there. Memory: q, k and v of the group for a share of the heads, kept until the backward phase.
"""

from __future__ import annotations

from longspan.context.geometry import Ranges, normalise
from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, homewards, ordered
from longspan.context.shares import head_shares
from longspan.layout.tokens import Layout


def ulysses(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Every rank gets all tokens of its share of the heads; ranks beyond the heads have none."""
    return _exchange("ulysses", layout, num_heads, num_kv_heads, layout.world)


def staged_ulysses(layout: Layout, num_heads: int, num_kv_heads: int, stages: int) -> Schedule:
    """Ulysses in stages: a part of a rank's heads is on its way while it computes the part before. Ours.

    Exposed is what the first part's inputs and the last part's outputs take; at most a stage per head.
    """
    return _exchange("staged_ulysses", layout, num_heads, num_kv_heads, layout.world, stages)


def usp(layout: Layout, num_heads: int, num_kv_heads: int, degree: int) -> Schedule:
    """Groups of ``degree`` neighbouring ranks, which must divide the ranks, exchange heads; groups form a ring."""
    return _exchange("usp", layout, num_heads, num_kv_heads, degree)


def _exchange(name: str, layout: Layout, num_heads: int, num_kv_heads: int, degree: int, stages: int = 1) -> Schedule:
    """Steps 0 and 1 exchange tokens for heads, steps 2.. are the ring, the last step sends outputs home.

    Keys leave a step before queries: while they are on their way, the queries are packed. Each stage is a step behind
    the one before; more than one take one group, whose keys stay.
    """
    world, num_groups = layout.world, layout.world // degree
    shares = head_shares(num_heads, num_kv_heads, degree, stages)
    moves, blocks = [], []

    def tokens(group: int) -> Ranges:
        return normalise(layout.owned(group * degree + place) for place in range(degree))

    for group in range(num_groups):
        for place, stage, heads, kv_heads, fetched, *_ in shares:
            rank = group * degree + place
            for other in range(group * degree, (group + 1) * degree):
                if other != rank:
                    own = (layout.owned(other),)
                    moves.append(Move(stage + 1, other, rank, Piece("q", own, heads), kept=True))
                    if fetched[0] < fetched[1]:
                        piece = Piece("kv", own, fetched)
                        moves.append(Move(stage, other, rank, piece, lands=stage + 1, kept=True))
                    moves.append(homewards(stage + num_groups + 2, rank, other, Piece("o", own, heads)))
            for step in range(num_groups):
                keys = tokens((group - step) % num_groups)
                blocks.append(Block(stage + step + 2, rank, tokens(group), keys, heads))
                if step < num_groups - 1:
                    following = (group + 1) % num_groups * degree + place
                    moves.append(Move(step + 2, rank, following, Piece("kv", keys, kv_heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived(name, layout, num_heads, num_kv_heads, forward)
