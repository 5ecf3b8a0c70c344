"""Conversations as tokens and labels, against transformers' own rendering and its mask of the assistant's tokens."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.train.data.batches import NO_LABEL, draw
from longspan.train.data.chat_template import ChatTemplate
from longspan.train.data.conversations import encode
from longspan.train.data.corpus import Corpus, CorpusConfig, load_corpus, load_splits
from longspan.train.data.evaluation import conversation_windows
from longspan.train.data.stream import TokenStream
from longspan.train.data.token_arrays import write_token_array
from longspan.train.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from tests.train.data.chats import (
    CHATML,
    CHATML_MARKED,
    FORGETFUL,
    LLAMA3,
    LLAMA3_MARKED,
    MESSAGES,
    chat_tokenizer,
    write_chats,
)


def tokenizer_of(folder: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def theirs(folder: Path, template: str, messages: list[dict[str, Any]], **more: Any) -> Any:
    """transformers' text, ids and mask with a template that marks the assistant's part."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        logging.disable(logging.WARNING)
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **more)
            both = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **more
            )
        finally:
            logging.disable(logging.NOTSET)
    return text, both["input_ids"], both["assistant_masks"]


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize(
    ("template", "marked", "apart"),
    [
        (CHATML, CHATML_MARKED, False),
        (LLAMA3, LLAMA3_MARKED, True),
        (CHATML_MARKED, CHATML_MARKED, True),
        (LLAMA3_MARKED, LLAMA3_MARKED, False),
    ],
    ids=["chatml", "llama3", "chatml-marked", "llama3-marked"],
)
def test_text_ids_and_mask_are_transformers(
    template: str, marked: str, apart: bool, messages: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = chat_tokenizer(tmp_path / "tokenizer", template, apart=apart)
    text, spans = ChatTemplate.read(folder).render(messages)
    ids, learnt = encode(tokenizer_of(folder), text, spans)
    expected_text, expected_ids, expected_mask = theirs(folder, marked, messages)
    assert theirs(folder, template, messages)[0] == text == expected_text
    assert ids.tolist() == expected_ids
    assert learnt.tolist() == [bool(mark) for mark in expected_mask]
    assert 0 < learnt.sum() < len(learnt)


RICH = (
    "{%- for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n"
    "  {# lost #}\n"
    "  {% if m.none is defined %}!{% endif %}{{ strftime_now('%Y') }}|{{ m.content | tojson }}|{{ eos_token }}\n"
    "{%- endfor %}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ dict(a=1) }}"
)


def test_the_names_that_templates_rely_on(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "tokenizer", RICH)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "<b> é"}, {"role": "skip", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "turn", "description": "ü", "parameters": {}}}]
    text, spans = ChatTemplate.read(folder).render(messages, tools)
    assert text == theirs(folder, RICH, messages, tools=tools)[0] and not spans
    assert "<b> é" in text and '"ü"' in text


def test_a_character_of_several_tokens_is_learnt_whole(tmp_path: Path) -> None:
    # transformers' mask ends with the first token of the last character.
    folder = chat_tokenizer(tmp_path / "tokenizer", None)
    ids, learnt = encode(tokenizer_of(folder), "a日b", [(1, 2)])
    assert learnt.tolist() == [False, True, True, True, False] and len(ids) == 5


def render(template: str, messages: list[dict[str, Any]]) -> Any:
    return ChatTemplate(template, {"bos_token": "<|begin|>"}).render(messages)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (FORGETFUL, "renders message 3 otherwise when more follow"),
        (CHATML.replace("assistant\\n", "other\\n"), "otherwise than its own prompt"),
        ("{{ raise_exception('roles must\nalternate') }}", "the chat template refuses the conversation: roles must$"),
        ("{{ messages[0].nothing.more }}", "refuses the conversation: .* has no attribute 'nothing'"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation: access to attribute '__class__'"),
        ("{% if %}", "must be Jinja, got an error in line 1"),
        ("{% generation %}x", "must be Jinja, got an error in line 1"),
    ],
)
def test_templates_that_do_not_tell(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        render(template, MESSAGES[1])
    assert "\n" not in str(caught.value)


def corpus_of(tmp_path: Path, file: Path, template: str = CHATML, **options: Any) -> Corpus:
    tokenizer = tokenizer_of(chat_tokenizer(tmp_path / "tokenizer", template))
    max_tokens = options.pop("max_tokens", None)
    config = CorpusConfig(paths=(str(file),), format="conversations", **options)
    return load_corpus(config, tokenizer, tmp_path / "cache", max_tokens=max_tokens)


def test_labels_through_cache_stream_and_batches(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, write_chats(tmp_path / "chats.jsonl"))
    tokenizer, template = tokenizer_of(tmp_path / "tokenizer"), ChatTemplate.read(tmp_path / "tokenizer")
    expected = [encode(tokenizer, *template.render(messages)) for messages in MESSAGES]
    for document, (ids, learnt) in enumerate(expected):
        assert corpus.read(document).tolist() == ids.tolist()
        assert corpus.learnt(document).tolist() == learnt.tolist()
        assert corpus.learnt(document, 3, 9).tolist() == learnt[3:9].tolist()
    stream = TokenStream(corpus, 5)
    length = stream.epoch_tokens // 4
    batches = [
        draw(stream, 0, rows=4, length=length, packing="documents", data_rank=rank, data_size=2) for rank in (0, 1)
    ]
    flat = [token for batch in batches for token in batch.labels.flatten().tolist()]
    assert sum(batch.num_labels for batch in batches) == sum(label != NO_LABEL for label in flat)
    order, _ = stream._order(0)
    tokens, wanted = [], []
    for document in order:
        ids, learnt = expected[document]
        tokens += [*ids.tolist(), corpus.separator_id]
        wanted += [*np.where(learnt, ids, NO_LABEL).tolist(), NO_LABEL]
    assert flat == wanted[1 : len(flat) + 1]
    assert draw(stream, 0, rows=1, length=4 * length).tokens.flatten().tolist() == tokens[: 4 * length]


def test_both_forms_are_the_same_conversation(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    old = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
        for messages in MESSAGES
    ]
    file = tmp_path / "old.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    ours = corpus_of(tmp_path, write_chats(tmp_path / "chats.jsonl"))
    other = corpus_of(tmp_path, file)
    for document in range(len(MESSAGES)):
        assert other.read(document).tolist() == ours.read(document).tolist()
        assert other.learnt(document).tolist() == ours.learnt(document).tolist()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    silent = [{"role": "user", "content": "nobody there"}]
    empty = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    file = write_chats(tmp_path / "chats.jsonl", [*MESSAGES, silent, empty])
    plain = CHATML_MARKED.replace("message['content'] + '<|im_end|>' }}{% endgen", "message['content'] }}{% endgen")
    everything = corpus_of(tmp_path, file, plain)
    assert everything.skipped == {"without an assistant's turn": 1, "in which the assistant says nothing": 1}
    longest = int(everything.lengths.max())
    fewer = corpus_of(tmp_path, file, plain, max_tokens=longest - 1)
    assert fewer.skipped == everything.skipped | {f"longer than {longest - 1} tokens": 1}
    assert fewer.num_documents == everything.num_documents - 1


def test_the_cache_follows_the_template(tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl")
    files = {corpus_of(tmp_path, file, template).files[0] for template in (CHATML, LLAMA3, CHATML, CHATML_MARKED)}
    assert len(files) == 3


def test_held_out_conversations_are_scored_alone(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(chat_tokenizer(tmp_path / "tokenizer", CHATML))
    config = CorpusConfig(
        paths=(str(write_chats(tmp_path / "chats.jsonl", copies=9)),), format="conversations", held_out=0.3
    )
    _, held_out = load_splits(config, tokenizer, tmp_path / "cache")
    assert held_out is not None and held_out.num_documents > 2
    windows = conversation_windows(held_out, 10**6)
    total = 0
    for document in range(held_out.num_documents):
        ids, learnt = held_out.read(document), held_out.learnt(document)
        assert windows.tokens[document, : len(ids) - 1].tolist() == ids[:-1].tolist()
        assert windows.labels[document, : len(ids) - 1].tolist() == np.where(learnt, ids, NO_LABEL)[1:].tolist()
        assert (windows.labels[document, len(ids) - 1 :] == NO_LABEL).all()
        total += int(learnt[1:].sum())
    assert windows.num_labels == total == int((windows.labels != NO_LABEL).sum())
    assert len(conversation_windows(held_out, 1).tokens) == 1
    one = CorpusConfig(paths=(str(write_chats(tmp_path / "one.jsonl", MESSAGES[:1])),), format="conversations")
    with pytest.raises(ValueError, match="whole ones are held out, got one"):
        load_splits(one, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "bad.jsonl:1 must be a JSON object .* that does not parse"),
        ("[]", "got list"),
        ('{"text": "x"}', "got fields 'text'"),
        ('{"messages": []}', "got fields 'messages'"),
        ('{"messages": ["x"]}', "a message that is str"),
        ('{"messages": [{"content": "x"}]}', "a message without a role"),
        ('{"conversations": [{"from": "gpt", "text": "x"}]}', "a message with 'from', 'text'"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "bad.jsonl:1: the chat template refuses"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "got none in .*1 without an assistant's turn"),
    ],
)
def test_lines_that_are_no_conversation(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=says) as caught:
        corpus_of(tmp_path, tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)


def test_what_conversations_need(tmp_path: Path) -> None:
    config = CorpusConfig(paths=(str(write_chats(tmp_path / "chats.jsonl")),), format="conversations")
    with pytest.raises(ValueError, match="a tokenizer with a chat template, got 'bytes'"):
        load_corpus(config, ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(ValueError, match="need a chat template, got none in"):
        load_corpus(config, tokenizer_of(chat_tokenizer(tmp_path / "plain", None)), tmp_path / "cache")
    for options in ({"paths": ("a.bin",)}, {}, {"paths": ("a.jsonl",), "field": "chat"}):
        with pytest.raises(ValueError, match=r"conversations are lines of \.jsonl files"):
            CorpusConfig(format="conversations", **options)  # type: ignore[arg-type]


def test_arrays_say_what_is_learnt_all_or_none(tmp_path: Path) -> None:
    marks = [np.array([0, 1, 1]), np.array([1])]
    some = write_token_array(tmp_path / "some.bin", [[1, 2, 3], [4]], vocab_size=9, learnt=lambda: marks)
    every = write_token_array(tmp_path / "every.bin", [[1, 2, 3], [4]], vocab_size=9)
    corpus = Corpus.open((some,), vocab_size=9, separator_id=8)
    assert corpus.labelled and corpus.learnt(0).tolist() == [False, True, True] and corpus.learnt(1).tolist() == [True]
    plain = Corpus.open((every,), vocab_size=9, separator_id=8)
    assert not plain.labelled and plain.learnt(0, 1).all() and TokenStream(plain).read(0, 5).learnt is None
    with pytest.raises(ValueError, match="all or none must say what is learnt"):
        Corpus.open((some, every), vocab_size=9, separator_id=8)
    some.write_bytes(some.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        Corpus.open((some,), vocab_size=9, separator_id=8)
