from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.train.data.corpus import Corpus, CorpusConfig, load_corpus, load_splits
from longspan.train.data.evaluation import corpus_bytes
from longspan.train.data.sources import PYTHON_DOCS, scan
from longspan.train.data.token_arrays import open_token_array, write_token_array
from longspan.train.data.tokenizers import ByteTokenizer
from tests.data import data_dir
from tests.train.data.corpora import SEPARATOR, VOCAB, corpus_of

BYTES = ByteTokenizer()


def texts(corpus: Corpus) -> list[bytes]:
    return list(corpus_bytes(corpus, BYTES))


def load(cache: Path, *paths: Path | str, **options: object) -> Corpus:
    config = CorpusConfig(paths=tuple(map(str, paths)), **options)  # type: ignore[arg-type]
    return load_corpus(config, BYTES, cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    files = {
        "z.txt": b"last",
        "a.txt": "é first".encode(),
        "b/m.md": b"middle",
        "b/image.txt": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
        "skip.png": b"not of these suffixes",
        ".hidden/h.txt": b"hidden",
        "b/rows.jsonl": b'{"text": "one"}\n\n{"text": "two", "id": 2}\n{"text": ""}\n',
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def test_a_folder_in_order_of_relative_paths(folder: Path, tmp_path: Path) -> None:
    corpus = load(tmp_path / "cache", folder)
    assert texts(corpus) == ["é first".encode(), b"middle", b"one", b"two", b"last"]
    assert corpus.skipped == {"binary": 1, "empty": 2, "not UTF-8": 1}
    assert corpus.num_tokens == sum(map(len, texts(corpus)))
    assert texts(pickle.loads(pickle.dumps(corpus))) == texts(corpus)


def test_names_do_not_depend_on_where_the_data_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = [d.name for d in scan((str(folder),), field="text", suffixes=(".txt",))]
    monkeypatch.chdir(folder)
    assert [d.name for d in scan((".",), field="text", suffixes=(".txt",))] == absolute
    assert absolute[0] == "data/a.txt"


def test_the_cache_follows_the_content(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(cache, folder)
    written = first.files[0].stat().st_mtime_ns
    again = load(cache, folder)
    assert again.files == first.files and again.files[0].stat().st_mtime_ns == written
    assert again.skipped == first.skipped
    before = (folder / "z.txt").stat()
    (folder / "z.txt").write_bytes(b"tsal")
    os.utime(folder / "z.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts(load(cache, folder))[-1] == b"tsal"
    assert len(list(cache.iterdir())) == 2


def test_a_failed_write_leaves_no_cache(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 2 of .*bad\.jsonl must be a JSON object with text in 'text'"):
        load(tmp_path / "cache", bad)
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_may_fill_the_cache_together(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: texts(load(tmp_path / "cache", folder)), range(4)))
    assert all(content == found[0] for content in found)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ab\0c", "binary"),
        (b"caf\xe9 au lait", r"not UTF-8 \(byte 0xe9 at 3\)"),
    ],
)
def test_a_named_file_is_text_or_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "named.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"named\.txt, which is {message.removeprefix('is ')}") as caught:
        load(tmp_path / "cache", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "got list"),
        ('{"txt": "a"}', "got fields 'txt'"),
        ('{"text": 3}', "got fields 'text'"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 3 of .*{message}"):
        load(tmp_path / "cache", path)


def test_another_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "no", "body": "yes"}))
    assert texts(load(tmp_path / "cache", path, field="body")) == [b"yes"]
    assert texts(load(tmp_path / "cache", path)) == [b"no"]


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_bytes(b"\0")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"at least one document of text, got none in .*1 binary"):
        load(tmp_path / "cache", tmp_path / "data")
    with pytest.raises(ValueError, match=r"empty\.jsonl, which is empty"):
        load(tmp_path / "cache", tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"a path that exists, got '.*missing'"):
        load(tmp_path / "cache", tmp_path / "missing")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "fine.txt").write_text("fine")
    with pytest.raises(ValueError, match="cached on disk"):
        load(tmp_path / "file", tmp_path / "fine.txt")


@pytest.mark.parametrize("limit", [4, 7, 13, 18, 1000])
def test_max_bytes_takes_whole_documents(folder: Path, tmp_path: Path, limit: int) -> None:
    everything = texts(load(tmp_path / "cache", folder, suffixes=(".txt", ".md")))
    kept = load(tmp_path / "cache", folder, suffixes=(".txt", ".md"), max_bytes=limit)
    assert 0 < kept.num_tokens <= limit
    assert [text for text in everything if text in texts(kept)] == texts(kept)
    if limit == 1000:
        assert texts(kept) == everything


def test_configs_that_make_no_sense(tmp_path: Path) -> None:
    for options, message in [
        ({"paths": ()}, "at least one path"),
        ({"paths": ("a", "a")}, "once"),
        ({"paths": ("a.bin", "b.txt")}, "all text or all token arrays"),
        ({"paths": ("a.bin",), "max_bytes": 3}, "max_bytes is for text"),
        ({"max_bytes": 0}, "positive"),
        ({"held_out": 1.0}, r"\[0, 1\)"),
        ({"suffixes": ("txt",)}, "dot"),
    ]:
        with pytest.raises(ValueError, match=message):
            CorpusConfig(**options)
    (tmp_path / "long.txt").write_text("five5")
    with pytest.raises(ValueError, match="smallest document has 5 bytes"):
        load(tmp_path / "cache", tmp_path / "long.txt", max_bytes=4)


@given(st.lists(st.integers(1, 17), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_the_split_is_a_partition(lengths: list[int], held_out: float) -> None:
    with corpus_of(lengths) as corpus:
        if corpus.num_tokens < 2:
            with pytest.raises(ValueError, match="two tokens"):
                corpus.split(held_out)
            return
        train, held = corpus.split(held_out)
        parts = [part.read(i).tolist() for part in (train, held) for i in range(part.num_documents)]
        assert sorted(token for part in parts for token in part) == list(range(sum(lengths)))
        assert train.num_tokens and held.num_tokens


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(40):
        (root / f"{number}.txt").write_text(f"document {number}")
    config = CorpusConfig(paths=(str(root),), held_out=0.25)
    train, held = load_splits(config, BYTES, tmp_path / "cache")
    assert held is not None and 3 <= held.num_documents <= 20
    for number in range(40, 60):
        (root / f"{number}.txt").write_text(f"document {number}")
    more_train, more_held = load_splits(config, BYTES, tmp_path / "cache")
    assert more_held is not None
    assert set(texts(train)) <= set(texts(more_train)) and set(texts(held)) <= set(texts(more_held))
    whole, nothing = load_splits(CorpusConfig(paths=(str(root),), held_out=0), BYTES, tmp_path / "cache")
    assert nothing is None and whole.num_documents == 60


def test_token_arrays_in_both_forms(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [4], [5, 6]]
    binary = write_token_array(tmp_path / "a.bin", documents, vocab_size=VOCAB)
    flat = np.array([SEPARATOR, 1, 2, 3, SEPARATOR, SEPARATOR, 4, SEPARATOR, 5, 6], np.int32)
    np.save(tmp_path / "b.npy", flat)
    for path in (binary, tmp_path / "b.npy"):
        corpus = Corpus.open((path,), vocab_size=VOCAB, separator_id=SEPARATOR)
        corpus = pickle.loads(pickle.dumps(corpus))
        assert [corpus.read(i).tolist() for i in range(corpus.num_documents)] == [[1, 2, 3], [4], [5, 6]]
    both = Corpus.open((binary, tmp_path / "b.npy"), vocab_size=VOCAB, separator_id=SEPARATOR)
    assert [both.read(i).tolist() for i in range(6)] == [[1, 2, 3], [4], [5, 6]] * 2
    assert both.read(2, 1).tolist() == [6] and both.read(0, 1, 9).tolist() == [2, 3] and both.read(0, 3, 4).size == 0


def test_token_arrays_through_a_config(tmp_path: Path) -> None:
    path = write_token_array(tmp_path / "a.bin", [[104, 105], [106]], vocab_size=257)
    assert texts(load(tmp_path / "cache", path)) == [b"hi", b"j"]
    assert not (tmp_path / "cache").exists()


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    path = write_token_array(tmp_path / "a.bin", [[70_000, 1]], vocab_size=70_001)
    array = open_token_array(path, vocab_size=70_001, separator_id=0)
    assert array.tokens.dtype == np.uint32 and array.tokens.tolist() == [70_000, 1]


def test_token_arrays_refused(tmp_path: Path) -> None:
    def check(path: Path, message: str, vocab_size: int = VOCAB) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            open_token_array(path, vocab_size=vocab_size, separator_id=SEPARATOR)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)

    good = write_token_array(tmp_path / "good.bin", [[1, 2, 3]], vocab_size=VOCAB)
    check(good, f"vocabulary of {VOCAB}, got a tokenizer of 257", vocab_size=257)
    content = good.read_bytes()
    for name, data, message in [
        ("short.bin", content[:-1], "truncated"),
        ("tiny.bin", content[:100], "must be a token array"),
        ("other.bin", b"\1" * 1000, "must be a token array"),
        ("none.bin", b"", "must be a token array"),
    ]:
        (tmp_path / name).write_bytes(data)
        check(tmp_path / name, message)
    check(tmp_path / "missing.bin", "readable")
    for name, array, message in [
        ("big.npy", np.array([1, VOCAB]), "ids in"),
        ("negative.npy", np.array([-1]), "ids in"),
        ("floats.npy", np.array([1.0]), "one-dimensional array of ids"),
        ("matrix.npy", np.zeros((2, 2), int), "one-dimensional array of ids"),
        ("separators.npy", np.array([SEPARATOR]), "only separators"),
    ]:
        np.save(tmp_path / name, array)
        check(tmp_path / name, message)
    (tmp_path / "text.npy").write_text("no array")
    check(tmp_path / "text.npy", "does not load")
    (tmp_path / "void.npy").write_bytes(b"")
    check(tmp_path / "void.npy", "does not load")
    for documents, message in [
        ([[VOCAB]], r"\[0, 1009\)"),
        ([[-1]], r"\[0, 1009\)"),
        ([[1.5]], "float"),
        ([], "at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_token_array(tmp_path / "bad.bin", documents, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="one-dimensional"):
        write_token_array(tmp_path / "bad.bin", np.arange(3), vocab_size=VOCAB)
    assert not [path for path in tmp_path.iterdir() if "bad" in path.name]


def test_the_standard_library(tmp_path: Path) -> None:
    corpus = load(tmp_path / "cache", PYTHON_DOCS, max_bytes=300_000)
    assert 250_000 < corpus.num_tokens <= 300_000
    names = [document.name for document in scan((PYTHON_DOCS,), field="text", suffixes=())]
    assert "python-docs/json/decoder.py" in names and "python-docs/topics/yield" in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "_sysconfigdata" in name]
    assert len(set(names)) == len(names)


def test_real_text_round_trips(tmp_path: Path) -> None:
    folder = data_dir("text")
    corpus = load(tmp_path / "cache", folder)
    assert texts(corpus) == [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
    train, held = load(tmp_path / "cache", folder / "tinyshakespeare.txt").split(0.1)
    assert b"".join(texts(train) + texts(held)) == (folder / "tinyshakespeare.txt").read_bytes()
    assert held.num_tokens == pytest.approx(0.1 * 1_115_394, abs=1)
