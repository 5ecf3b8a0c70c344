"""Small conversations, three chat templates, and a tokenizer folder that has one of them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}\n"
    "        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
# The same text, and the assistant's part of it marked.
CHATML_MARKED = CHATML.replace(
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n",
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {%- if message['role'] == 'assistant' %}{% generation %}"
    "{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n"
    "    {%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}\n",
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- set loop_messages = messages %}\n"
    "{%- for message in loop_messages %}\n"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}\n"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim }}{{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
)
LLAMA3_MARKED = LLAMA3.replace(
    "{{- message['content'] | trim }}{{- '<|eot_id|>' }}\n",
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim }}{{- '<|eot_id|>' }}"
    "{% endgeneration %}{%- else %}{{- message['content'] | trim }}{{- '<|eot_id|>' }}{%- endif %}\n",
)
# As some templates do, it says which answer was the last one: earlier ones change once others follow.
FORGETFUL = CHATML.replace("message['content'] +", "(message['content'] if loop.last else message['content'][:3]) +")

TURNS = [
    [("user", "what turns?"), ("assistant", "the ring turns")],
    [("system", "Be brief."), ("user", "and the ranks?"), ("assistant", "they wait"), ("user", "why"),
     ("assistant", "for keys, naïvely: 日本")],
    [("user", "two\n\nlines  "), ("assistant", "\n one\n\ntwo"), ("user", "<|im_end|> in words")],
]  # fmt: skip
MESSAGES = [[{"role": role, "content": content} for role, content in turns] for turns in TURNS]
_SPECIAL = [
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def chat_tokenizer(folder: Path, template: str | None, *, apart: bool = False) -> Path:
    """A tokenizer folder as models have it; the template in its config, or in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        ["the ring turns and the ranks wait for the keys\n\n", "assistant user system"] * 4, trainer
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "clean_up_tokenization_spaces": False,
    }
    if apart and template is not None:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_chats(file: Path, conversations: list[list[dict[str, str]]] | None = None, copies: int = 1) -> Path:
    """A line a conversation."""
    lines = [json.dumps({"messages": messages, "id": 7}) for messages in conversations or MESSAGES] * copies
    file.write_text("".join(f"{line}\n" for line in lines))
    return file
