"""Small corpora for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from longspan.train.data.batches import BatchPlan, Packing, Stage
from longspan.train.data.corpus import Corpus
from longspan.train.data.token_arrays import write_token_array

VOCAB = 1009
SEPARATOR = VOCAB - 1


def numbered(lengths: Sequence[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different: 0, 1, 2, ... through all documents, so that a token names its place."""
    ends = np.cumsum(lengths)
    assert ends[-1] < SEPARATOR
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def write_corpus(folder: Path, lengths: Sequence[int]) -> Corpus:
    path = write_token_array(folder / "numbered.bin", numbered(lengths), vocab_size=VOCAB)
    return Corpus.open((path,), vocab_size=VOCAB, separator_id=SEPARATOR)


@contextmanager
def corpus_of(lengths: Sequence[int]) -> Iterator[Corpus]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_corpus(Path(folder), lengths)


document_lengths = st.lists(st.integers(1, 17), min_size=1, max_size=11)
seeds = st.integers(0, 2**63 - 1)


def constant_plan(
    *, steps: int, rows: int, length: int, packing: Packing = "stream", micro_rows: int | None = None
) -> BatchPlan:
    """Every step the same."""
    return BatchPlan(stages=(Stage(steps=steps, rows=rows, length=length),), packing=packing, micro_rows=micro_rows)
