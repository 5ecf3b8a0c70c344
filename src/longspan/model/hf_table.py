"""The architectures of Hugging Face that are understood: how a config is read and written, and the names of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longspan.model import hf_configs, hf_export, hf_moe
from longspan.model.config import DecoderConfig
from longspan.model.hf_names import Stored, gpt2_names, llama_names


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One published architecture.

    `prefix` stands before the names of a causal LM and is absent in checkpoints of the bare model; `ignored` matches
    stored tensors that old versions wrote and that hold no weight.
    """

    model_type: str
    read: Callable[[hf_configs.Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: Callable[[DecoderConfig], list[Stored]]
    prefix: str = "model."
    ignored: str = r"rotary_emb\.inv_freq$"


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", read=hf_configs.read_llama, write=hf_export.write_llama, names=llama_names
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral", read=hf_configs.read_mistral, write=hf_export.write_mistral, names=llama_names
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3", read=hf_configs.read_qwen3, write=hf_export.write_qwen3, names=llama_names
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", read=hf_configs.read_qwen2, write=hf_export.write_qwen2, names=llama_names
    ),
    "MixtralForCausalLM": Architecture(
        model_type="mixtral", read=hf_moe.read_mixtral, write=hf_moe.write_mixtral, names=hf_moe.mixtral_names
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_type="qwen3_moe", read=hf_moe.read_qwen3_moe, write=hf_moe.write_qwen3_moe, names=hf_moe.qwen3_moe_names
    ),
    "GPT2LMHeadModel": Architecture(
        model_type="gpt2",
        read=hf_configs.read_gpt2,
        write=hf_export.write_gpt2,
        names=gpt2_names,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",
    ),
}
