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

import numpy as np

from longspan.context.geometry import Range, Ranges, normalise
from longspan.context.passes import derived
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, head_ranges, kv_heads_of, ordered
from longspan.layout.tokens import Layout


def ulysses(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Every rank gets all tokens of its share of the heads; ranks beyond the heads have none."""
    return _exchange("ulysses", layout, num_heads, num_kv_heads, layout.world)


def staged_ulysses(layout: Layout, num_heads: int, num_kv_heads: int, stages: int) -> Schedule:
    """Ulysses in stages: a part of a rank's heads is on its way while it computes the part before. Ours.

    Exposed is what the first part's inputs and the last part's outputs take; at most a stage per head.
    """
    world, group_size = layout.world, num_heads // num_kv_heads
    everything = ((0, layout.num_tokens),)
    moves, blocks = [], []
    for rank, share in enumerate(head_ranges(num_heads, world)):
        last_kv = 0
        for stage, heads in enumerate(_parts(share, stages)):
            kv_heads = kv_heads_of(heads, group_size)
            unsent = max(last_kv, kv_heads[0]), kv_heads[1]  # two parts may read one KV head
            last_kv = kv_heads[1]
            for other in range(world):
                if other != rank:
                    own = (layout.owned(other),)
                    moves.append(Move(stage, other, rank, Piece("q", own, heads), kept=True))
                    if unsent[0] < unsent[1]:
                        moves.append(Move(stage, other, rank, Piece("kv", own, unsent), kept=True))
                    moves.append(Move(stage + 2, rank, other, Piece("o", own, heads)))
            blocks.append(Block(stage + 1, rank, everything, everything, heads))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived("staged_ulysses", layout, num_heads, num_kv_heads, forward)


def usp(layout: Layout, num_heads: int, num_kv_heads: int, degree: int) -> Schedule:
    """Groups of ``degree`` neighbouring ranks, which must divide the ranks, exchange heads; groups form a ring."""
    return _exchange("usp", layout, num_heads, num_kv_heads, degree)


def _parts(share: Range, stages: int) -> list[Range]:
    """A share of heads stage by stage; a stage has at least one."""
    parts = (part for part in head_ranges(share[1] - share[0], stages) if part[0] < part[1])
    return [(share[0] + first, share[0] + last) for first, last in parts]


def head_shares(num_heads: int, degree: int, group_size: int, stages: int) -> np.ndarray:
    """The shares of the heads that places of a group take, stage by stage: (n, 8) place, stage, heads, KV heads,
    KV heads sent for it, KV heads whose gradient goes home after it, the stage of that, whether that is complete.
    """
    parts = [
        (place, stage, heads, kv_heads_of(heads, group_size))
        for place, share in enumerate(head_ranges(num_heads, degree))
        for stage, heads in enumerate(_parts(share, stages))
    ]
    uses = np.zeros(num_heads // group_size, np.int64)
    for *_, (start, stop) in parts:
        uses[start:stop] += 1
    rows, taken = [], 0
    for number, (place, stage, heads, kv) in enumerate(parts):
        # Stages on one range of KV heads send its gradient home together, after the last of them.
        alike = [other for other, part in enumerate(parts) if (part[0], part[3]) == (place, kv)]
        taken = 0 if stage == 0 else taken
        sent, taken = kv[1] - max(taken, kv[0]), kv[1]
        home = (kv[1] - kv[0]) * (number == alike[-1])
        complete = bool((uses[slice(*kv)] == len(alike)).all())
        rows.append((place, stage, heads[1] - heads[0], kv[1] - kv[0], sent, home, stage, complete))
    return np.array(rows, dtype=np.int64).reshape(-1, 8)


def _exchange(name: str, layout: Layout, num_heads: int, num_kv_heads: int, degree: int) -> Schedule:
    """Step 0 exchanges tokens for heads, steps 1.. are the ring, the last step sends outputs home."""
    world, group_size, num_groups = layout.world, num_heads // num_kv_heads, layout.world // degree
    shares = head_ranges(num_heads, degree)
    moves, blocks = [], []

    def tokens(group: int) -> Ranges:
        return normalise(layout.owned(group * degree + place) for place in range(degree))

    for rank in range(world):
        group, place = divmod(rank, degree)
        heads = shares[place]
        if heads[0] == heads[1]:
            continue
        kv_heads = kv_heads_of(heads, group_size)
        for other in range(group * degree, (group + 1) * degree):
            if other != rank:
                own = (layout.owned(other),)
                moves.append(Move(0, other, rank, Piece("q", own, heads), kept=True))
                moves.append(Move(0, other, rank, Piece("kv", own, kv_heads), kept=True))
                moves.append(Move(num_groups + 1, rank, other, Piece("o", own, heads)))
        for step in range(num_groups):
            keys = tokens((group - step) % num_groups)
            blocks.append(Block(step + 1, rank, tokens(group), keys, heads))
            if step < num_groups - 1:
                following = (group + 1) % num_groups * degree + place
                moves.append(Move(step + 1, rank, following, Piece("kv", keys, kv_heads)))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived(name, layout, num_heads, num_kv_heads, forward)
