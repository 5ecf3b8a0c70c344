from __future__ import annotations

import math
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.train.data.batches import NO_LABEL
from longspan.train.data.corpus import CorpusConfig, load_splits
from longspan.train.data.evaluation import (
    Bigram,
    bits_per_byte,
    corpus_bytes,
    fit_held_out,
    held_out_windows,
    scored_bytes,
    zlib_bits_per_byte,
)
from longspan.train.data.stream import TokenStream
from longspan.train.data.tokenizers import ByteTokenizer
from tests.data import data_dir
from tests.train.data.corpora import SEPARATOR, corpus_of, seeds, write_corpus


@given(
    st.lists(st.integers(1, 30), min_size=5, max_size=20),
    seeds,
    st.lists(st.integers(2, 13), min_size=1, max_size=3, unique=True),
    st.integers(1, 15),
)
def test_every_length_scores_the_same_tokens_once(
    lengths: list[int], seed: int, contexts: list[int], count: int
) -> None:
    with corpus_of(lengths) as corpus:
        stream = TokenStream(corpus, seed)
        if max(contexts) + count > stream.epoch_tokens:
            with pytest.raises(ValueError, match="hold out more text"):
                held_out_windows(stream, tuple(contexts), count)
            return
        found = held_out_windows(stream, tuple(contexts), count)
        tokens = stream.read(0, stream.epoch_tokens).tokens
    first = max(contexts)
    wanted = tokens[first : first + count]
    for context, windows in found.items():
        assert windows.tokens.shape == windows.labels.shape and windows.tokens.shape[1] == context
        assert np.array_equal(windows.scored, wanted)
        labels = windows.labels.reshape(-1).numpy()
        assert labels[labels != NO_LABEL].tolist() == wanted[wanted != SEPARATOR].tolist()
        assert windows.num_labels == (wanted != SEPARATOR).sum()
        for row, row_labels in zip(windows.tokens.numpy(), windows.labels.numpy(), strict=True):
            places = np.flatnonzero(row_labels != NO_LABEL)
            # At least half the context lies at or before the token that predicts.
            assert (places + 1 >= context - context // 2 + 1).all()
            for place in places:
                # Tokens are numbered, so a label tells where it is in the stream and what stands before it.
                at = int(np.flatnonzero(tokens == row_labels[place])[0])
                assert row[: place + 1].tolist() == tokens[at - place - 1 : at].tolist()


def test_fitting_a_small_corpus(tmp_path: Path) -> None:
    stream = TokenStream(write_corpus(tmp_path, [50, 50]))
    assert fit_held_out(stream, (16, 64, 128), 1000) == ((16, 64), 38)
    assert fit_held_out(stream, (16,), 10) == ((16,), 10)
    with pytest.raises(ValueError, match="longer than a context"):
        fit_held_out(stream, (128,), 10)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=4), st.binary(min_size=1, max_size=40))
def test_bigram_by_the_definition(documents: list[bytes], data: bytes) -> None:
    counts: dict[tuple[int, int], int] = {}
    for document in documents:
        for pair in pairwise(document):
            counts[pair] = counts.get(pair, 0) + 1
    bits = 8.0
    for a, b in pairwise(data):
        seen = sum(count for (first, _), count in counts.items() if first == a)
        bits -= math.log2((counts.get((a, b), 0) + 1) / (seen + 256))
    assert Bigram.fit(documents).bits_per_byte(data) == pytest.approx(bits / len(data))


def test_baselines_at_their_limits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    assert Bigram.fit([]).bits_per_byte(b"anything") == 8
    assert Bigram.fit([b"ab" * 10_000]).bits_per_byte(b"ab" * 5000) < 0.1
    assert 8 < zlib_bits_per_byte(noise) < 8.1
    assert zlib_bits_per_byte(b"ab" * 5000) < 0.1
    assert len(zlib.compress(b"hello", 9)) * 8 / 5 == zlib_bits_per_byte(b"hello")
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3)
    for measure in (Bigram.fit([]).bits_per_byte, zlib_bits_per_byte):
        with pytest.raises(ValueError, match="at least one byte"):
            measure(b"")
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)


def test_baselines_on_real_text(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    config = CorpusConfig(paths=(str(data_dir("text/tinyshakespeare.txt")),), held_out=0.1)
    train, held = load_splits(config, tokenizer, tmp_path)
    assert held is not None
    windows = held_out_windows(TokenStream(held), (512, 8192), 65_536)
    data = scored_bytes(windows[512], tokenizer)
    assert data == scored_bytes(windows[8192], tokenizer)
    assert len(data) == windows[512].num_labels == windows[8192].num_labels
    # English takes about 3.5 bits a byte by pairs, and zlib in 64 KiB a little less.
    assert 3.2 < Bigram.fit(corpus_bytes(train, tokenizer)).bits_per_byte(data) < 3.7
    assert 3.0 < zlib_bits_per_byte(data) < 3.7
