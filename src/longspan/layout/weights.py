"""Which part of a weight one rank of a tensor-parallel group holds, also where nothing divides.

A part is a box: whole along all dims but one, along which heads, inner channels or vocabulary are dealt out in
neighbouring runs whose sizes differ by one at most, larger ones first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist


class Box(NamedTuple):
    """Where a local tensor stands in a global one: the global shape, and the index of its first element."""

    shape: tuple[int, ...]
    start: tuple[int, ...]


def along(shape: tuple[int, ...], dim: int, start: int, total: int) -> Box:
    """The box of a tensor of ``shape`` that is whole but along ``dim``, where it begins at ``start`` of ``total``."""
    return Box((*shape[:dim], total, *shape[dim + 1 :]), tuple(start if d == dim else 0 for d in range(len(shape))))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a tensor that is held whole."""
    return Box(shape, (0,) * len(shape))


def share(total: int, parts: int, part: int) -> range:
    """What falls to one of ``parts`` when ``total`` things in a row are dealt out evenly, larger parts first."""
    base, extra = divmod(total, parts)
    start = part * base + min(part, extra)
    return range(start, start + base + (part < extra))


@dataclass(frozen=True, slots=True)
class Split:
    """One rank of a group that shares weights; with one rank, all of them are here and nothing is sent."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, total: int) -> range:
        """This rank's run of ``total`` things: channels, words, experts."""
        return share(total, self.size, self.rank)


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of one tensor rank.

    Attributes:
        query: query heads.
        kv: KV heads that these read.
        shared: the KV projections are held whole by all ranks, each using its ``kv``: there are fewer KV heads than
            ranks.
        group: query heads of one KV head in the whole model.
    """

    query: range
    kv: range
    shared: bool
    group: int

    @property
    def expand(self) -> list[int] | None:
        """For every query head the index within ``kv`` of the head it reads; None where plain grouping says so."""
        reads = [head // self.group - self.kv.start for head in self.query]
        plain = len(self.query) // len(self.kv)
        return None if reads == [i // plain for i in range(len(self.query))] else reads

    @property
    def num_kv_heads(self) -> int:
        """KV heads that attention sees here, expanded ones counted."""
        return len(self.kv) if self.expand is None else len(self.query)


def heads(num_heads: int, num_kv_heads: int, parts: int, part: int) -> Heads:
    """The heads of one of ``parts`` tensor ranks: KV heads with their groups or, where these are too few, query heads.

    Raises ValueError where there are more ranks than query heads.
    """
    if num_heads < parts:
        raise ValueError(
            f"tensor parallelism needs a query head for every rank, got {num_heads} heads on {parts} ranks; use fewer"
        )
    group = num_heads // num_kv_heads
    if num_kv_heads >= parts:
        kv = share(num_kv_heads, parts, part)
        return Heads(range(kv.start * group, kv.stop * group), kv, shared=False, group=group)
    query = share(num_heads, parts, part)
    return Heads(query, range(query.start // group, (query.stop - 1) // group + 1), shared=True, group=group)
