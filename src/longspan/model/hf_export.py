"""`DecoderConfig` to Hugging Face's config.json. What an architecture has no words for is refused by name."""

from __future__ import annotations

from typing import Any

from longspan.mixers.config import RotaryConfig
from longspan.model.config import DecoderConfig, LearnedPositionsConfig
from longspan.model.hf_configs import write_rotary


def demand(name: str, **facts: bool) -> None:
    """Raises for the first fact that is false; its keyword is the rule."""
    for rule, ok in facts.items():
        if not ok:
            raise ValueError(f"{name} cannot hold this model: it needs {rule.replace('_', ' ')}")


def _common(config: DecoderConfig, name: str, model_type: str, *, moe: bool = False) -> dict[str, Any]:
    attention = config.attention
    demand(
        name,
        **{"a_mixture_of_experts" if moe else "an_mlp_in_every_layer": (config.moe is not None) == moe},
        sequential_wiring=config.wiring == "sequential",
        the_usual_attention_scale=attention.scale in (None, attention.head_dim**-0.5),
        attention_without_softcap=attention.softcap is None,
        norms_on_q_and_k_by_their_weight=attention.qk_norm_kind == "rms",
        one_rotation_for_all_layers=config.windowed_positions is None,
        an_embedding_without_a_factor=config.embed_scale is None,
        logits_without_softcap=config.final_softcap is None,
    )
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
    }


def llama_like(
    config: DecoderConfig, name: str, model_type: str, *, qkv_bias_alone: bool = False, moe: bool = False
) -> dict[str, Any]:
    """What Llama and its descendants share; `qkv_bias_alone`: biases on q, k and v, none on attention's output."""
    attention, positions = config.attention, config.positions
    demand(name, rotary_positions=isinstance(positions, RotaryConfig))
    assert isinstance(positions, RotaryConfig)
    demand(
        name,
        a_swiglu_mlp=config.mlp.kind == "swiglu",
        RMS_norms=config.norm.kind == "rms",
    )
    if qkv_bias_alone:
        demand(name, biases_on_q_k_v_alone=attention.qkv_bias and not attention.out_bias)
    else:
        demand(name, attention_biases_everywhere_or_nowhere=attention.qkv_bias == attention.out_bias)
    return _common(config, name, model_type, moe=moe) | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.inner_size,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        **write_rotary(positions),
    }


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. Raises ValueError naming what Llama has no words for."""
    name = "LlamaForCausalLM"
    values = llama_like(config, name, "llama")
    demand(
        name,
        full_attention_in_every_layer=not any(config.windows),
        no_norm_on_q_and_k=config.attention.qk_norm_eps is None,
        hidden_size_to_be_a_multiple_of_num_heads=config.hidden_size % config.attention.num_heads == 0,
    )
    return values | {"attention_bias": config.attention.qkv_bias, "mlp_bias": config.mlp.bias}


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a MistralForCausalLM. Raises ValueError naming what Mistral has no words for."""
    name = "MistralForCausalLM"
    values = llama_like(config, name, "mistral")
    demand(
        name,
        one_window_for_all_layers=len(set(config.windows)) <= 1,
        no_norm_on_q_and_k=config.attention.qk_norm_eps is None,
        no_biases=not (config.attention.qkv_bias or config.mlp.bias),
    )
    return values | {"sliding_window": config.window(0)}


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Qwen2ForCausalLM. Raises ValueError naming what Qwen2 has no words for."""
    name = "Qwen2ForCausalLM"
    values = llama_like(config, name, "qwen2", qkv_bias_alone=True)
    demand(name, no_norm_on_q_and_k=config.attention.qk_norm_eps is None, an_mlp_without_biases=not config.mlp.bias)
    return values | _qwen_windows(config, name)


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Qwen3ForCausalLM. Raises ValueError naming what Qwen3 has no words for."""
    name = "Qwen3ForCausalLM"
    values = llama_like(config, name, "qwen3")
    demand(
        name,
        norms_on_q_and_k_with_the_eps_of_the_other_norms=config.attention.qk_norm_eps == config.norm.eps,
        an_mlp_without_biases=not config.mlp.bias,
    )
    return values | {"attention_bias": config.attention.qkv_bias} | _qwen_windows(config, name)


def _qwen_windows(config: DecoderConfig, name: str) -> dict[str, Any]:
    windows = [config.window(layer) for layer in range(config.num_layers)]
    sizes = {window for window in windows if window is not None}
    demand(name, one_size_of_window=len(sizes) <= 1)
    if not sizes:
        return {"use_sliding_window": False}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    # Only `layer_types` decides where it stands; older transformers read the number of leading full layers.
    leading = kinds.index("sliding_attention")
    return {
        "use_sliding_window": True,
        "sliding_window": sizes.pop(),
        "max_window_layers": leading,
        "layer_types": kinds,
    }


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel. Raises ValueError naming what GPT-2 has no words for."""
    name, attention, positions = "GPT2LMHeadModel", config.attention, config.positions
    values = _common(config, name, "gpt2")
    demand(name, learned_positions=isinstance(positions, LearnedPositionsConfig))
    demand(
        name,
        a_gelu_mlp=config.mlp.kind in _GPT2_ACTIVATIONS,
        layer_norms=config.norm.kind == "layer",
        biases_everywhere=attention.qkv_bias and attention.out_bias and config.mlp.bias,
        as_many_KV_heads_as_query_heads=attention.kv_heads == attention.num_heads,
        no_norm_on_q_and_k=attention.qk_norm_eps is None,
        full_attention_in_every_layer=not any(config.windows),
        head_dim_times_num_heads_to_be_the_hidden_size=attention.head_dim * attention.num_heads == config.hidden_size,
    )
    return values | {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": attention.num_heads,
        "n_inner": config.mlp.inner_size,
        "n_positions": positions.max_positions,
        "activation_function": _GPT2_ACTIVATIONS[config.mlp.kind],
        "layer_norm_epsilon": config.norm.eps,
    }


_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
