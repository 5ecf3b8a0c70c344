from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.train.data.stream import TokenStream
from tests.train.data.corpora import SEPARATOR, corpus_of, document_lengths, numbered, seeds, write_corpus


@given(document_lengths, seeds, st.integers(0, 3))
def test_every_document_token_once_an_epoch(lengths: list[int], seed: int, epoch: int) -> None:
    with corpus_of(lengths) as corpus:
        stream = TokenStream(corpus, seed)
        window = stream.read(epoch * stream.epoch_tokens, stream.epoch_tokens)
    assert sorted(window.tokens[window.tokens != SEPARATOR]) == list(range(sum(lengths)))
    # Whole documents, each followed by one separator, at the boundaries that the window tells.
    pieces = np.split(window.tokens, np.cumsum(window.lengths)[:-1])
    assert sorted(piece.tolist() for piece in pieces) == sorted([*d.tolist(), SEPARATOR] for d in numbered(lengths))


@given(document_lengths, seeds, st.integers(0, 400), st.lists(st.integers(0, 60), max_size=6))
def test_reading_in_pieces_is_reading_at_once(lengths: list[int], seed: int, position: int, counts: list[int]) -> None:
    with corpus_of(lengths) as corpus:
        whole = TokenStream(corpus, seed).read(position, sum(counts))
        stream, tokens = TokenStream(corpus, seed), []
        assert sum(whole.lengths) == sum(counts)
        for count in reversed(counts):
            end = position + sum(counts[: len(counts) - len(tokens)])
            tokens.append(stream.read(end - count, count).tokens)
        assert np.array_equal(np.concatenate([*tokens[::-1], []]), whole.tokens)


@given(document_lengths, seeds, st.integers(0, 100), st.integers(1, 60))
def test_a_piece_begins_only_after_a_separator(lengths: list[int], seed: int, position: int, count: int) -> None:
    with corpus_of(lengths) as corpus:
        window = TokenStream(corpus, seed).read(position, count)
    ends = np.cumsum(window.lengths)
    assert min(window.lengths) > 0
    assert (window.tokens[ends[:-1] - 1] == SEPARATOR).all()
    assert (window.tokens == SEPARATOR).sum() == len(ends) - (window.tokens[-1] != SEPARATOR)


def test_orders_differ_by_epoch_and_seed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [3] * 40)
    stream = TokenStream(corpus, 1)
    size = stream.epoch_tokens
    epochs = [stream.read(epoch * size, size).tokens.tolist() for epoch in range(3)]
    other = TokenStream(corpus, 2).read(0, size).tokens.tolist()
    assert len({tuple(tokens) for tokens in [*epochs, other]}) == 4


def test_the_order_never_changes(tmp_path: Path) -> None:
    """A checkpoint's position means the same tokens on every machine and version: these numbers are for ever."""
    stream = TokenStream(write_corpus(tmp_path, [1] * 12), 1234)
    tokens = stream.read(24, 24).tokens
    assert tokens[tokens != SEPARATOR].tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 10, 7, 3, 11]


def test_a_pickled_stream_reads_the_same(tmp_path: Path) -> None:
    stream = TokenStream(write_corpus(tmp_path, [5, 7, 11]), 3)
    before = stream.read(17, 50)
    after = pickle.loads(pickle.dumps(stream)).read(17, 50)
    assert np.array_equal(before.tokens, after.tokens) and before.lengths == after.lengths


def test_refusals(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [5])
    with pytest.raises(ValueError, match="position >= 0"):
        TokenStream(corpus).read(-1, 3)
    with pytest.raises(ValueError, match="seed"):
        TokenStream(corpus, -1)
