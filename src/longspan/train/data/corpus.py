"""A corpus: tokenised documents in memory-mapped files, and its held-out part.

Text is tokenised once into a cache keyed by a fingerprint of content, selection and tokenizer; several processes may
open the same corpus at once (each then writes the same file and the last one stays). Token arrays are used in place.

Held out is a set of whole documents, chosen by a hash of their relative path, so that adding documents moves no other
document from one side to the other. A corpus of a single document is cut in two instead: its end is held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64

from longspan.train.data.chat_template import ChatTemplate
from longspan.train.data.conversations import read_conversations
from longspan.train.data.sources import PYTHON_DOCS, SUFFIXES, TOKEN_SUFFIXES, Document, read_texts, scan, select
from longspan.train.data.token_arrays import map_learnt, map_tokens, open_token_array, read_header, write_token_array
from longspan.train.data.tokenizers import HuggingFaceTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Where the data is.

    Attributes:
        paths: files or folders of text, `.jsonl` files, or token arrays (`.npy`, `.bin`); "python-docs" is the source
            and documentation of Python's own standard library.
        format: "text"; or "conversations": every line of the `.jsonl` files is one, rendered by the tokenizer's chat
            template, and only the assistant's turns are learnt.
        field: the field of a JSONL line that has its text.
        suffixes: which files of a folder are taken.
        max_bytes: most bytes of text taken, in whole documents chosen by a hash of their path; None: all.
        held_out: fraction of the documents held out for evaluation, 0 for none.
    """

    paths: tuple[str, ...] = (PYTHON_DOCS,)
    format: Literal["text", "conversations"] = "text"
    field: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES
    max_bytes: int | None = None
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f"paths must be a tuple of at least one path, got {self.paths!r}: name the data")
        if len(set(self.paths)) != len(self.paths):
            raise ValueError(f"paths must name each file or folder once, got {self.paths!r}: remove the repeated one")
        arrays = [path.endswith(TOKEN_SUFFIXES) for path in self.paths]
        if any(arrays) and not all(arrays):
            raise ValueError(f"paths must be all text or all token arrays, got {self.paths!r}: tokenise the text first")
        if any(arrays) and self.max_bytes is not None:
            raise ValueError(f"max_bytes is for text, got {self.max_bytes} with token arrays: leave it out")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {self.max_bytes}: leave it out to take everything")
        if self.format == "conversations" and (any(arrays) or PYTHON_DOCS in self.paths or self.field != "text"):
            raise ValueError(
                f"conversations are lines of .jsonl files, with fields of their own, got paths {self.paths!r} and "
                f"field {self.field!r}: name such files or folders, and leave field out"
            )
        if not self.suffixes or not all(suffix.startswith(".") for suffix in self.suffixes):
            raise ValueError(f"suffixes must start with a dot, got {self.suffixes!r}: for example '.txt'")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}: it is a fraction of the documents")


class Corpus:
    """Documents of token ids in memory-mapped files. Cheap to pickle: maps are opened again where it arrives.

    Attributes:
        files: the token arrays.
        file_index, starts, lengths: int64 (num_documents,): the file of a document, its first token there, its tokens.
        keys: uint64 (num_documents,): decides the held-out split.
        vocab_size, separator_id: the tokenizer's.
        skipped: documents found but not used, by reason.
        labelled: only some tokens are to be learnt, as `learnt` tells.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        table: dict[str, np.ndarray],
        *,
        vocab_size: int,
        separator_id: int,
        skipped: dict[str, int] | None = None,
        labelled: bool = False,
    ) -> None:
        self.files, self.labelled = files, labelled
        self.file_index, self.starts = table["file_index"], table["starts"]
        self.lengths, self.keys = table["lengths"], table["keys"]
        self.vocab_size, self.separator_id = vocab_size, separator_id
        self.skipped = skipped or {}

    @classmethod
    def open(
        cls, files: tuple[Path, ...], *, vocab_size: int, separator_id: int, skipped: dict[str, int] | None = None
    ) -> Corpus:
        """The corpus of all documents of some token arrays. Raises ValueError as `open_token_array` does."""
        arrays = [open_token_array(file, vocab_size=vocab_size, separator_id=separator_id) for file in files]
        labelled = arrays[0].learnt is not None
        if any((array.learnt is not None) != labelled for array in arrays):
            names = ", ".join(str(file) for file in files)
            raise ValueError(f"of token arrays all or none must say what is learnt, got {names}: train on one kind")
        table = {
            name: np.concatenate([getattr(array, name) for array in arrays]) for name in ("starts", "lengths", "keys")
        }
        table["file_index"] = np.repeat(np.arange(len(files)), [len(array.lengths) for array in arrays])
        return cls(files, table, vocab_size=vocab_size, separator_id=separator_id, skipped=skipped, labelled=labelled)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all documents, separators not counted."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Int64[np.ndarray, " n"]:
        """Tokens [start, stop) of a document, as far as it goes."""
        length = int(self.lengths[document])
        first = int(self.starts[document])
        stop = length if stop is None else min(stop, length)
        return self._maps[int(self.file_index[document])][first + start : first + stop].astype(np.int64)

    def learnt(self, document: int, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, " n"]:
        """Which of the tokens that `read` gives are to be learnt."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        marks = self._marks[int(self.file_index[document])]
        if marks is None:
            return np.ones(max(0, stop - start), bool)
        first = int(self.starts[document])
        return marks[first + start : first + stop].astype(bool)

    def split(self, held_out: float) -> tuple[Corpus, Corpus]:
        """The corpus for training and the held-out one; with more than one document neither is empty.

        Raises ValueError for a fraction outside (0, 1), or a single document of a single token.
        """
        if not 0 < held_out < 1:
            raise ValueError(
                f"the held-out fraction must be in (0, 1), got {held_out}: use the whole corpus instead of a split"
            )
        if self.num_documents == 1 and self.labelled:
            raise ValueError("of conversations whole ones are held out, got one: give more, or set held_out to 0")
        if self.num_documents == 1:
            return self._cut(held_out)
        held = self.keys < np.uint64(int(held_out * 2**64))
        if held.all():
            held[np.argmax(self.keys)] = False
        if not held.any():
            held[np.argmin(self.keys)] = True
        return self._view(~held), self._view(held)

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [map_tokens(file) for file in self.files]

    @cached_property
    def _marks(self) -> list[np.ndarray | None]:
        return [map_learnt(file) for file in self.files]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_marks")}

    def _table(self) -> dict[str, np.ndarray]:
        return {"file_index": self.file_index, "starts": self.starts, "lengths": self.lengths, "keys": self.keys}

    def _with(self, table: dict[str, np.ndarray]) -> Corpus:
        return Corpus(
            self.files,
            table,
            vocab_size=self.vocab_size,
            separator_id=self.separator_id,
            skipped=self.skipped,
            labelled=self.labelled,
        )

    def _view(self, chosen: np.ndarray) -> Corpus:
        return self._with({name: column[chosen] for name, column in self._table().items()})

    def _cut(self, held_out: float) -> tuple[Corpus, Corpus]:
        length = int(self.lengths[0])
        if length < 2:
            raise ValueError("a corpus of one document needs two tokens to hold one out, got one: give more text")
        head = min(length - 1, max(1, round(length * (1 - held_out))))
        train = self._with(self._table() | {"lengths": np.array([head])})
        return train, self._with(self._table() | {"starts": self.starts + head, "lengths": np.array([length - head])})


def load_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, cache_dir: str | Path, *, max_tokens: int | None = None
) -> Corpus:
    """All documents of `config`, tokenised into `cache_dir` where they are not there yet; of conversations those of at
    most `max_tokens`.

    Raises ValueError, naming the file (and line), where data is missing, empty, not text, or no JSON.
    """
    if config.paths[0].endswith(TOKEN_SUFFIXES):
        files = tuple(Path(path) for path in config.paths)
        return Corpus.open(files, vocab_size=tokenizer.vocab_size, separator_id=tokenizer.separator_id)

    keep = select(_scan(config), config.max_bytes) if config.max_bytes is not None else None
    template = _template(tokenizer) if config.format == "conversations" else None
    cache = Path(cache_dir) / f"{_fingerprint(config, keep, tokenizer, template, max_tokens)}.bin"
    skipped: Counter[str] = Counter()
    if not cache.is_file():
        names: list[str] = []
        marks: list[tuple[np.ndarray, int]] = []  # packed: an eighth of a byte a token is kept in memory

        def documents() -> Iterator[np.ndarray]:
            if isinstance(tokenizer, HuggingFaceTokenizer) and template is not None:
                found = read_conversations(_kept(config, keep), tokenizer, template, max_tokens, skipped)
                for name, (ids, learnt) in found:
                    names.append(name)
                    marks.append((np.packbits(learnt), len(learnt)))
                    yield ids
            else:
                for name, text in read_texts(_kept(config, keep), skipped):
                    names.append(name)
                    yield tokenizer.encode(text)
            if not names:
                reasons = (
                    ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing with these suffixes"
                )
                raise ValueError(
                    f"data must have at least one document of text, got none in {', '.join(config.paths)} ({reasons})"
                )

        try:
            write_token_array(
                cache,
                documents(),
                vocab_size=tokenizer.vocab_size,
                names=lambda: names,
                extra=lambda: {"skipped": dict(skipped)},
                learnt=None if template is None else lambda: (np.unpackbits(bits, count=n) for bits, n in marks),
            )
        except OSError as error:
            raise ValueError(
                f"tokens must be cached on disk, got {error} for {cache}: choose another cache folder"
            ) from None
    skipped_before = read_header(cache)["skipped"]
    return Corpus.open(
        (cache,), vocab_size=tokenizer.vocab_size, separator_id=tokenizer.separator_id, skipped=skipped_before
    )


def load_splits(
    config: CorpusConfig, tokenizer: Tokenizer, cache_dir: str | Path, *, max_tokens: int | None = None
) -> tuple[Corpus, Corpus | None]:
    """The corpora for training and for evaluation; None where nothing is held out. Raises as `load_corpus` does."""
    corpus = load_corpus(config, tokenizer, cache_dir, max_tokens=max_tokens)
    return corpus.split(config.held_out) if config.held_out else (corpus, None)


def _scan(config: CorpusConfig) -> Iterator[Document]:
    return scan(config.paths, field=config.field, suffixes=config.suffixes)


def _kept(config: CorpusConfig, keep: np.ndarray | None) -> Iterator[Document]:
    return _scan(config) if keep is None else compress(_scan(config), keep)


def _template(tokenizer: Tokenizer) -> ChatTemplate:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"conversations need a tokenizer with a chat template, got {tokenizer.name!r}: give the --tokenizer folder "
            "of a model made for chat"
        )
    return ChatTemplate.read(Path(tokenizer.name).parent)


def _fingerprint(
    config: CorpusConfig,
    keep: np.ndarray | None,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_tokens: int | None,
) -> str:
    digest = blake2b(repr((tokenizer.fingerprint, tokenizer.vocab_size, config.field)).encode(), digest_size=16)
    if template is not None:
        digest.update(repr((template.text, template.tokens, max_tokens)).encode())
    for document in _kept(config, keep):
        raw = document.raw()
        digest.update(f"\n{document.name}\n{len(raw)}\n".encode("utf-8", "surrogateescape"))
        digest.update(raw)
    return digest.hexdigest()
