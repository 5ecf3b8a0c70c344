"""The 14 mask patterns of the Long-Context Attention Benchmark, on documents with lengths of real corpora.

Source: Long-Context Attention Benchmark (LongCA-bench), patterns and length histograms (Pile, ProLong-64K,
ProLong-512K). What differs: the two windows are two windows (there both are generated as 1024 to the left and none to
the right), and the global slices of the global window are full (there they are typed causal). Cost: a few integers per
document; a mask of 5,000 documents takes milliseconds.

``PATTERNS[name](num_tokens, ...)`` makes a mask. Those in ``DOCUMENT_PATTERNS`` also need ``lengths``, which
``DOCUMENT_PATTERNS[name](histogram, num_tokens, seed)`` samples; a ``_long`` pattern is the same mask on other lengths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from longspan.attention.bands import Band, rectangle
from longspan.attention.masks import (
    Mask,
    causal,
    causal_band,
    documents,
    from_bands,
    full,
    prefix_bands,
    prefix_lm,
    sliding_window,
    spans,
)

WINDOW = 1024  # keys beside self, of all window patterns
BLOCK = 1024  # tokens of one block of block_causal_document
MAX_BLOCKS = 8  # a document of block_causal_document has 1..8 blocks
LONG_SHARE = 0.6  # part of the tokens of a _long pattern that lies in long documents
LONG_RANGE = (8 * 1024, 30 * 1024)  # tokens of a long document, uniform


def read_histogram(histogram: Mapping[str, float] | str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Bins (n, 2) of token counts and their probabilities (n,), from ``{"[0,32)": 0.03, ...}`` or its JSON file.

    Raises:
        ValueError: a bin is not written ``[a,b)`` with a < b, or the weights are negative or all zero.
    """
    table = histogram if isinstance(histogram, Mapping) else json.loads(Path(histogram).read_text())
    if not isinstance(table, Mapping):
        raise ValueError(f"a histogram maps bins like '[0,32)' to weights, got {type(table).__name__}; write it so")
    bins, weights = [], []
    for text, weight in table.items():
        start, _, stop = text.strip().removeprefix("[").removesuffix(")").partition(",")
        if not (start.strip().isdigit() and stop.strip().isdigit() and int(start) < int(stop)):
            raise ValueError(f"a histogram maps bins like '[0,32)' to weights, got the bin {text!r}; write it so")
        bins.append((int(start), int(stop)))
        weights.append(float(weight))
    p = np.array(weights)
    if not len(p) or p.min() < 0 or not p.sum() > 0:
        raise ValueError(f"histogram weights must be >= 0 and not all zero, got {weights[:4]}; check the file")
    return np.array(bins), p / p.sum()


def sample_lengths(histogram: Mapping[str, float] | str | Path, num_tokens: int, seed: int) -> list[int]:
    """Lengths of documents that fill ``num_tokens`` exactly, drawn from a histogram; the last one is cut to fit.

    Args:
        histogram: ``{"[0,32)": weight, ...}`` or the path of such a JSON file; uniform within a bin, at least 1 token.
        num_tokens: tokens to fill.
        seed: the same seed gives the same documents on every machine.
    """
    rng = np.random.default_rng(seed)
    return _fill(_from_histogram(histogram, rng), num_tokens)


def sample_lengths_long(histogram: Mapping[str, float] | str | Path, num_tokens: int, seed: int) -> list[int]:
    """As ``sample_lengths``, with 60 % of the tokens in documents of 8K to 30K tokens, uniform, all shuffled.

    A sequence whose long share would not hold four of the longest documents (under 200K tokens) gets a range scaled
    down in proportion, so that short sequences also mix a few long documents with many short ones.
    """
    rng = np.random.default_rng(seed)
    num_long = round(LONG_SHARE * num_tokens)
    scale = min(1.0, num_long / (4 * LONG_RANGE[1]))
    low, high = (max(1, round(scale * edge)) for edge in LONG_RANGE)
    lengths = _fill(_from_histogram(histogram, rng), num_tokens - num_long)
    lengths += _fill(lambda num: rng.integers(low, high + 1, num), num_long)
    return [lengths[i] for i in rng.permutation(len(lengths))]


def _from_histogram(
    histogram: Mapping[str, float] | str | Path, rng: np.random.Generator
) -> Callable[[int], np.ndarray]:
    """A function that draws n lengths: a bin by its weight, then uniform within it."""
    bins, p = read_histogram(histogram)

    def draw(num: int) -> np.ndarray:
        chosen = bins[rng.choice(len(p), size=num, p=p)]
        return np.maximum(1, rng.integers(chosen[:, 0], chosen[:, 1]))

    return draw


def _fill(draw: Callable[[int], np.ndarray], num_tokens: int) -> list[int]:
    """Lengths from ``draw`` that sum to ``num_tokens``; the last is cut to fit."""
    lengths: list[int] = []
    missing = num_tokens
    while missing > 0:
        drawn = draw(64)
        ends = np.cumsum(drawn)
        num_whole = int(np.searchsorted(ends, missing, side="right"))
        lengths += drawn[:num_whole].tolist()
        missing -= int(ends[num_whole - 1]) if num_whole else 0
        if num_whole < len(drawn) and missing > 0:
            lengths.append(missing)
            missing = 0
    return lengths


def _checked(num_tokens: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    edges = spans(lengths)
    if edges[-1][1] != num_tokens:
        raise ValueError(
            f"document lengths must sum to num_tokens={num_tokens}, got {edges[-1][1]}; sample them for this length"
        )
    return edges


def full_document(num_tokens: int, *, lengths: Sequence[int]) -> Mask:
    """Each document sees all of itself."""
    _checked(num_tokens, lengths)
    return documents(lengths, causal=False)


def causal_document(num_tokens: int, *, lengths: Sequence[int]) -> Mask:
    """Each document is causal."""
    _checked(num_tokens, lengths)
    return documents(lengths)


def share_question(num_tokens: int, *, lengths: Sequence[int]) -> Mask:
    """The first document is a question, causal; each further one an answer: causal on itself, full on the question."""
    (_, question), *answers = _checked(num_tokens, lengths)
    bands = [causal_band(0, question), rectangle(question, num_tokens, 0, question)]
    return from_bands(bands + [causal_band(a, b) for a, b in answers], num_tokens)


def causal_blockwise(num_tokens: int, *, lengths: Sequence[int]) -> Mask:
    """Each document is causal; the last one sees everything before it as well."""
    *before, (last, _) = _checked(num_tokens, lengths)
    bands = [causal_band(a, b) for a, b in before]
    return from_bands([*bands, Band(last, num_tokens, 0, num_tokens, -num_tokens, 0)], num_tokens)


def _prefix(length: int, share: float) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"prefix_share is a part of the length, 0 to 1, got {share}; 0.5 makes one half the prefix")
    return round(share * length)


def prefix_lm_causal(num_tokens: int, *, prefix_share: float = 0.5) -> Mask:
    """The first part of the sequence is seen by all, the rest is causal."""
    return prefix_lm(num_tokens, _prefix(num_tokens, prefix_share))


def prefix_lm_document(num_tokens: int, *, lengths: Sequence[int], prefix_share: float = 0.5) -> Mask:
    """In each document the first part is seen by all of the document, the rest is causal."""
    bands: list[Band] = []
    for a, b in _checked(num_tokens, lengths):
        bands += prefix_bands(a, b, _prefix(b - a, prefix_share))
    return from_bands(bands, num_tokens)


def sliding_window_both(num_tokens: int, *, window: int = WINDOW) -> Mask:
    """Each token sees ``window`` keys on either side of itself."""
    return sliding_window(num_tokens, window, window)


def sliding_window_causal(num_tokens: int, *, window: int = WINDOW) -> Mask:
    """Each token sees itself and ``window`` keys before it."""
    return sliding_window(num_tokens, window, 0)


def global_sliding_window(num_tokens: int, *, window: int = WINDOW, num_global: int = WINDOW) -> Mask:
    """A window of ``window`` keys on either side; the first ``num_global`` tokens see all and are seen by all."""
    if num_global < 0:
        raise ValueError(f"num_global counts tokens from the start, got {num_global}; it must be >= 0")
    g = min(num_global, num_tokens)
    if window < 0:
        raise ValueError(f"window counts keys beside self, got {window}; it must be >= 0")
    bands = [
        rectangle(0, g, 0, num_tokens),
        rectangle(g, num_tokens, 0, g),
        Band(g, num_tokens, g, num_tokens, -window, window),
    ]
    return from_bands(bands, num_tokens)


def block_causal_document(num_tokens: int, *, seed: int = 0, block: int = BLOCK, max_blocks: int = MAX_BLOCKS) -> Mask:
    """Documents of 1 to ``max_blocks`` blocks; a token sees its own block and the earlier blocks of its document.

    The last block and the last document are cut to fit the sequence.
    """
    if block < 1 or max_blocks < 1:
        raise ValueError(f"block and max_blocks must be at least 1, got {block} and {max_blocks}; take 1024 and 8")
    rng = np.random.default_rng(seed)
    bands: list[Band] = []
    start = 0
    while start < num_tokens:
        stop = min(num_tokens, start + block * int(rng.integers(1, max_blocks + 1)))
        bands += [rectangle(a, min(a + block, stop), start, min(a + block, stop)) for a in range(start, stop, block)]
        start = stop
    return from_bands(bands, num_tokens)


def block_sparse(num_tokens: int, *, block: int, ratio: float, seed: int = 0) -> Mask:
    """Random blocks of ``block`` x ``block`` tokens, that share ``ratio`` of all; each row of blocks has at least one.

    Not one of the 14: the benchmark measures its block-sparse kernels on such masks. Neighbours in a row are one band.

    Raises:
        ValueError: block is less than 1, or ratio is not in (0, 1].
    """
    if block < 1 or not 0 < ratio <= 1:
        raise ValueError(f"block must be at least 1 and ratio in (0, 1], got {block} and {ratio}; take 128 and 0.5")
    size = -(-num_tokens // block)
    order = np.random.default_rng(seed).random((size, size))
    chosen = np.zeros(size * size, dtype=bool)
    chosen[np.argsort(order, axis=None)[: max(size, round(ratio * size * size))]] = True
    chosen = chosen.reshape(size, size)
    for row in np.flatnonzero(~chosen.any(axis=1)):
        # A block moves here from the fullest row, so that the ratio stays.
        full_row = chosen.sum(axis=1).argmax()
        chosen[full_row, np.flatnonzero(chosen[full_row])[0]] = False
        chosen[row, order[row].argmin()] = True
    bands = []
    for row, blocks in enumerate(chosen):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], blocks, [0]]).astype(np.int8)))
        q0, q1 = row * block, min((row + 1) * block, num_tokens)
        bands += [rectangle(q0, q1, a * block, min(b * block, num_tokens)) for a, b in edges.reshape(-1, 2).tolist()]
    return from_bands(bands, num_tokens)


PATTERNS: dict[str, Callable[..., Mask]] = {
    "full": full,
    "causal": causal,
    "full_document": full_document,
    "causal_document": causal_document,
    "full_document_long": full_document,
    "causal_document_long": causal_document,
    "share_question": share_question,
    "causal_blockwise": causal_blockwise,
    "prefix_lm_causal": prefix_lm_causal,
    "prefix_lm_document": prefix_lm_document,
    "sliding_window": sliding_window_both,
    "sliding_window_causal": sliding_window_causal,
    "global_sliding_window": global_sliding_window,
    "block_causal_document": block_causal_document,
}

DOCUMENT_PATTERNS: dict[str, Callable[..., list[int]]] = {
    "full_document": sample_lengths,
    "causal_document": sample_lengths,
    "full_document_long": sample_lengths_long,
    "causal_document_long": sample_lengths_long,
    "share_question": sample_lengths,
    "causal_blockwise": sample_lengths,
    "prefix_lm_document": sample_lengths,
}


def check_pattern(name: str) -> None:
    """Raises ValueError for what is no pattern."""
    if name not in PATTERNS:
        raise ValueError(f"unknown mask {name!r}; known: {', '.join(PATTERNS)}")


def make_pattern(name: str, num_tokens: int, *, histogram: str | Path | None = None, seed: int = 0) -> Mask:
    """The mask of a pattern, its documents drawn where it has any: equal wherever it is made.

    Args:
        histogram: document lengths as ``sample_lengths`` takes them; None: uniform from 1/32 to 1/4 of the length.
        seed: of the documents.

    Raises:
        ValueError: an unknown name, or a file that holds no histogram.
    """
    check_pattern(name)
    if name not in DOCUMENT_PATTERNS:
        return PATTERNS[name](num_tokens)
    low, high = max(1, num_tokens // 32), max(2, num_tokens // 4)
    table = {f"[{low},{high})": 1.0} if histogram is None else histogram
    return PATTERNS[name](num_tokens, lengths=DOCUMENT_PATTERNS[name](table, num_tokens, seed))
