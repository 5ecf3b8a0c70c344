"""Masks: which pairs of a whole sequence may attend, as disjoint bands in global positions.

A mask is one value, hashable and the same on all ranks and for all rows of a batch; rows that differ are packed as
documents. Everything a rank must compute or send follows from it (see ``attention.bands``). The benchmark patterns made
of these generators are in ``attention.patterns``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from longspan.attention.bands import Band, Bands, dense, rectangle, tighten, total_area

_PAIRS_AT_ONCE = 1 << 18  # candidate pairs of the overlap sweep that are held in memory together


@dataclass(frozen=True)
class Mask:
    """Disjoint bands over ``num_tokens`` x ``num_tokens`` global positions.

    Args:
        bands: allowed pairs; each rectangle lies within the sequence and no pair is allowed twice. Kept tightened,
            sorted and without empty bands, so that equal lists of bands make equal masks.
        num_tokens: length of the sequence.

    Raises:
        ValueError: a band reaches outside the sequence, or two bands overlap (both are named).
    """

    bands: Bands
    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a mask needs at least 1 token, got num_tokens={self.num_tokens}; give the length of s")
        for band in self.bands:
            if min(band[0], band[2]) < 0 or max(band[1], band[3]) > self.num_tokens:
                raise ValueError(
                    f"a band must lie within 0..{self.num_tokens}, got {tuple(band)}; cut it to the sequence first"
                )
        try:
            whole = [Band(*map(operator.index, band)) for band in self.bands]
        except TypeError:
            raise ValueError("a band must be six whole numbers (q0, q1, k0, k1, lo, hi); round them first") from None
        tight = (tighten(band) for band in whole)
        object.__setattr__(self, "bands", tuple(sorted(band for band in tight if band is not None)))
        clash = _overlap(self.bands)
        if clash is not None:
            raise ValueError(
                f"bands of a mask must be disjoint, got {tuple(clash[0])} and {tuple(clash[1])} with pairs in common; "
                "cut one of them"
            )

    def __hash__(self) -> int:
        return int(self.fingerprint, 16)

    def dense(self) -> Bool[Tensor, "s s"]:
        """The mask element by element: True where the row's query may attend to the column's key."""
        return torch.from_numpy(dense(self.bands, self.num_tokens, self.num_tokens))

    @cached_property
    def area(self) -> int:
        """Number of allowed pairs."""
        return total_area(self.bands)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the bands in hexadecimal, equal on every machine: ranks compare it before they exchange data."""
        table = np.array([(self.num_tokens,) + (0,) * 5, *self.bands], dtype="<i8")
        return blake2b(table.tobytes(), digest_size=8).hexdigest()


def _overlap(bands: Sequence[Band]) -> tuple[Band, Band] | None:
    """Two bands with a common pair, or None: a sweep over rows or columns, whichever meets fewer bands at once.

    Candidate pairs are compared in numpy, so that thousands of documents, columns or tiles cost milliseconds.
    """
    if len(bands) < 2:
        return None
    table = np.array(bands, dtype=np.int64)
    sweeps = []
    for start, stop in ((0, 1), (2, 3)):
        order = np.argsort(table[:, start], kind="stable")
        reach = np.searchsorted(table[order, start], table[order, stop], side="left")
        num_after = reach - np.arange(len(order)) - 1
        sweeps.append((int(num_after.sum()), order, num_after))
    _, order, num_after = min(sweeps, key=lambda sweep: sweep[0])
    ends = np.cumsum(num_after)
    first = 0
    while first < len(order):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        counts = num_after[first:last]
        earlier = np.repeat(np.arange(first, last), counts)
        within = np.arange(len(earlier)) - np.repeat(np.cumsum(counts) - counts, counts)
        a, b = table[order[earlier]], table[order[earlier + 1 + within]]
        q0, k0, lo = (np.maximum(a[:, i], b[:, i]) for i in (0, 2, 4))
        q1, k1, hi = (np.minimum(a[:, i], b[:, i]) for i in (1, 3, 5))
        common = (q0 < q1) & (k0 < k1)
        common &= np.maximum(lo, k0 - q1 + 1) <= np.minimum(hi, k1 - 1 - q0)
        if common.any():
            at = int(np.flatnonzero(common)[0])
            return Band(*a[at].tolist()), Band(*b[at].tolist())
        first = last
    return None


def from_bands(bands: Iterable[Band | tuple[int, int, int, int, int, int]], num_tokens: int) -> Mask:
    """A mask from any disjoint bands ``(q0, q1, k0, k1, lo, hi)`` in global positions. Raises as ``Mask`` does."""
    return Mask(tuple(Band(*band) for band in bands), num_tokens)


def full(num_tokens: int) -> Mask:
    """Every token sees every token."""
    return from_bands([rectangle(0, num_tokens, 0, num_tokens)], num_tokens)


def causal_band(start: int, stop: int) -> Band:
    """The band in which positions start..stop see themselves and what lies between start and them."""
    return Band(start, stop, start, stop, start - stop + 1, 0)


def causal(num_tokens: int) -> Mask:
    """Every token sees itself and all tokens before it."""
    return from_bands([causal_band(0, num_tokens)], num_tokens)


def spans(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """(start, stop) of consecutive documents.

    Raises:
        ValueError: there is no document, or a length is less than 1.
    """
    sizes = [int(length) for length in lengths]
    if not sizes or min(sizes) < 1:
        shortest = f"a document of {min(sizes)}" if sizes else "none"
        raise ValueError(f"documents need lengths of at least 1 token, got {shortest}; drop empty documents")
    return list(pairwise(accumulate(sizes, initial=0)))


def documents(lengths: Iterable[int], causal: bool = True) -> Mask:
    """Packed documents that do not see each other; the sequence is as long as all of them.

    Args:
        lengths: tokens of each document, in order.
        causal: whether a token sees only its own document up to itself, or all of its document.

    Raises:
        ValueError: there is no document, or a length is less than 1.
    """
    edges = spans(lengths)
    bands = [causal_band(a, b) if causal else rectangle(a, b, a, b) for a, b in edges]
    return from_bands(bands, edges[-1][1])


def sliding_window(num_tokens: int, left: int, right: int) -> Mask:
    """Every token sees itself, ``left`` keys before it and ``right`` after it.

    Raises:
        ValueError: left or right is negative.
    """
    if left < 0 or right < 0:
        raise ValueError(f"a window counts keys beside self, got left={left} and right={right}; both must be >= 0")
    return from_bands([Band(0, num_tokens, 0, num_tokens, -left, right)], num_tokens)


def prefix_bands(start: int, stop: int, prefix: int) -> list[Band]:
    """Bands of positions start..stop, where all see the first ``prefix`` of them and the rest is causal."""
    return [
        rectangle(start, start + prefix, start, start + prefix),
        Band(start + prefix, stop, start, stop, start - stop, 0),
    ]


def prefix_lm(num_tokens: int, prefix: int) -> Mask:
    """The first ``prefix`` tokens see each other; every later token sees them and what lies before it.

    Raises:
        ValueError: prefix is negative or longer than the sequence.
    """
    if not 0 <= prefix <= num_tokens:
        raise ValueError(f"a prefix must lie within the sequence of {num_tokens} tokens, got {prefix}; shorten it")
    return from_bands(prefix_bands(0, num_tokens, prefix), num_tokens)
