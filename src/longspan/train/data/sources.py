"""Sources of text: files, folders, JSONL, and the source and documentation of Python's own standard library.

A scan lists documents in a fixed order (the paths as given, files by sorted relative path, lines by number) and reads
each only when it is asked for, so that a corpus never has to fit in memory; one document has to. Names are relative,
so that order, selection and the held-out split are the same on every machine.

A file named by the user is text or it is refused. In a folder, files that are not text are skipped and counted, and
names that start with a dot are not looked at. Only `SUFFIXES` (or the user's) are taken from a folder.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

PYTHON_DOCS = "python-docs"
SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".tex",
    ".html",
    ".jsonl",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
)
TOKEN_SUFFIXES = (".npy", ".bin")
# Not part of what a reader calls the library: installed packages, its own tests, byte code, files a build wrote.
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}


class SkippedDocument(ValueError):
    """A document found in a folder that cannot be used; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Document:
    """A document not yet read.

    Attributes:
        name: relative path, with `:line` for a line of JSONL.
        size: its bytes on disk.
        raw: reads those bytes (what the cache's fingerprint is made of).
        text: its text. Raises ValueError where it cannot be used, SkippedDocument where it was only found.
    """

    name: str
    size: int
    raw: Callable[[], bytes]
    text: Callable[[], str]


def name_key(name: str, purpose: bytes) -> int:
    """64 random-looking bits of a name, the same everywhere; different purposes are independent."""
    return int.from_bytes(
        blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, person=purpose).digest(), "big"
    )


def scan(paths: tuple[str, ...], *, field: str, suffixes: tuple[str, ...]) -> Iterator[Document]:
    """All documents of `paths` in their fixed order, unread. Raises ValueError for a path that is not there."""
    for path in paths:
        if path == PYTHON_DOCS:
            yield from _python_docs()
            continue
        root = Path(path)
        if root.is_dir():
            for file in _walk(root, suffixes):
                name = f"{root.resolve().name}/{file.relative_to(root).as_posix()}"
                yield from _file(file, name, field=field, found=True)
        elif root.is_file():
            yield from _file(root, root.name, field=field, found=False)
        else:
            raise ValueError(f"data must be {PYTHON_DOCS!r} or a path that exists, got {path!r}: check the path")


def select(documents: Iterator[Document], max_bytes: int) -> np.ndarray:
    """bool (num documents,): the documents kept so that their sizes add up to at most `max_bytes`.

    They are taken in the order of a hash of their names, so that what is kept is not the start of the alphabet.
    Raises ValueError where nothing fits.
    """
    keys, sizes = [], []
    for document in documents:
        keys.append(name_key(document.name, b"select"))
        sizes.append(document.size)
    keep, total = np.zeros(len(sizes), bool), 0
    for index in np.argsort(np.array(keys, np.uint64), kind="stable"):
        if total + sizes[index] <= max_bytes:
            keep[index] = True
            total += sizes[index]
    if sizes and not total:
        raise ValueError(
            f"max_bytes must hold one document, got {max_bytes}: the smallest document has {min(sizes)} bytes"
        )
    return keep


def read_texts(documents: Iterator[Document], skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of every usable document; the others are counted in `skipped` by reason."""
    for document in documents:
        try:
            yield document.name, document.text()
        except SkippedDocument as error:
            skipped[error.reason] += 1


def _walk(root: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset()) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        files += [Path(folder, name) for name in names if not name.startswith(".") and name.endswith(suffixes)]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _file(path: Path, name: str, *, field: str, found: bool) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _json_lines(path, name, field, found)
    else:
        yield Document(name, path.stat().st_size, lambda: _read(path), lambda: _decode(_read(path), path, found))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"a data file must be readable, got {path} ({error.strerror}): check its permissions"
        ) from None


def _decode(data: bytes, path: Path, found: bool) -> str:
    reason = None
    if not data:
        reason = "empty"
    elif b"\0" in data:
        reason = "binary (it has a NUL byte)"
    else:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte {data[error.start]:#04x} at {error.start})"
    if found:
        raise SkippedDocument(reason.split(" (")[0])
    raise ValueError(f"a data file must hold UTF-8 text, got {path}, which is {reason}: leave it out or convert it")


def _json_lines(path: Path, name: str, field: str, found: bool) -> Iterator[Document]:
    def raw(line: bytes) -> Callable[[], bytes]:
        return lambda: line

    def text(line: bytes, number: int) -> Callable[[], str]:
        return lambda: _json_text(line, number, path, field)

    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                empty = False
                yield Document(f"{name}:{number}", len(line), raw(line), text(line, number))
    if empty and not found:
        raise ValueError(f"a JSONL file must have lines, got {path}, which is empty: leave it out")


def _json_text(line: bytes, number: int, path: Path, field: str) -> str:
    rule = f"line {number} of {path} must be a JSON object with text in {field!r}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{rule}, got one that does not parse ({error}): correct or remove the line") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        what = f"fields {', '.join(map(repr, record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{rule}, got {what}: choose the field, or correct the line")
    if not record[field]:
        raise SkippedDocument("empty")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{rule}, got half of a surrogate pair ({error}): correct or remove the line") from None
    return record[field]


def _python_docs() -> Iterator[Document]:
    """The library's .py, .txt and .rst files and pydoc's topics (the language reference), without its tests."""
    root = Path(sysconfig.get_path("stdlib") or os.path.dirname(os.__file__))
    files = _walk(root, (".py", ".txt", ".rst"), frozenset(_NOT_LIBRARY)) if root.is_dir() else []
    topics = root / "pydoc_data" / "topics.py"
    # Written by the build of this one Python: paths and flags of a machine.
    files = [file for file in files if not file.name.startswith("_sysconfigdata") and file != topics]
    if not files:
        raise ValueError(
            f"{PYTHON_DOCS!r} needs the standard library's source, got none in {root}: name files or folders of text"
        )
    for file in files:
        yield from _file(file, f"{PYTHON_DOCS}/{file.relative_to(root).as_posix()}", field="", found=True)
    if topics.is_file():
        from pydoc_data.topics import topics as texts

        for topic in sorted(texts):
            data = texts[topic].encode()
            yield Document(f"{PYTHON_DOCS}/topics/{topic}", len(data), lambda data=data: data, data.decode)
