"""The stream: one endless sequence of tokens, a pure function of (corpus, seed), read at any position.

Every epoch holds every document once, in an order of its own drawn from (seed, epoch), each followed by the separator.
The state of a reader is one integer, the position: tokens consumed since the start, by all ranks together. So any
number of ranks, and a job resumed on another number of them, see the same stream.

Cost: O(num_documents) time and memory when an epoch is entered (two epochs' orders are kept), then O(log num_documents)
per read and O(1) per document in it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from longspan.train.data.corpus import Corpus


class Window(NamedTuple):
    """Consecutive tokens of a stream.

    Attributes:
        tokens: int64 (count,).
        lengths: tokens of each document in the window, in order, its separator included; the first and the last
            document may be cut by the window. They add up to count.
        learnt: bool (count,): what is to be learnt, separators not; None where everything is.
    """

    tokens: Int64[np.ndarray, " count"]
    lengths: tuple[int, ...]
    learnt: Bool[np.ndarray, " count"] | None = None


class TokenStream:
    """The stream of a corpus.

    Args:
        corpus: at least one document.
        seed: decides the order of the documents; 0 <= seed < 2**63.
    """

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"a stream's seed must be in [0, 2**63), got {seed}: choose another")
        if not corpus.num_documents:
            raise ValueError("a stream needs a corpus with documents, got none: check the data")
        self.corpus = corpus
        self.seed = seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch: all documents and one separator each."""
        return self.corpus.num_tokens + self.corpus.num_documents

    def read(self, position: int, count: int) -> Window:
        """The `count` tokens from `position` on. Raises ValueError where either is negative."""
        if position < 0 or count < 0:
            raise ValueError(f"a stream is read at position >= 0 and count >= 0, got {position} and {count}")
        tokens = np.empty(count, np.int64)
        learnt = np.zeros(count, bool) if self.corpus.labelled else None
        lengths, filled = [], 0
        while filled < count:
            epoch, offset = divmod(position + filled, self.epoch_tokens)
            order, ends = self._order(epoch)
            first = int(np.searchsorted(ends, offset, side="right"))
            for index in range(first, len(order)):
                document = int(order[index])
                length = int(self.corpus.lengths[document])
                inside = offset - (int(ends[index]) - length - 1)
                taken = min(length + 1 - inside, count - filled)
                body = self.corpus.read(document, inside, inside + taken)
                tokens[filled : filled + len(body)] = body
                if learnt is not None:
                    learnt[filled : filled + len(body)] = self.corpus.learnt(document, inside, inside + taken)
                if len(body) < taken:
                    tokens[filled + len(body)] = self.corpus.separator_id
                lengths.append(taken)
                filled += taken
                offset += taken
                if filled == count:
                    break
        return Window(tokens, tuple(lengths), learnt)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in order, and the offset at which each ends, its separator included."""
        if epoch not in self._epochs:
            # Sorting raw bits, not Generator.permutation: only a bit generator's output is the same in every numpy.
            bits = np.random.Philox(key=(epoch << 64) + self.seed).random_raw(self.corpus.num_documents)
            order = np.argsort(np.asarray(bits), kind="stable")
            ends = np.cumsum(self.corpus.lengths[order] + 1)
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = order, ends
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epochs": {}}
