"""Conversations: lines of JSON with messages, as token ids of which only the assistant's are to be learnt.

A line holds `{"messages": [{"role": ..., "content": ...}, ...]}`, or the older `{"conversations": [{"from": ...,
"value": ...}, ...]}`; `tools` beside either goes to the chat template, and so do other keys of a message. Special
tokens are recognised wherever they stand in the rendered text, as in transformers: in a message, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from longspan.train.data.chat_template import ChatTemplate, Message, Span
from longspan.train.data.sources import Document
from longspan.train.data.tokenizers import HuggingFaceTokenizer

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "function": "tool"}


class Labelled(NamedTuple):
    """A document's ids, and which of them are to be learnt."""

    ids: Int64[np.ndarray, " n"]
    learnt: Bool[np.ndarray, " n"]


def encode(tokenizer: HuggingFaceTokenizer, text: str, spans: Iterable[Span]) -> Labelled:
    """The ids of a rendered conversation; learnt is every token with a character inside one of the spans."""
    ids, offsets = tokenizer.encode_rendered(text)
    learnt = np.zeros(len(ids), bool)
    for start, stop in spans:
        if start < stop:  # an empty one may lie inside a token
            learnt |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return Labelled(ids, learnt)


def read_conversations(
    documents: Iterable[Document],
    tokenizer: HuggingFaceTokenizer,
    template: ChatTemplate,
    max_tokens: int | None,
    skipped: Counter[str],
) -> Iterator[tuple[str, Labelled]]:
    """(name, ids and what is learnt) of every usable conversation; the others are counted in `skipped` by reason.

    Raises ValueError, naming file and line, for one that is no conversation or that the template refuses.
    """
    for document in documents:
        messages, tools = _parse(document)
        if not any(message["role"] == "assistant" for message in messages):
            skipped["without an assistant's turn"] += 1
            continue
        try:
            text, spans = template.render(messages, tools)
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from None
        labelled = encode(tokenizer, text, spans)
        if not labelled.learnt.any():
            skipped["in which the assistant says nothing"] += 1
        elif max_tokens is not None and len(labelled.ids) > max_tokens:
            skipped[f"longer than {max_tokens} tokens"] += 1
        else:
            yield document.name, labelled


def _parse(document: Document) -> tuple[list[Message], Any]:
    rule = f"{document.name} must be a JSON object with 'messages' (role, content) or 'conversations' (from, value)"
    try:
        record = json.loads(document.raw())
    except ValueError as error:
        raise ValueError(f"{rule}, got a line that does not parse ({error}): correct or remove it") from None
    if not isinstance(record, dict):
        raise ValueError(f"{rule}, got {type(record).__name__}: correct or remove the line")
    old = "messages" not in record
    turns = record.get("conversations" if old else "messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{rule}, got fields {', '.join(map(repr, record)) or 'none'}: correct or remove the line")
    return [_message(turn, old, rule) for turn in turns], record.get("tools")


def _message(turn: Any, old: bool, rule: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{rule}, got a message that is {type(turn).__name__}: correct or remove the line")
    if old:
        speaker, said = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or not isinstance(said, str):
            raise ValueError(f"{rule}, got a message with {', '.join(map(repr, turn)) or 'nothing'}: correct the line")
        return {"role": _ROLES.get(speaker, speaker), "content": said}
    if not isinstance(turn.get("role"), str):
        raise ValueError(f"{rule}, got a message without a role: correct or remove the line")
    # As in transformers: templates ask whether a key is there, and would write out a None.
    return {key: value for key, value in turn.items() if value is not None}
