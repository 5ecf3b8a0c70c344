"""Token arrays: tokenised documents in one memory-mapped file.

Two forms are read. `.bin`, written by `write_token_array`: 512 bytes of JSON header (format, dtype, vocab_size, number
of tokens and of documents), the tokens of all documents end to end without separators, then per document its length
(int64) and a 64-bit key of its name (uint64), little-endian; where the header says "learnt", a byte a token follows: 1
where the token is a label, 0 where it is only read. `.npy`: any one-dimensional integer array whose documents
end with the tokenizer's separator id (the separators are found by reading the array once).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.train.data.sources import name_key

FORMAT = "longspan-tokens-1"
_HEADER_BYTES = 512
_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenArray:
    """Documents of one file.

    Attributes:
        path: the file.
        tokens: (num tokens,) memory map of unsigned integers.
        starts, lengths: int64 (num documents,): where a document lies in `tokens`, separators not included.
        keys: uint64 (num documents,): decides the held-out split.
        header: JSON header of a `.bin`, else empty.
        learnt: (num tokens,) memory map of uint8, 1 where a token is a label; None: all are.
    """

    path: Path
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    header: dict
    learnt: np.ndarray | None = None


def write_token_array(
    path: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    names: Callable[[], Sequence[str]] | None = None,
    extra: Callable[[], dict] = dict,
    learnt: Callable[[], Iterable[np.ndarray]] | None = None,
) -> Path:
    """Writes documents of token ids, without separators, to a `.bin`; the file appears whole or not at all.

    Args:
        path: the file; its folder is made.
        documents: one array of ids each, consumed one at a time; empty ones are left out.
        vocab_size: ids are below it; it decides between 16 and 32 bits.
        names: asked after the documents: their names, for the held-out split. None: their numbers decide.
        extra: asked after the documents: further fields of the header.
        learnt: asked after the documents: for each of them in turn, which tokens are labels. None: all.

    Raises ValueError for ids outside the vocabulary or no tokens at all, OSError where the disk refuses.
    """
    path = Path(path)
    dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp's random name: several ranks may write the same cache, the last one replaces equal content.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(b" " * _HEADER_BYTES)
            lengths = []
            for document in documents:
                ids = np.asarray(document)
                if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                    raise ValueError(
                        f"a document must be a one-dimensional array of ids, got shape {ids.shape} of {ids.dtype}"
                    )
                if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
                    raise ValueError(
                        f"ids must be in [0, {vocab_size}), got {ids.min()} to {ids.max()}: check the tokenizer"
                    )
                lengths.append(ids.size)
                file.write(ids.astype(dtype).tobytes())
            used = [index for index, length in enumerate(lengths) if length]
            if not used:
                raise ValueError(f"a token array must hold at least one token, got none for {path}: check the data")
            keys = _number_keys(path.name, len(lengths))
            if names is not None:
                keys = np.array([name_key(name, b"held-out") for name in names()], np.uint64)
                assert len(keys) == len(lengths), "one name a document"
            num_tokens = sum(lengths)
            file.write(b"\0" * (-num_tokens * dtype.itemsize % 8))
            file.write(np.array(lengths, "<i8")[used].tobytes() + keys[used].astype("<u8").tobytes())
            marks = 0
            for mark in () if learnt is None else learnt():
                marks += file.write(mark.astype(np.uint8).tobytes())
            assert learnt is None or marks == num_tokens, "one mark a token"
            header = {
                "format": FORMAT,
                "dtype": dtype.name,
                "vocab_size": vocab_size,
                "num_tokens": num_tokens,
                "num_documents": len(used),
                "learnt": learnt is not None,
                **extra(),
            }
            encoded = json.dumps(header).encode()
            assert len(encoded) < _HEADER_BYTES, "the header has a fixed size"
            file.seek(0)
            file.write(encoded.ljust(_HEADER_BYTES - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def open_token_array(path: str | Path, *, vocab_size: int, separator_id: int) -> TokenArray:
    """Maps a `.bin` or `.npy` into memory.

    Raises ValueError where the file is truncated or of another form, or where its vocabulary is not the tokenizer's.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return _open_npy(path, vocab_size, separator_id)
        return _open_bin(path, vocab_size)
    except OSError as error:
        raise ValueError(f"a token array must be readable, got {path} ({error}): check the path") from None


def map_learnt(path: Path) -> np.ndarray | None:
    """Which tokens of an array that `open_token_array` has accepted before are labels; None: all."""
    header = {} if path.suffix == ".npy" else read_header(path)
    if not header.get("learnt"):
        return None
    num_tokens = header["num_tokens"]
    return np.memmap(path, np.uint8, mode="r", offset=path.stat().st_size - num_tokens, shape=(num_tokens,))


def map_tokens(path: Path) -> np.ndarray:
    """Only the tokens of an array that `open_token_array` has accepted before: no table is read, nothing is checked."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    header = read_header(path)
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(header["num_tokens"],))


def read_header(path: Path) -> dict:
    """The JSON header of a `.bin`. Raises ValueError where it is none."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    try:
        header = json.loads(start)
    except ValueError:
        header = None
    if len(start) < _HEADER_BYTES or not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a token array of format {FORMAT}, got another file: write it with write_token_array"
        )
    return header


def _open_bin(path: Path, vocab_size: int) -> TokenArray:
    header = read_header(path)
    if header["vocab_size"] != vocab_size:
        raise ValueError(
            f"{path} has ids of a vocabulary of {header['vocab_size']}, "
            f"got a tokenizer of {vocab_size}: use the one that made it"
        )
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    num_tokens, num_documents = header["num_tokens"], header["num_documents"]
    tables = _HEADER_BYTES + num_tokens * dtype.itemsize
    tables += -num_tokens * dtype.itemsize % 8
    expected = tables + 16 * num_documents + (num_tokens if header.get("learnt") else 0)
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes by its header, got {size} (truncated?): write it again")
    tokens = map_tokens(path)
    # Copies: the tables are small and are searched all the time.
    lengths = np.fromfile(path, "<i8", num_documents, offset=tables)
    keys = np.fromfile(path, "<u8", num_documents, offset=tables + 8 * num_documents)
    ends = np.cumsum(lengths)
    if (lengths < 1).any() or ends[-1] != num_tokens:
        raise ValueError(
            f"{path} must have document lengths that add up to {num_tokens} tokens, got others: write it again"
        )
    return TokenArray(path, tokens, ends - lengths, lengths, keys, header, map_learnt(path))


def _open_npy(path: Path, vocab_size: int, separator_id: int) -> TokenArray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} must be an .npy array, got one that does not load ({error}): write it again"
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(
            f"{path} must be a non-empty one-dimensional array of ids, got shape {tokens.shape} of {tokens.dtype}"
        )
    separators = []
    for start in range(0, len(tokens), _SCAN_TOKENS):
        part = tokens[start : start + _SCAN_TOKENS]
        if not (part.min() >= 0 and part.max() < vocab_size):
            raise ValueError(
                f"{path} must have ids in [0, {vocab_size}), got {part.min()} to {part.max()}: check the tokenizer"
            )
        separators.append(start + np.flatnonzero(part == separator_id))
    ends = np.append(np.concatenate(separators), len(tokens)).astype(np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    keys = _number_keys(path.name, len(ends))
    used = ends > starts
    if not used.any():
        raise ValueError(f"{path} must hold documents, got only separators: check the data")
    return TokenArray(path, tokens, starts[used], (ends - starts)[used], keys[used], {})


def _number_keys(name: str, count: int) -> np.ndarray:
    """Keys for documents without names: from the file's name and their number."""
    # The raw output of a bit generator is stable across versions of numpy, unlike what is drawn from it.
    return np.random.Philox(key=name_key(name, b"held-out")).random_raw(count).astype(np.uint64).reshape(-1)
