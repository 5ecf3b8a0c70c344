"""Decoders and encoders from parts, and Hugging Face checkpoints. Names load on first use, and torch with them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.model.config import DecoderConfig
    from longspan.model.decoder import DecoderLM
    from longspan.model.encoder import Encoder
    from longspan.model.encoder_config import EncoderConfig
    from longspan.model.huggingface import load_pretrained, save_pretrained

__all__ = ["DecoderConfig", "DecoderLM", "Encoder", "EncoderConfig", "load_pretrained", "save_pretrained"]

_HOMES = {
    "DecoderConfig": "longspan.model.config",
    "DecoderLM": "longspan.model.decoder",
    "Encoder": "longspan.model.encoder",
    "EncoderConfig": "longspan.model.encoder_config",
    "load_pretrained": "longspan.model.huggingface",
    "save_pretrained": "longspan.model.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
