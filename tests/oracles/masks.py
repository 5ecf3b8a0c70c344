"""The mask patterns as predicates of one (query, key) pair, from their description; imports nothing from longspan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def dense(num_tokens: int, allowed: Callable[[int, int], bool]) -> np.ndarray:
    """bool (num_tokens, num_tokens) of a predicate of (q, k)."""
    return np.array([[bool(allowed(q, k)) for k in range(num_tokens)] for q in range(num_tokens)])


def document_of(lengths: Sequence[int]) -> list[int]:
    return [i for i, length in enumerate(lengths) for _ in range(length)]


def position_of(lengths: Sequence[int]) -> list[int]:
    return [p for length in lengths for p in range(length)]


def full(s):
    return dense(s, lambda q, k: True)


def causal(s):
    return dense(s, lambda q, k: k <= q)


def full_document(s, lengths):
    doc = document_of(lengths)
    return dense(s, lambda q, k: doc[q] == doc[k])


def causal_document(s, lengths):
    doc = document_of(lengths)
    return dense(s, lambda q, k: doc[q] == doc[k] and k <= q)


def share_question(s, lengths):
    doc = document_of(lengths)
    return dense(s, lambda q, k: k <= q and (doc[k] == 0 or doc[q] == doc[k]))


def causal_blockwise(s, lengths):
    doc = document_of(lengths)
    return dense(s, lambda q, k: k <= q and (doc[q] == doc[-1] or doc[q] == doc[k]))


def prefix_lm(s, prefix):
    return dense(s, lambda q, k: k < prefix or k <= q)


def prefix_lm_document(s, lengths, prefix_of: Callable[[int], int]):
    doc, position = document_of(lengths), position_of(lengths)

    def allowed(q, k):
        return doc[q] == doc[k] and (k <= q or position[k] < prefix_of(lengths[doc[k]]))

    return dense(s, allowed)


def sliding_window(s, left, right):
    return dense(s, lambda q, k: -left <= k - q <= right)


def global_sliding_window(s, window, num_global):
    return dense(s, lambda q, k: q < num_global or k < num_global or abs(q - k) <= window)


def block_causal_document(s, lengths, block):
    doc, position = document_of(lengths), position_of(lengths)
    return dense(s, lambda q, k: doc[q] == doc[k] and position[k] // block <= position[q] // block)
