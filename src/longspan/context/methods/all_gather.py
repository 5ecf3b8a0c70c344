"""All-gather: every rank takes all the keys it needs, straight from their owners, and computes in one or a few calls.

Published as the context parallelism of Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2) and as
``llama3`` in zhuzilin/ring-flash-attention: gather all keys and values, then one kernel call; dkv is reduce-scattered.

``mask_aware`` is ours, after MagiAttention (SandAI): the same moves on a layout that gives every rank equal work under
the mask (``context.balance``). Pruning leaves of each move what the receiver's mask needs, so packed documents send
little; arrivals are taken in a few stages by distance, each one kernel call, so that sends hide behind computation.

``kept_keys`` is ours too: the same forward phase, whose keys stay with their readers. The backward phase then waits for
nothing: it takes the foreign keys in two calls, the farther ones first, and the own keys, whose gradient goes nowhere,
hide the last gradients on their way home. It pays where KV heads are few or documents short: what is kept is small.

What differs here: pruned by the mask; any length and head grouping; sums in fp32.

Cost per rank, unpruned: forward (w-1)·KV; backward (w-1)·KV, which ``kept_keys`` does not send again, and (w-1)·KV·a/e.
Memory: the keys of a whole stage at once (of the whole sequence, in ``all_gather``; from the forward to the backward
phase, in ``kept_keys``).
"""

from __future__ import annotations

from dataclasses import replace

from longspan.context.carry import Direct
from longspan.context.geometry import normalise
from longspan.context.passes import derived, replay, turned
from longspan.context.schedule import Block, Move, Phase, Piece, Schedule, ordered
from longspan.layout.tokens import Layout


def all_gather(layout: Layout, num_heads: int, num_kv_heads: int) -> Schedule:
    """Keys from everybody, then one call on all of them."""
    return _gather("all_gather", layout, num_heads, num_kv_heads, stages=0)


def mask_aware(layout: Layout, num_heads: int, num_kv_heads: int, stages: int) -> Schedule:
    """Own keys first; the others' arrive in stages, nearest ranks first, and each stage is one call.

    More stages hide sends better, fewer compute faster.
    """
    return _gather("mask_aware", layout, num_heads, num_kv_heads, stages=stages)


def kept_keys(layout: Layout, num_heads: int, num_kv_heads: int, stages: int) -> Schedule:
    """``mask_aware`` whose readers keep the keys and begin the backward phase with them, in two calls."""
    gathered = _gather("kept_keys", layout, num_heads, num_kv_heads, stages=stages)
    moves = tuple(replace(move, kept=True) for move in gathered.forward.moves)
    back = Direct(stages, keep=True).back
    blocks = _gather("", layout, num_heads, num_kv_heads, stages=back.stages).forward.blocks
    backward = Phase((), turned(blocks, len(back.sizes(layout.world))))
    backward = replay(backward, layout, gathered.group_size, dkv="home")
    return replace(gathered, forward=replace(gathered.forward, moves=moves), backward=backward, dkv=None)


def _gather(name: str, layout: Layout, num_heads: int, num_kv_heads: int, *, stages: int) -> Schedule:
    world, heads, kv_heads = layout.world, (0, num_heads), (0, num_kv_heads)
    moves, blocks = [], []
    distances = list(range(1, world))
    sizes = Direct(stages).sizes(world)
    for rank in range(world):
        own = (layout.owned(rank),)
        if stages:
            blocks.append(Block(0, rank, own, own, heads))
        first = 0
        for stage, size in enumerate(sizes):
            sources = [(rank - distance) % world for distance in distances[first : first + size]]
            first += size
            moves += [Move(stage, r, rank, Piece("kv", (layout.owned(r),), kv_heads)) for r in sources]
            taken = sources if stages else [*sources, rank]
            blocks.append(Block(stage + 1, rank, own, normalise(layout.owned(r) for r in taken), heads))
    forward = Phase(ordered(moves, world), tuple(blocks))
    return derived(name, layout, num_heads, num_kv_heads, forward)
