"""Gemma 2 and the text models of Gemma 3 in Hugging Face's words: their configs, both ways, and their tensors' names.

Gemma 3's windowed layers rotate by a base of their own, without the scaling of the others. transformers 5 writes both
under `rope_parameters`, 4 wrote `rope_theta`, `rope_local_base_freq` and `rope_scaling`; both are read, and the latter,
which both versions read, are written.
"""

from __future__ import annotations

from typing import Any

from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model.config import DecoderConfig, MlpConfig, NormConfig
from longspan.model.hf_configs import Keys, read_rotary, windows_by_kind, write_rotary
from longspan.model.hf_export import demand
from longspan.model.hf_names import Stored, llama_names

_ACTIVATION = "gelu_pytorch_tanh"
_LOCAL_THETA = 10000.0


def read_gemma2(keys: Keys) -> DecoderConfig:
    """Gemma2ForCausalLM: softcaps on scores and logits, a window in every other layer."""
    keys.only("model_type", "gemma2")
    softcap = keys.number("attn_logit_softcapping", None if keys.has("attn_logit_softcapping") else 50.0)
    cap = keys.number("final_logit_softcapping", None if keys.has("final_logit_softcapping") else 30.0)
    return _read(keys, read_rotary(keys, 8192), None, pattern=2, qk_norm=False, softcap=softcap, final_softcap=cap)


def read_gemma3(keys: Keys) -> DecoderConfig:
    """Gemma3ForCausalLM: norms on q and k, a window in five layers of six, with a rotation of their own."""
    keys.only("model_type", "gemma3_text")
    # transformers reads this key and then does not apply it, so that no value has a meaning.
    keys.only("attn_logit_softcapping")
    final_softcap = keys.number("final_logit_softcapping", None)
    pattern = keys.whole("sliding_window_pattern", keys.whole("_sliding_window_pattern", 6))
    if pattern < 1:
        raise ValueError(f"'sliding_window_pattern' must be at least 1, got {pattern}: Gemma 3 has 6")
    positions, windowed = _read_rotary_pair(keys)
    return _read(keys, positions, windowed, pattern=pattern, qk_norm=True, softcap=None, final_softcap=final_softcap)


def _read(
    keys: Keys,
    positions: RotaryConfig,
    windowed: RotaryConfig | None,
    *,
    pattern: int,
    qk_norm: bool,
    softcap: float | None,
    final_softcap: float | None,
) -> DecoderConfig:
    keys.only("hidden_act", _ACTIVATION)
    keys.only("hidden_activation", _ACTIVATION)
    keys.only("use_bidirectional_attention", False)
    num_layers, width, eps = (
        keys.whole("num_hidden_layers"),
        keys.whole("hidden_size"),
        keys.number("rms_norm_eps", 1e-6),
    )
    scalar = keys.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise ValueError(f"'query_pre_attn_scalar' must be positive, got {scalar}: it is head_dim in most models")
    bias = keys.flag("attention_bias", False)
    windows = _windows(keys, num_layers, pattern)
    config = DecoderConfig(
        num_layers=num_layers,
        hidden_size=width,
        vocab_size=keys.whole("vocab_size"),
        attention=AttentionConfig(
            num_heads=keys.whole("num_attention_heads"),
            num_kv_heads=keys.whole("num_key_value_heads", 4),
            head_dim=keys.whole("head_dim", 256),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm_eps=eps if qk_norm else None,
            qk_norm_kind="rms_plus_one" if qk_norm else "rms",
            scale=scalar**-0.5,
            softcap=softcap,
        ),
        mlp=MlpConfig(kind="geglu_tanh", inner_size=keys.whole("intermediate_size")),
        norm=NormConfig(kind="rms_plus_one", eps=eps),
        positions=positions,
        wiring="sandwich",
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        windows=windows,
        init_std=keys.number("initializer_range", 0.02) or 0.02,
        windowed_positions=windowed if windows and windowed != positions else None,
        embed_scale=width**0.5,
        final_softcap=final_softcap,
    )
    keys.finish()
    return config


def _windows(keys: Keys, num_layers: int, pattern: int) -> tuple[int | None, ...]:
    window = keys.whole("sliding_window", None if keys.has("sliding_window") else 4096)
    windowed = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return windows_by_kind(keys, window, windowed, "a 'sliding_window', got none: give it, or full layers")


def _read_rotary_pair(keys: Keys) -> tuple[RotaryConfig, RotaryConfig]:
    """Positions of the full layers and of those with a window."""
    max_positions = keys.whole("max_position_embeddings", 131072)
    theta, local_theta = keys.number("rope_theta", None), keys.number("rope_local_base_freq", None)
    scaling, new = keys.take("rope_scaling", dict, None), keys.take("rope_parameters", dict, None)
    if scaling and new:
        raise ValueError(
            f"config.json has both 'rope_scaling' and 'rope_parameters', got {scaling!r} and {new!r}: keep one"
        )
    nested = Keys(new or {}, "the rope parameters of config.json")
    full, windowed = (nested.take(kind, dict, {}) for kind in ("full_attention", "sliding_attention"))
    nested.finish()

    def rotary(values: dict[str, Any], outer: float | None, default: float) -> RotaryConfig:
        if outer is None and "rope_theta" not in values:
            outer = default
        known = {"max_position_embeddings": max_positions, "rope_parameters": values, "rope_theta": outer}
        return read_rotary(Keys(known), max_positions)

    return rotary(scaling or full, theta, 1_000_000.0), rotary(windowed, local_theta, _LOCAL_THETA)


def _write(config: DecoderConfig, name: str, model_type: str) -> dict[str, Any]:
    attention, positions = config.attention, config.positions
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    scalar = round(scale**-2)
    sizes = {window for window in config.windows if window is not None}
    demand(name, rotary_positions=isinstance(positions, RotaryConfig))
    assert isinstance(positions, RotaryConfig)
    demand(
        name,
        sandwich_wiring=config.wiring == "sandwich",
        RMS_norms_of_1_plus_the_weight=config.norm.kind == "rms_plus_one",
        a_geglu_tanh_mlp_without_biases=config.mlp.kind == "geglu_tanh" and not config.mlp.bias,
        an_embedding_scaled_by_the_root_of_hidden_size=config.embed_scale == config.hidden_size**0.5,
        attention_biases_everywhere_or_nowhere=attention.qkv_bias == attention.out_bias,
        hidden_size_to_be_a_multiple_of_num_heads=config.hidden_size % attention.num_heads == 0,
        an_attention_scale_of_1_over_the_root_of_a_whole_number=scalar > 0 and scalar**-0.5 == scale,
        one_size_of_window=len(sizes) <= 1,
    )
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.inner_size,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.final_softcap,
        "hidden_activation": _ACTIVATION,
        "rms_norm_eps": config.norm.eps,
        "sliding_window": sizes.pop() if sizes else 4096,
        "layer_types": [
            "full_attention" if config.window(layer) is None else "sliding_attention"
            for layer in range(config.num_layers)
        ],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        **write_rotary(positions),
    }


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Gemma2ForCausalLM. Raises ValueError naming what Gemma 2 has no words for."""
    name = "Gemma2ForCausalLM"
    values = _write(config, name, "gemma2")
    demand(
        name,
        one_rotation_for_all_layers=config.windowed_positions is None,
        no_norm_on_q_and_k=config.attention.qk_norm_eps is None,
    )
    return values


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Gemma3ForCausalLM. Raises ValueError naming what Gemma 3 has no words for."""
    name, attention, positions = "Gemma3ForCausalLM", config.attention, config.positions
    values = _write(config, name, "gemma3_text")
    windowed = config.windowed_positions or positions
    assert isinstance(windowed, RotaryConfig)
    demand(
        name,
        norms_on_q_and_k_like_the_other_norms=(attention.qk_norm_eps, attention.qk_norm_kind)
        == (config.norm.eps, config.norm.kind),
        attention_without_softcap=attention.softcap is None,
        no_rope_scaling_in_layers_with_a_window=windowed.scaling is None or not any(config.windows),
    )
    return values | {"rope_local_base_freq": windowed.theta if any(config.windows) else _LOCAL_THETA}


_NORMS = {
    "input_layernorm": "norm_mixer",
    "post_attention_layernorm": "norm_mixer_out",
    "pre_feedforward_layernorm": "norm_mlp",
    "post_feedforward_layernorm": "norm_mlp_out",
}


def gemma_names(config: DecoderConfig) -> list[Stored]:
    """Names of Gemma 2 and 3: Llama's, but for the four norms of a block."""
    return llama_names(config, norms=_NORMS)
