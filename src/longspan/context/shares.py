"""Which heads each place of a group of ranks computes, stage by stage, where tokens are exchanged for heads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longspan.context.geometry import Range
from longspan.context.schedule import head_ranges, kv_heads_of


class Share(NamedTuple):
    """Heads that a place of every group computes in one stage.

    Attributes:
        heads: query heads, at least one.
        kv_heads: those that they read.
        fetched: those of them that no earlier stage of the place fetched; empty (start >= stop) where all came.
        returns: whether the gradient of ``kv_heads`` goes home after this stage: a later one reads other KV heads.
        complete: whether no other place and no other KV heads' stages add to that gradient.
    """

    place: int
    stage: int
    heads: Range
    kv_heads: Range
    fetched: Range
    returns: bool
    complete: bool


def head_shares(num_heads: int, num_kv_heads: int, degree: int, stages: int = 1) -> list[Share]:
    """The shares of all places, by place and stage. Places beyond the heads have none; a stage has at least a head."""
    group_size = num_heads // num_kv_heads
    parts = [
        (place, stage, (start + first, start + last))
        for place, (start, stop) in enumerate(head_ranges(num_heads, degree))
        for stage, (first, last) in enumerate(head_ranges(stop - start, stages))
        if first < last
    ]
    kv_heads = [kv_heads_of(heads, group_size) for *_, heads in parts]
    uses = np.zeros(num_kv_heads, np.int64)
    for start, stop in kv_heads:
        uses[start:stop] += 1
    shares, fetched = [], 0
    for number, (place, stage, heads) in enumerate(parts):
        kv = kv_heads[number]
        # Stages on one range of KV heads send its gradient home together, after the last of them.
        alike = [other for other, part in enumerate(parts) if (part[0], kv_heads[other]) == (place, kv)]
        unfetched = max(fetched, kv[0]) if stage else kv[0]
        complete = bool((uses[slice(*kv)] == len(alike)).all())
        shares.append(Share(place, stage, heads, kv, (unfetched, kv[1]), number == alike[-1], complete))
        fetched = kv[1]
    return shares
