"""Bands: the one form in which every mask, block and kernel call of the project says which pairs attend.

A band is a rectangle of (query, key) positions with two diagonals: the pair (q, k) is allowed where
``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= k - q <= hi``. Full, causal, sliding-window and document masks are
short lists of disjoint bands, and bands stay bands when they are cut, shifted, transposed or strided, so the work of
any rank and any kernel call follows from the mask by integer arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_PAIRWISE_LIMIT = 48  # above this many bands, coalesce only tries sorted neighbours


class Band(NamedTuple):
    """Allowed where ``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= k - q <= hi``."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int


Bands = tuple[Band, ...]


def rectangle(q0: int, q1: int, k0: int, k1: int) -> Band:
    """The band that allows every pair of the rectangle."""
    return Band(q0, q1, k0, k1, k0 - (q1 - 1), k1 - 1 - q0)


def tighten(band: Band) -> Band | None:
    """The same pairs with the smallest rectangle and the tightest diagonals; None where no pair is allowed."""
    q0, q1, k0, k1, lo, hi = band
    tight = Band(
        max(q0, k0 - hi),
        min(q1, k1 - lo),
        max(k0, q0 + lo),
        min(k1, q1 + hi),
        max(lo, k0 - q1 + 1),
        min(hi, k1 - 1 - q0),
    )
    if tight.q0 >= tight.q1 or tight.k0 >= tight.k1 or tight.lo > tight.hi:
        return None
    return tight


def _triangle(x: int, cap: int) -> int:
    """Sum of min(max(t, 0), cap) over all t <= x."""
    if x <= 0:
        return 0
    if x <= cap:
        return x * (x + 1) // 2
    return cap * (cap + 1) // 2 + (x - cap) * cap


def area(band: Band) -> int:
    """Number of allowed pairs, in closed form."""
    q0, q1, k0, k1, lo, hi = band
    if q0 >= q1 or k0 >= k1 or lo > hi:
        return 0
    num_q, num_k = q1 - q0, k1 - k0

    def at_most(diagonal: int) -> int:
        first_row = diagonal + q0 - k0 + 1
        return _triangle(first_row + num_q - 1, num_k) - _triangle(first_row - 1, num_k)

    return at_most(hi) - at_most(lo - 1)


def total_area(bands: Iterable[Band]) -> int:
    """Number of allowed pairs of a list of disjoint bands."""
    return sum(area(band) for band in bands)


def intersect(band: Band, q: tuple[int, int], k: tuple[int, int]) -> Band | None:
    """The part of one band inside ``q[0] <= q < q[1]``, ``k[0] <= k < k[1]``, tightened; None where empty."""
    return tighten(
        Band(max(band.q0, q[0]), min(band.q1, q[1]), max(band.k0, k[0]), min(band.k1, k[1]), band.lo, band.hi)
    )


def cut(bands: Iterable[Band], q: tuple[int, int], k: tuple[int, int]) -> Bands:
    """The parts of the bands inside a rectangle, in unchanged coordinates."""
    parts = (intersect(band, q, k) for band in bands)
    return tuple(part for part in parts if part is not None)


def shift(bands: Iterable[Band], dq: int, dk: int) -> Bands:
    """The bands in coordinates ``(q + dq, k + dk)``."""
    d = dk - dq
    return tuple(Band(b.q0 + dq, b.q1 + dq, b.k0 + dk, b.k1 + dk, b.lo + d, b.hi + d) for b in bands)


def transpose(bands: Iterable[Band]) -> Bands:
    """The bands with queries and keys exchanged."""
    return tuple(Band(b.k0, b.k1, b.q0, b.q1, -b.hi, -b.lo) for b in bands)


def stride(bands: Iterable[Band], q: tuple[int, int], k: tuple[int, int]) -> Bands:
    """The bands seen on every ``step``-th position: with ``q = (start, step)`` and ``k = (start', step)``.

    Returned in coordinates (i, j) where position q is ``start + step * i`` and position k is ``start' + step * j``.
    Raises ValueError where the two steps differ: the result would not be a band.
    """
    (q_start, step), (k_start, k_step) = q, k
    if step != k_step or step < 1:
        raise ValueError(f"stride needs one positive step for queries and keys, got {step} and {k_step}")
    offset = k_start - q_start
    parts = (
        tighten(
            Band(
                max(0, -((q_start - b.q0) // step)),
                -((q_start - b.q1) // step),
                max(0, -((k_start - b.k0) // step)),
                -((k_start - b.k1) // step),
                -((offset - b.lo) // step),
                (b.hi - offset) // step,
            )
        )
        for b in bands
    )
    return tuple(part for part in parts if part is not None)


def overlap(bands: Iterable[Band]) -> tuple[Band, Band] | None:
    """Two bands that allow a common pair, or None where the bands are disjoint."""
    active: list[Band] = []
    for band in sorted(bands):
        active = [other for other in active if other.q1 > band.q0]
        for other in active:
            common = Band(
                max(band.q0, other.q0),
                min(band.q1, other.q1),
                max(band.k0, other.k0),
                min(band.k1, other.k1),
                max(band.lo, other.lo),
                min(band.hi, other.hi),
            )
            if tighten(common) is not None:
                return other, band
        active.append(band)
    return None


def _union(a: Band, b: Band) -> Band | None:
    """The one band that allows exactly the pairs of two disjoint tight bands, or None where there is none.

    The smallest band holding both is their hull with the outer diagonals: it is the union where the areas agree.
    """
    hull = Band(min(a.q0, b.q0), max(a.q1, b.q1), min(a.k0, b.k0), max(a.k1, b.k1), min(a.lo, b.lo), max(a.hi, b.hi))
    return tighten(hull) if area(hull) == area(a) + area(b) else None


def coalesce(bands: Iterable[Band]) -> Bands:
    """The same pairs in fewer bands: neighbours are merged while the union of two is one band."""
    todo = [tight for tight in map(tighten, bands) if tight is not None]
    changed = True
    while changed:
        changed = False
        for by_key in (False, True):
            todo.sort(key=(lambda b: (b.k0, b.q0)) if by_key else (lambda b: (b.q0, b.k0)))
            reach = len(todo) if len(todo) <= _PAIRWISE_LIMIT else 2
            done: list[Band] = []
            for band in todo:
                for back in range(1, min(reach, len(done)) + 1):
                    merged = _union(done[-back], band)
                    if merged is not None:
                        done[-back] = merged
                        changed = True
                        break
                else:
                    done.append(band)
            todo = done
    return tuple(sorted(todo))


def dense(bands: Iterable[Band], num_q: int, num_k: int) -> np.ndarray:
    """Boolean (num_q, num_k) view of the bands: True where the pair may attend."""
    allowed = np.zeros((num_q, num_k), dtype=bool)
    for q0, q1, k0, k1, lo, hi in bands:
        diagonal = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
        allowed[q0:q1, k0:k1] |= (diagonal >= lo) & (diagonal <= hi)
    return allowed
