from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from longspan.train.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

TEXTS = ["", "plain", "a naïve café", "日本語 text", "a 👩‍👩‍👧 family", "<|endoftext|>", "line\n\ttab", "\ufffd kept"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 20 merges: most characters that are not ASCII take several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=277,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat the cat"] * 3, trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Llama 2's: words with a mark for the space, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Backend(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("byte_fallback") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(params=["bytes", "byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode([*ids.tolist(), tokenizer.separator_id]) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_emits_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.finish()]) == text
    # A half character would show as U+FFFD, which only one of the texts has of its own.
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")


def test_streaming_a_continuation_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("once upon").tolist()
    for cut in range(1, len(ids)):
        stream = tokenizer.stream(ids[:cut])
        text = "".join([*map(stream.push, ids[cut:]), stream.finish()])
        assert tokenizer.decode(ids[:cut]) + text == "once upon"


def test_streaming_emits_as_early_as_it_can() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "aé日".encode()] == ["a", "", "é", "", "", "日"]
    assert stream.finish() == ""


def test_streaming_ends_with_an_open_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode("ab日").tolist()[:-1]
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish().startswith("\ufffd")


@given(st.lists(st.integers(0, 256)))
def test_byte_stream_equals_decode(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


@given(st.binary())
def test_bytes_round_trip(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data).tolist()) == data


def test_separator_comes_from_the_config_beside_the_file(byte_level: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "the"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.separator_id == tokenizer.encode("the")[0]


def test_refusals(byte_level: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bytes' or the path"):
        load_tokenizer(str(tmp_path / "missing.json"))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="does not parse"):
        load_tokenizer(str(broken))
    with pytest.raises(ValueError, match=r"ends a document, looked for <end>"):
        HuggingFaceTokenizer(byte_level, separator="<end>")
    with pytest.raises(ValueError, match="UTF-8"):
        HuggingFaceTokenizer(byte_level).encode(b"\xff")
    with pytest.raises(ValueError, match=r"\[0, 257\), got 257"):
        ByteTokenizer().decode([257])
