"""The architectures of Hugging Face that are understood: what each builds, how its config is read and written, and the
names of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from longspan.model import hf_configs, hf_encoders, hf_export, hf_gemma, hf_moe
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM
from longspan.model.encoder import Encoder
from longspan.model.encoder_config import EncoderConfig
from longspan.model.hf_names import Stored, gpt2_names, llama_names


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One published architecture, and the class that it builds from a config of type `config`.

    `prefix` stands before the names of a causal LM and is absent in checkpoints of the bare model; `ignored` matches
    stored tensors that hold no weight of this model: buffers that old versions wrote, and heads of other tasks.
    `tied` are tensors that some files hold twice, each with the parameter that it must equal; `renamed` are regular
    expressions of old names and what stands there today.
    """

    model_type: str
    read: Callable[[hf_configs.Keys], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], list[Stored]]
    prefix: str = "model."
    ignored: str = r"rotary_emb\.inv_freq$"
    model: type[nn.Module] = DecoderLM
    config: type = DecoderConfig
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "embed.weight"),)
    renamed: tuple[tuple[str, str], ...] = ()


_GAMMA_BETA = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

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
    "Gemma2ForCausalLM": Architecture(
        model_type="gemma2", read=hf_gemma.read_gemma2, write=hf_gemma.write_gemma2, names=hf_gemma.gemma_names
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text", read=hf_gemma.read_gemma3, write=hf_gemma.write_gemma3, names=hf_gemma.gemma_names
    ),
    "GPT2LMHeadModel": Architecture(
        model_type="gpt2",
        read=hf_configs.read_gpt2,
        write=hf_export.write_gpt2,
        names=gpt2_names,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",
    ),
    "BertForMaskedLM": Architecture(
        model_type="bert",
        read=hf_encoders.read_bert_masked,
        write=hf_encoders.write_bert_masked,
        names=hf_encoders.bert_masked_names,
        prefix="bert.",
        ignored=r"embeddings\.position_ids$|^bert\.pooler\.|^cls\.seq_relationship\.",
        model=Encoder,
        config=EncoderConfig,
        tied=(
            ("cls.predictions.decoder.weight", "inputs.embed.weight"),
            ("cls.predictions.decoder.bias", "head.bias"),
        ),
        renamed=_GAMMA_BETA,
    ),
    "BertModel": Architecture(
        model_type="bert",
        read=hf_encoders.read_bert,
        write=hf_encoders.write_bert,
        names=hf_encoders.bert_names,
        prefix="bert.",
        ignored=r"embeddings\.position_ids$",
        model=Encoder,
        config=EncoderConfig,
        renamed=_GAMMA_BETA,
    ),
    "ViTForImageClassification": Architecture(
        model_type="vit",
        read=hf_encoders.read_vit,
        write=hf_encoders.write_vit,
        names=hf_encoders.vit_names,
        prefix="vit.",
        ignored=r"^vit\.pooler\.",
        model=Encoder,
        config=EncoderConfig,
    ),
}


def architectures_of(config: DecoderConfig | EncoderConfig) -> dict[str, Architecture]:
    """The architectures whose configs are of this type."""
    return {name: entry for name, entry in ARCHITECTURES.items() if entry.config is type(config)}
