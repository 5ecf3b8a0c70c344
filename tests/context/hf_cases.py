"""Small random models of transformers, batches and ways to split them, for the tests of `hf_attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from longspan.attention import masks
from longspan.context.hf_attention import IGNORED

VOCAB, NUM_TOKENS = 61, 23  # which neither 2 nor 3 ranks divide
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Large enough that every part moves the loss by more than the tolerance.
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 5}
MIXED = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}


class Case(NamedTuple):
    """A model, a batch and a way to split it."""

    name: str
    model: str = "Llama"
    config: dict[str, Any] = SMALL  # or what differs from it
    method: str = "auto"
    layout: str | None = None
    documents: tuple[int, ...] = (NUM_TOKENS,)
    rows: int = 1
    ignored: float = 0.0  # of the labels
    prefix: int | None = None
    checkpointing: bool = False

    def build(self) -> Any:
        torch.manual_seed(3)
        config = getattr(transformers, f"{self.model}Config")(**SMALL | self.config)
        model = getattr(transformers, f"{self.model}ForCausalLM")(config)
        # Norms that start at one would hide a norm that is left out.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        shape = self.rows, NUM_TOKENS
        ids = torch.randint(0, VOCAB, shape, generator=generator)
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < self.ignored, IGNORED)
        positions = torch.cat([torch.arange(n) for n in self.documents])
        return {"input_ids": ids, "labels": labels, "position_ids": positions.expand(shape)}

    def mask(self) -> masks.Mask | None:
        return None if self.prefix is None else masks.prefix_lm(NUM_TOKENS, self.prefix)


def small_config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**SMALL | changes)


def small_model(model: str = "Llama", **config: Any) -> Any:
    return Case("", model, config).build()
