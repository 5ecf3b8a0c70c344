"""Token layouts: which rank holds which tokens of a sequence, and in which local order.

A layout lists, for every rank, the arithmetic progressions of global positions it holds, in local order. Laying the
ranks' tokens end to end gives every token a *slot*: rank r owns one contiguous interval of slots whatever the layout,
so schedules speak of intervals of slots and only the projection of the mask needs the global positions.

contiguous: rank r holds the r-th of w equal parts. zigzag (ring-flash-attention, Llama 3): parts r and 2w-1-r of 2w,
which balances a causal mask. striped (Striped Attention, Brandon et al. 2023, arXiv:2311.09431): every w-th token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Global positions ``start, start + step, ...``, ``num_tokens`` of them."""

    start: int
    step: int
    num_tokens: int


class Placed(NamedTuple):
    """A segment and the slots it fills: slots ``[slot, slot + segment.num_tokens)``."""

    slot: int
    segment: Segment


@dataclass(frozen=True)
class Layout:
    """Every token of ``num_tokens`` on exactly one of ``len(ranks)`` ranks.

    Raises ValueError where the segments do not hold every global position exactly once, where ranks' loads differ by
    more than one token, or where the segments' steps differ or are not positive.
    """

    name: str
    ranks: tuple[tuple[Segment, ...], ...]

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError(f"layout {self.name!r} must have at least one rank, got none; give each rank its segments")
        counts = [segment.num_tokens for segments in self.ranks for segment in segments]
        if min(counts, default=0) < 0:
            raise ValueError(f"layout {self.name!r} must use segments of 0 tokens or more, got {min(counts)}")
        steps = {segment.step for segments in self.ranks for segment in segments if segment.num_tokens}
        if steps and min(steps) < 1:
            raise ValueError(f"layout {self.name!r} must use positive steps, got {min(steps)}; turn the segment round")
        if not self._tiles():
            raise ValueError(f"layout {self.name!r} must hold every position exactly once; check its segments")
        if max(self.local_sizes) - min(self.local_sizes) > 1:
            raise ValueError(
                f"layout {self.name!r} must give every rank floor(s/w) or ceil(s/w) tokens, got {self.local_sizes}"
            )
        if len(steps) > 1:
            raise ValueError(f"layout {self.name!r} must use one step for all its segments, got {sorted(steps)}")

    def _tiles(self) -> bool:
        """Whether the segments hold every position once; those of step 1 are not expanded to tell."""
        segments = [segment for segments in self.ranks for segment in segments if segment.num_tokens]
        if all(segment.step == 1 for segment in segments):
            ends = [0, *accumulate(segment.num_tokens for segment in sorted(segments))]
            return [segment.start for segment in sorted(segments)] == ends[:-1]
        positions = self.global_positions
        return np.array_equal(np.sort(positions), np.arange(len(positions)))

    @property
    def world(self) -> int:
        return len(self.ranks)

    @cached_property
    def local_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(sum(segment.num_tokens for segment in segments) for segments in self.ranks)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First slot of each rank, then the number of tokens."""
        return (0, *np.cumsum(self.local_sizes).tolist())

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    def owned(self, rank: int) -> tuple[int, int]:
        """The slots ``[start, stop)`` of a rank."""
        return self.offsets[rank], self.offsets[rank + 1]

    @cached_property
    def placed(self) -> tuple[Placed, ...]:
        """All non-empty segments with their slots, in slot order."""
        placed, slot = [], 0
        for segments in self.ranks:
            for segment in segments:
                if segment.num_tokens:
                    placed.append(Placed(slot, segment))
                    slot += segment.num_tokens
        return tuple(placed)

    @cached_property
    def global_positions(self) -> np.ndarray:
        """int64 (num_tokens,): the global position of every slot."""
        parts = [start + step * np.arange(count) for segments in self.ranks for start, step, count in segments]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def positions(self, rank: int) -> np.ndarray:
        """int64 (local tokens,): the global positions of a rank, in local order."""
        start, stop = self.owned(rank)
        return self.global_positions[start:stop]

    @cached_property
    def slots(self) -> np.ndarray:
        """int64 (num_tokens,): the slot of every global position (the inverse permutation)."""
        inverse = np.empty(self.num_tokens, np.int64)
        inverse[self.global_positions] = np.arange(self.num_tokens)
        return inverse

    @cached_property
    def fingerprint(self) -> str:
        """Stable digest of who holds what, in hexadecimal."""
        return blake2b(repr(self.ranks).encode(), digest_size=8).hexdigest()

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def even_split(total: int, parts: int) -> list[int]:
    """``parts`` sizes that add up to ``total`` and differ by at most one, larger ones first."""
    base, extra = divmod(total, parts)
    return [base + (index < extra) for index in range(parts)]


def contiguous(num_tokens: int, world: int) -> Layout:
    """Rank r holds the r-th of ``world`` equal parts."""
    sizes = even_split(num_tokens, world)
    starts = np.cumsum([0, *sizes]).tolist()
    return Layout("contiguous", tuple((Segment(starts[r], 1, sizes[r]),) for r in range(world)))


def zigzag(num_tokens: int, world: int) -> Layout:
    """Rank r holds parts r and 2w-1-r of 2w, in this order."""
    base, extra = divmod(num_tokens, 2 * world)
    # Rank r's odd tokens go to its early part first, so that loads differ by one token at most.
    sizes = [base + (part < extra) for part in range(world)]
    sizes += [base + (2 * world - 1 - part + world < extra) for part in range(world, 2 * world)]
    starts = np.cumsum([0, *sizes]).tolist()
    ranks = tuple(
        (Segment(starts[r], 1, sizes[r]), Segment(starts[2 * world - 1 - r], 1, sizes[2 * world - 1 - r]))
        for r in range(world)
    )
    return Layout("zigzag", ranks)


def striped(num_tokens: int, world: int) -> Layout:
    """Rank r holds positions r, r + w, r + 2w, ..."""
    sizes = even_split(num_tokens, world)
    return Layout("striped", tuple((Segment(r, world, sizes[r]),) for r in range(world)))


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def make_layout(name: str, num_tokens: int, world: int) -> Layout:
    """The layout of that name. Raises ValueError for an unknown name, no token or no rank."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    if world < 1 or num_tokens < 1:
        raise ValueError(f"a layout needs at least one token and one rank, got {num_tokens} tokens, {world} ranks")
    return LAYOUTS[name](num_tokens, world)
