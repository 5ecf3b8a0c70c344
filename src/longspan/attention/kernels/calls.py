"""Bands as a few library calls: full rectangles, square causal blocks, and tiles with an element-wise mask.

Library kernels know "everything" and "causal, top-left aligned". A band bounded only above is one causal square, at
most one rectangle to its left and one below it. A band bounded below (a sliding window, say) goes in tiles of rows,
each with the hull of its keys. Neighbouring pieces too small to be worth a call of their own share one masked tile. No
mask is larger than ``MAX_MASK`` elements, whatever the length. Cost: pure Python, a few microseconds a band, memoised.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from longspan.attention.bands import Band, Bands, coalesce, intersect, rectangle, shift

TILE_ROWS = 64  # rows of a tile of a band bounded below
MAX_MASK = 1 << 19  # elements of the largest mask
CALL_PAIRS = 2048  # what a call costs on top of its work, in pairs of (query, key)


Kind = Literal["full", "causal", "masked", "window"]


class Call(NamedTuple):
    """One library call on rows q0..q1 and columns k0..k1 of a block."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind
    bands: Bands  # of a masked or window call, in the call's own rows and columns; else empty
    fresh: bool  # no earlier call of the plan has touched these rows: store the result, do not merge it


class _Piece(NamedTuple):
    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind
    bands: Bands  # in the block's coordinates

    @property
    def pairs(self) -> int:
        area = (self.q1 - self.q0) * (self.k1 - self.k0)
        return area // 2 if self.kind == "causal" and self.q1 - self.q0 >= 2 * TILE_ROWS else area


def _piece(band: Band, kind: Kind) -> _Piece:
    return _Piece(band.q0, band.q1, band.k0, band.k1, kind, (band,))


def _bounded_above(band: Band) -> Iterator[_Piece]:
    """Pieces of a tight band whose lower diagonal does not bind."""
    q0, q1, k0, k1, _, hi = band
    if hi >= k1 - 1 - q0:
        yield _piece(band, "full")
        return
    square_q1 = k1 - hi  # from here on rows see every column
    square_k0 = q0 + hi  # the square starts at the last column that its first row sees
    if square_k0 > k0:
        yield _piece(rectangle(q0, square_q1, k0, square_k0), "full")
    yield _piece(Band(q0, square_q1, square_k0, k1, square_k0 - square_q1 + 1, hi), "causal")
    if square_q1 < q1:
        yield _piece(rectangle(square_q1, q1, k0, k1), "full")


def _tile(band: Band) -> Iterator[_Piece]:
    """Pieces of a band of few rows: one mask, or where that would be too large the full middle between two masks."""
    if (band.q1 - band.q0) * (band.k1 - band.k0) <= MAX_MASK:
        yield _piece(band, "masked")
        return
    middle = max(band.k0, band.q1 - 1 + band.lo), min(band.k1, band.q0 + band.hi + 1)
    if middle[0] >= middle[1]:
        half = (band.k0 + band.k1) // 2
        middle = half, half
    for k in ((band.k0, middle[0]), middle, (middle[1], band.k1)):
        part = intersect(band, (band.q0, band.q1), k)
        if part is None:
            continue
        if k == middle:
            yield _piece(part, "full")
        else:
            yield from _tile(part)


def _bounded_below(band: Band) -> Iterator[_Piece]:
    """Pieces of a tight band whose lower diagonal binds, from the first row on that it cuts."""
    first = min(band.q1, band.k0 - band.lo + 1)
    if first - band.q0 >= TILE_ROWS:
        head = intersect(band, (band.q0, first), (band.k0, band.k1))
        if head is not None:
            yield from _bounded_above(head)
    else:
        first = band.q0
    for start in range(first, band.q1, TILE_ROWS):
        tile = intersect(band, (start, min(start + TILE_ROWS, band.q1)), (band.k0, band.k1))
        if tile is not None:
            yield from _tile(tile)


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """Neighbours share one masked call where that computes less than a second call costs."""
    out: list[_Piece] = []
    for piece in pieces:
        if out:
            last = out[-1]
            q0, q1 = min(last.q0, piece.q0), max(last.q1, piece.q1)
            k0, k1 = min(last.k0, piece.k0), max(last.k1, piece.k1)
            hull = (q1 - q0) * (k1 - k0)
            if hull <= MAX_MASK and hull <= last.pairs + piece.pairs + CALL_PAIRS:
                out[-1] = _Piece(q0, q1, k0, k1, "masked", last.bands + piece.bands)
                continue
        out.append(piece)
    return out


def _numbered(pieces: list[_Piece]) -> tuple[Call, ...]:
    plan: list[Call] = []
    touched = 0
    for q0, q1, k0, k1, kind, parts in sorted(pieces):
        local = shift(parts, -q0, -k0) if kind in ("masked", "window") else ()
        plan.append(Call(q0, q1, k0, k1, kind, local, q0 >= touched))
        touched = max(touched, q1)
    return tuple(plan)


@lru_cache(maxsize=512)
def plan_calls(bands: Bands) -> tuple[Call, ...]:
    """Calls that together compute the allowed pairs of a block exactly once, sorted by row.

    Args:
        bands: disjoint, in rows and columns of the block.
    """
    pieces: list[_Piece] = []
    for band in coalesce(bands):
        bounded_below = band.lo > band.k0 - (band.q1 - 1)
        pieces += _bounded_below(band) if bounded_below else _bounded_above(band)
    return _numbered(_joined(sorted(pieces)))


@lru_cache(maxsize=512)
def plan_windows(bands: Bands, min_square: int | None = None) -> tuple[Call, ...]:
    """The same for kernels that take both diagonals: one "window" call of one tight band each.

    Args:
        bands: disjoint, in rows and columns of the block.
        min_square: where given, a band not bounded below becomes "full" and "causal" calls, as in ``plan_calls``, where
            each of them has at least so many rows and columns.
    """
    pieces: list[_Piece] = []
    for band in coalesce(bands):
        squares = [] if min_square is None or band.lo > band.k0 - (band.q1 - 1) else list(_bounded_above(band))
        if squares and all(min(p.q1 - p.q0, p.k1 - p.k0) >= (min_square or 1) for p in squares):
            pieces += squares
        else:
            pieces += (_piece(part, "window") for part in _windows(band))
    return _numbered(pieces)


def _windows(band: Band) -> Iterator[Band]:
    """A tight band as bands whose window FlashAttention-2 honours.

    It reads a right side of num_k or more as "all", and "all" beside a left side as num_k: too little for the first
    rows of a tall block.
    """
    num_q, num_k = band.q1 - band.q0, band.k1 - band.k0
    bounded_above = band.hi < band.k1 - 1 - band.q0
    bounded_below = band.lo > band.k0 - (band.q1 - 1)
    if bounded_above and band.hi + band.q0 - band.k0 - (num_k - num_q) >= num_k:
        first = band.k1 - 1 - band.hi  # from this row on the upper diagonal does not bind
    elif not bounded_above and bounded_below and num_q > num_k + 1:
        first = band.k0 - band.lo + 1  # before this row the lower diagonal does not bind
    else:
        yield band
        return
    for rows in ((band.q0, first), (first, band.q1)):
        part = intersect(band, rows, (band.k0, band.k1))
        if part is not None:
            yield from _windows(part)


def window(call: Call) -> tuple[int, int]:
    """(left, right) of a window call as flash attention takes them: keys beside the bottom-right diagonal, -1 for all.

    A tight band has a key in its last row's last column, so neither is ever negative for another reason.
    """
    ((q0, q1, k0, k1, lo, hi),) = call.bands
    corner = (k1 - k0) - (q1 - q0)
    left = -1 if lo <= k0 - (q1 - 1) else corner - lo
    right = -1 if hi >= k1 - 1 - q0 else hi - corner
    return left, right
