"""One piece of memory for all messages of a phase, of a size that is known before anything runs.

A program says when each message is posted, landed and read for the last time, so places are given once: what is live
at one time lies apart, and what is not may lie in the same place. A message that goes out stays untouched for a step
more than it is under way, since its sender waits for it when it has posted the step after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_ALIGN = 256  # bytes; kernels and copies want at least 16


class Span(NamedTuple):
    """Memory of some bytes that is in use from step ``first`` to step ``last``, both included."""

    num_bytes: int
    first: int
    last: int


class Places(NamedTuple):
    """Where messages lie: the size of the arena, and byte offsets.

    Attributes:
        buffers: of buffers of arrivals, by buffer.
        receives: of arriving sums, by the receive's number.
        sends: of what must be assembled to be sent, by the send's number.
    """

    num_bytes: int
    buffers: dict[int, int]
    receives: dict[int, int]
    sends: dict[int, int]


def place(spans: Sequence[Span]) -> tuple[int, list[int]]:
    """The bytes needed, and an offset for each span: the lowest gap that is free all the time, in order of first use.

    Spans of one lifetime lie end to end, so that many messages of one step cost as much as one.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, span in enumerate(spans):
        groups.setdefault((span.first, span.last), []).append(index)
    offsets, live, total = [0] * len(spans), [], 0  # live: (offset, end, last), by offset
    for (first, last), indices in sorted(groups.items()):
        live = [taken for taken in live if taken[2] >= first]
        sizes = [-(-spans[index].num_bytes // _ALIGN) * _ALIGN for index in indices]
        start, need = 0, sum(sizes)
        for offset, end, _ in live:
            if offset - start >= need:
                break
            start = max(start, end)
        live = sorted([*live, (start, start + need, last)])
        total = max(total, start + need)
        for index, size in zip(indices, sizes, strict=True):
            offsets[index] = start
            start += size
    return total, offsets
