"""Tokenizers: text to ids and back, and a decoder that streams ids as whole characters.

`ByteTokenizer` is built in: one id per byte of UTF-8 and one id that ends a document. `HuggingFaceTokenizer` reads any
`tokenizer.json` through the `tokenizers` package. Special tokens are never recognised inside a text: a document that
spells "<|endoftext|>" does not end there.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int64

# What published tokenizers call the token that ends a text, looked for where tokenizer_config.json names none.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class StreamingDecoder(Protocol):
    """Turns ids that arrive one by one into text; the pieces joined are the text."""

    def push(self, token_id: int) -> str:
        """The characters that this id completes, "" where the last character is still open."""
        ...

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        ...


class Tokenizer(Protocol):
    """What corpora, training and generation ask of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def separator_id(self) -> int:
        """The id that ends every document of a stream; `encode` never returns it for ordinary text."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of everything that `encode` depends on: caches of tokens are keyed by it."""
        ...

    def encode(self, text: str | bytes) -> Int64[np.ndarray, " n"]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special ones left out, bytes that are no UTF-8 as U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...

    def stream(self, after: Sequence[int] = ()) -> StreamingDecoder:
        """A decoder of ids that continue `after` (the prompt's, say), whose own text it does not emit."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    separator_id = 256
    fingerprint = "bytes-257"

    def encode(self, text: str | bytes) -> Int64[np.ndarray, " n"]:
        """The UTF-8 bytes of `text`; bytes are taken as they are."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes, separators left out. Raises ValueError for an id outside the vocabulary."""
        array = np.asarray(ids, np.int64).reshape(-1)
        _check_ids(array, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self, after: Sequence[int] = ()) -> StreamingDecoder:
        return _ByteStream(self, after)


class _ByteStream:
    def __init__(self, tokenizer: ByteTokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(tokenizer.decode_bytes(after))

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, encoded without the special tokens that its template would add.

    Args:
        path: the file.
        separator: the token that ends a document. None: `eos_token` of a tokenizer_config.json beside the file,
            else the first of SEPARATORS that the vocabulary has.

    Raises ValueError where the file is missing or no tokenizer, or where no separator is found.
    """

    def __init__(self, path: str | Path, *, separator: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"a tokenizer file must be readable, got {path} ({error.strerror}): check the path"
            ) from None
        try:
            self._backend = Backend.from_buffer(content)
        except ValueError as error:
            raise ValueError(
                f"{path} must be a Hugging Face tokenizer.json, got one that does not parse: {error}"
            ) from None
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.separator_id = self._find_separator(path, separator)
        self.fingerprint = blake2b(content, digest_size=8).hexdigest()

    def _find_separator(self, path: Path, separator: str | None) -> int:
        config = path.with_name("tokenizer_config.json")
        if separator is None and config.is_file():
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            separator = named["content"] if isinstance(named, dict) else named
        candidates = SEPARATORS if separator is None else (separator,)
        for token in candidates:
            if token in self._vocabulary:
                return self._vocabulary[token]
        raise ValueError(
            f"{path} must have a token that ends a document, looked for {', '.join(candidates)}: pass separator="
        )

    def encode(self, text: str | bytes) -> Int64[np.ndarray, " n"]:
        """The ids of `text`. Raises ValueError for bytes that are no UTF-8."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.name} encodes UTF-8 text, got other bytes ({error}): use the byte tokenizer"
                ) from None
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_rendered(self, text: str) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, "n 2"]]:
        """The ids of a text in which special tokens are meant, and each one's characters [start, stop)."""
        self._backend.encode_special_tokens = False
        try:
            encoded = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        return np.asarray(encoded.ids, np.int64), np.asarray(encoded.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int]) -> str:
        array = np.asarray(ids, np.int64).reshape(-1)
        _check_ids(array, self.vocab_size)
        return self._backend.decode(array[array != self.separator_id].tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()

    def stream(self, after: Sequence[int] = ()) -> StreamingDecoder:
        return _WindowStream(self, after)


class _WindowStream:
    """Streams any tokenizer by decoding the last pieces again.

    A token's text may depend on the token before it (leading spaces) and may end inside a character, shown as U+FFFD:
    so ids are decoded together with the piece already emitted, and held back until they end in a whole character.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._emitted = list(after)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        before = self._tokenizer.decode(self._emitted)
        text = self._tokenizer.decode(self._emitted + self._held)
        if text.endswith("\ufffd") or not text.startswith(before) or len(text) == len(before):
            return ""
        self._emitted, self._held = self._held, []
        return text[len(before) :]

    def finish(self) -> str:
        before = self._tokenizer.decode(self._emitted)
        text = self._tokenizer.decode(self._emitted + self._held)
        self._emitted, self._held = [], []
        return text[len(before) :]


_BYTES_MARK = "longspan_tokenizer.json"  # in a checkpoint folder: its tokens are bytes


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer called "bytes", or that of a tokenizer.json, given the file or the folder that holds it.

    Raises ValueError where there is no such file.
    """
    if name_or_path == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(name_or_path)
    if (path / _BYTES_MARK).is_file():
        return ByteTokenizer()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"a tokenizer is 'bytes' or the path of a tokenizer.json, got {name_or_path!r}: check the path"
        )
    return HuggingFaceTokenizer(path)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Puts beside a checkpoint what ``load_tokenizer(folder)`` needs to find the same tokenizer again."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            source = Path(tokenizer.name).with_name(name) if name != "tokenizer.json" else Path(tokenizer.name)
            if source.is_file():
                shutil.copyfile(source, folder / name)
    else:
        (folder / _BYTES_MARK).write_text(json.dumps({"tokenizer": tokenizer.name}) + "\n", encoding="utf-8")


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f"token ids must be in [0, {vocab_size}), got {ids.min()} to {ids.max()}: use the tokenizer that made them"
        )
