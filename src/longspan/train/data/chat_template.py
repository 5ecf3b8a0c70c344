"""Chat templates: a tokenizer folder's Jinja template, rendered as transformers renders it, and what an assistant said.

The template is the folder's `chat_template.jinja`, else `chat_template` of its `tokenizer_config.json`. It runs in
Jinja's sandbox with the names that templates rely on (`raise_exception`, `strftime_now`, `tojson`, loop controls, the
`{% generation %}` tag, the special tokens), for a template is code that somebody else wrote.

What the assistant said is told exactly, or not at all: by the generation tag where the template has it; else by
rendering the conversation up to each of the assistant's turns (with the generation prompt) and including it. What the
second has beyond the first is that turn, white space at its end left out (a newline after the end-of-turn token is
nobody's answer). A template that renders earlier turns differently once others follow is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

Span = tuple[int, int]
Message = dict[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A template with its special tokens.

    Args:
        text: the Jinja source.
        tokens: special tokens by the names that templates use, such as `eos_token`.

    Raises ValueError where the template does not parse.
    """

    def __init__(self, text: str, tokens: dict[str, str]) -> None:
        self.text, self.tokens = text, tokens
        self._marked = bool(_GENERATION.search(text))
        self._spans: list[Span] = []
        self._written: list[str] | None = None
        self._template = _compile(text, self)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate:
        """The template of a tokenizer folder. Raises ValueError where it has none."""
        config = folder / "tokenizer_config.json"
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        text = values.get("chat_template")
        if isinstance(text, list):
            text = {entry["name"]: entry["template"] for entry in text}.get("default")
        if (file := folder / "chat_template.jinja").is_file():
            text = file.read_text(encoding="utf-8")
        if not isinstance(text, str):
            raise ValueError(
                f"conversations need a chat template, got none in {folder} (chat_template.jinja, or chat_template of "
                "tokenizer_config.json): give the --tokenizer folder of a model made for chat"
            )
        named = {name: values.get(name) for name in _TOKENS}
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        return cls(text, {name: token for name, token in tokens.items() if isinstance(token, str)})

    def render(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """A conversation as text, and where in it (in characters) the assistant speaks.

        Raises ValueError where the template refuses the conversation, or does not tell who speaks where.
        """
        if self._marked:
            self._spans = spans = []
            return self._text(messages, tools), spans
        text = self._text(messages, tools)
        return text, list(self._by_prefixes(text, messages, tools))

    def _by_prefixes(self, text: str, messages: list[Message], tools: Any) -> Iterator[Span]:
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._text(messages[:index], tools, prompt=True)
            after = self._text(messages[: index + 1], tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template must tell what the assistant said, got one that renders message {index + 1} "
                    "otherwise when more follow, or otherwise than its own prompt: mark it with {% generation %}"
                )
            yield len(before), len(after.rstrip())

    def _text(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        self._written = []
        try:
            # Piece by piece: the place of a generation block is the length of what is written before it.
            for piece in self._template.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.tokens
            ):
                self._written.append(piece)
            return "".join(self._written)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            words = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"the chat template refuses the conversation: {words}") from None
        finally:
            self._written = None

    def mark(self, said: str) -> None:
        """Called by the generation tag with what is inside."""
        start = sum(map(len, self._written or ()))
        self._spans.append((start, start + len(said)))


def _compile(text: str, owner: ChatTemplate) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            said = caller()
            owner.mark(said)
            return said

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes what HTML would read.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"a chat template must be Jinja, got an error in line {error.lineno}: {error.message}"
        ) from None
