"""Held-out evaluation: which tokens are scored, in which windows, and two baselines on the same bytes.

The fair comparison of context lengths scores the SAME tokens at every length, and gives each of them a context of at
least half the length. Cutting the held-out stream into rows of 512 or of 8,192 and scoring whole rows would score the
first tokens of 16 times as many rows with nearly no context: the short length would lose by cold starts, not by what
lies beyond it. So windows overlap by half: a window of `context` tokens scores its last `context // 2`, which see
between context // 2 and context - 1 tokens before the one predicted, at the cost of two tokens computed per token
scored, at every length. Separators are context, but not scored: bits per byte are then of text alone, and the baselines
are of the same bytes.

Of conversations each is a window of its own, whole, and what is learnt is scored: the loss a token is their figure, for
bits per byte of a part of a text, and what zlib makes of it, compare nothing.

Baselines: a byte bigram with add-one smoothing fitted on training bytes, log2 of p(b | a) = (n_ab + 1) / (n_a + 256),
and zlib at level 9, which adapts to the scored bytes but has no training data and a window of 32 KiB.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from longspan.train.data.batches import NO_LABEL
from longspan.train.data.corpus import Corpus
from longspan.train.data.stream import TokenStream
from longspan.train.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class HeldOutWindows:
    """Windows of one context length over the scored tokens.

    Attributes:
        tokens: int64 (num windows, context).
        labels: int64 (num windows, context); NO_LABEL where a token is not scored in this window. Every scored token is
            the label of exactly one place.
        scored: int64 (n,): the scored tokens in order, separators included. The same for every context length that was
            asked for together.
        num_labels: scored tokens that are not separators.
    """

    tokens: Int64[Tensor, "windows context"]
    labels: Int64[Tensor, "windows context"]
    scored: Int64[np.ndarray, " n"]
    num_labels: int


def held_out_windows(stream: TokenStream, contexts: tuple[int, ...], num_tokens: int) -> dict[int, HeldOutWindows]:
    """Windows of every context length over the same scored tokens.

    Args:
        stream: of the held-out corpus. Scored are the `num_tokens` after its first max(contexts) tokens, so that every
            window lies inside the first epoch, where no text comes twice.
        contexts: lengths of window, at least 2 each.
        num_tokens: tokens scored.

    Raises ValueError where the held-out corpus is too small.
    """
    if not contexts or min(contexts) < 2 or num_tokens < 1:
        raise ValueError(f"windows need contexts of at least 2 and a scored token, got {contexts} and {num_tokens}")
    first = max(contexts)
    if first + num_tokens > stream.epoch_tokens:
        raise ValueError(
            f"held-out text must have context + scored tokens, {first} + {num_tokens}, got {stream.epoch_tokens}: "
            f"hold out more text, or score fewer tokens"
        )
    tokens = stream.read(0, first + num_tokens).tokens
    separator = stream.corpus.separator_id
    return {context: _windows(tokens, context, first, separator) for context in contexts}


def fit_held_out(stream: TokenStream, contexts: tuple[int, ...], num_tokens: int) -> tuple[tuple[int, ...], int]:
    """The contexts and number of scored tokens that a small held-out corpus has room for, both as large as asked else.

    Raises ValueError where there is no room for the shortest context.
    """
    fitting = tuple(context for context in contexts if context < stream.epoch_tokens)
    if not fitting:
        raise ValueError(
            f"held-out text must be longer than a context, got {stream.epoch_tokens} tokens: hold out more text"
        )
    return fitting, min(num_tokens, stream.epoch_tokens - max(fitting))


def _windows(tokens: np.ndarray, context: int, first: int, separator: int) -> HeldOutWindows:
    """Windows that end at the last scored token and score what the windows before them have not."""
    step = context // 2
    num_windows = math.ceil((len(tokens) - first) / step)
    rows = np.empty((num_windows, context), np.int64)
    labels = np.full((num_windows, context), NO_LABEL, np.int64)
    for index in range(num_windows):
        start = first + index * step
        stop = min(start + step, len(tokens))
        rows[index] = tokens[stop - 1 - context : stop - 1]
        labels[index, context - (stop - start) :] = tokens[start:stop]
    labels[labels == separator] = NO_LABEL
    return HeldOutWindows(
        tokens=torch.from_numpy(rows),
        labels=torch.from_numpy(labels),
        scored=tokens[first:],
        num_labels=int((labels != NO_LABEL).sum()),
    )


def conversation_windows(corpus: Corpus, num_tokens: int) -> HeldOutWindows:
    """A window for each held-out conversation, in order, until `num_tokens` that are learnt are scored.

    Shorter ones are filled up behind their end, where under a causal mask nobody looks. Raises ValueError where nothing
    is scored.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    scored = 0
    for document in range(corpus.num_documents):
        if scored >= num_tokens:
            break
        ids = corpus.read(document)
        labels = np.where(corpus.learnt(document), ids, NO_LABEL)[1:]
        found.append((ids[:-1], labels))
        scored += int((labels != NO_LABEL).sum())
    if not scored:
        raise ValueError("held-out conversations must have an answer to score, got none: hold out more of them")
    length = max(len(ids) for ids, _ in found)
    rows = np.full((len(found), length), corpus.separator_id, np.int64)
    labels = np.full((len(found), length), NO_LABEL, np.int64)
    for index, (ids, wanted) in enumerate(found):
        rows[index, : len(ids)], labels[index, : len(ids)] = ids, wanted
    return HeldOutWindows(
        tokens=torch.from_numpy(rows),
        labels=torch.from_numpy(labels),
        scored=labels[labels != NO_LABEL],
        num_labels=scored,
    )


def scored_bytes(windows: HeldOutWindows, tokenizer: Tokenizer) -> bytes:
    """The text of the scored tokens. Exact for the byte tokenizer; others may cut a character at either end."""
    return tokenizer.decode_bytes(windows.scored.tolist())


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits per byte of text from the sum of the scored tokens' losses in nats."""
    if num_bytes < 1:
        raise ValueError(f"bits per byte need at least one byte, got {num_bytes}: score more text")
    return total_nats / math.log(2) / num_bytes


def corpus_bytes(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The text of a corpus, document by document."""
    for document in range(corpus.num_documents):
        yield tokenizer.decode_bytes(corpus.read(document).tolist())


@dataclass(frozen=True)
class Bigram:
    """p(next byte | byte): `bits[a, b]` = -log2 p(b | a), float64 (256, 256)."""

    bits: Float64[np.ndarray, "256 256"]

    @classmethod
    def fit(cls, documents: Iterable[bytes]) -> Bigram:
        """Add-one estimate from the pairs within each document; uniform where nothing is seen."""
        counts = np.zeros(256 * 256, np.int64)
        for document in documents:
            data = np.frombuffer(document, np.uint8).astype(np.int64)
            counts += np.bincount(data[:-1] * 256 + data[1:], minlength=256 * 256)
        counts = counts.reshape(256, 256)
        return cls(-np.log2((counts + 1) / (counts.sum(1, keepdims=True) + 256)))

    def bits_per_byte(self, data: bytes) -> float:
        """Mean bits of the bytes of `data`; the first one, with nothing before it, costs 8."""
        if not data:
            raise ValueError("bits per byte need at least one byte, got none: score more text")
        values = np.frombuffer(data, np.uint8)
        return float((8.0 + self.bits[values[:-1], values[1:]].sum()) / len(data))


def zlib_bits_per_byte(data: bytes) -> float:
    """Bits per byte of zlib at level 9, its header included."""
    if not data:
        raise ValueError("bits per byte need at least one byte, got none: score more text")
    return 8 * len(zlib.compress(data, 9)) / len(data)
