"""Hugging Face's config.json to `DecoderConfig` and back.

A reader takes each key it understands; what is left over must be in `HARMLESS` or null, or the checkpoint is refused by
that key's name: an unknown key may change the maths. Dropout rates count as harmless, for longspan applies no dropout.
transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`; both are read, and the latter, which
both versions read, is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longspan.mixers.config import (
    AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RotaryConfig,
    YarnScaling,
)
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, MlpKind, NormConfig

# Keys that do not change what the model computes: provenance, tokens, generation, dropout, heads of other tasks,
# choices of code path.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "attn_pdrop",
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_llama_config",
        "label2id",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)
_REQUIRED = object()


class Keys:
    """The keys of one config, taken one by one; `finish` refuses those that nobody took."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self._left = dict(values)
        self._where = where

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The value of `key`, or `default` where it is absent or null."""
        value = self._left.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self._where} lacks {key!r}, which this architecture needs: is the file complete?")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self._where} has a value of a wrong type for {key!r}, got {value!r}: mend the file")
        return value

    def has(self, key: str) -> bool:
        """Whether the file holds `key`, even as null."""
        return key in self._left

    def whole(self, key: str, default: Any = _REQUIRED) -> Any:
        """An integer."""
        return self.take(key, int, default)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A float."""
        value = self.take(key, (int, float), default)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self.take(key, bool, default)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses any value of `key` but the allowed ones (absent or null is allowed)."""
        value = self._left.pop(key, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self._where}: {key!r} must be {' or '.join(map(repr, allowed))} here, got {value!r}: "
                "longspan does not compute this variant"
            )

    def finish(self) -> None:
        """Raises ValueError naming the keys that are neither understood nor harmless nor null."""
        unknown = sorted(key for key, value in self._left.items() if value is not None and key not in HARMLESS)
        if unknown:
            pairs = ", ".join(f"{key!r} = {self._left[key]!r}" for key in unknown)
            raise ValueError(
                f"{self._where} may hold only keys that longspan understands, got {pairs[:300]}: "
                "remove a key only if it does not change what the model computes"
            )


def read_rotary(keys: Keys, default_max_positions: int, default_theta: float = 10000.0) -> RotaryConfig:
    """Rotary positions from either generation of keys."""
    keys.only("partial_rotary_factor", 1)
    keys.only("rope_interleaved", False)
    max_positions = keys.whole("max_position_embeddings", default_max_positions)
    outer_theta = keys.number("rope_theta", None)
    old, new = keys.take("rope_scaling", dict, None), keys.take("rope_parameters", dict, None)
    if old and new and old != new:
        raise ValueError(
            f"config.json has both 'rope_scaling' and 'rope_parameters', got {old!r} and {new!r}: keep one"
        )
    rope = Keys(old or new or {}, "the rope parameters of config.json")
    legacy = rope.take("type", str, "default")
    kind = rope.take("rope_type", str, legacy)
    theta = rope.number("rope_theta", None)
    if theta is not None and outer_theta is not None and theta != outer_theta:
        raise ValueError(f"config.json has two values for 'rope_theta', got {outer_theta!r} and {theta!r}: keep one")
    rope.only("partial_rotary_factor", 1)
    if kind not in _SCALING_READERS:
        raise ValueError(f"rope_type must be one of {', '.join(_SCALING_READERS)}, got {kind!r}: longspan has no other")
    scaling = _SCALING_READERS[kind](rope, max_positions)
    rope.finish()
    theta = outer_theta if theta is None else theta
    return RotaryConfig(theta=default_theta if theta is None else theta, max_positions=max_positions, scaling=scaling)


def _read_llama3(rope: Keys, max_positions: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.whole("original_max_position_embeddings", max_positions),
    )


def _read_yarn(rope: Keys, max_positions: int) -> YarnScaling:
    return YarnScaling(
        factor=rope.number("factor"),
        original_max_positions=rope.whole("original_max_position_embeddings", max_positions),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", None),
        mscale=rope.number("mscale", None),
        mscale_all_dim=rope.number("mscale_all_dim", None),
        truncate=rope.flag("truncate", True),
    )


_SCALING_READERS: dict[str, Callable[[Keys, int], RopeScaling | None]] = {
    "default": lambda rope, max_positions: None,
    "linear": lambda rope, max_positions: LinearScaling(factor=rope.number("factor")),
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def write_rotary(positions: RotaryConfig) -> dict[str, Any]:
    """The keys of rotary positions, as transformers 4 and 5 read them."""
    scaling = positions.scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if not isinstance(scaling, LinearScaling):
            rope["original_max_position_embeddings"] = scaling.original_max_positions
        if isinstance(scaling, Llama3Scaling):
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if isinstance(scaling, YarnScaling):
            names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
            rope |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}
    return {
        "max_position_embeddings": positions.max_positions,
        "rope_theta": positions.theta,
        "rope_scaling": rope,
    }


def read_llama_like(
    keys: Keys,
    *,
    positions: int,
    kv_heads: int | None,
    head_dim: int | None,
    biases: bool,
    mlp_bias: bool,
    qk_norm: bool,
    windows: Callable[[Keys, int], tuple[int | None, ...]],
    qkv_bias: bool = False,
    default_eps: float = 1e-6,
    default_theta: float = 10000.0,
) -> DecoderConfig:
    """What Llama and its descendants share; `biases`: a key says whether attention has them, else only q, k, v may."""
    keys.only("hidden_act", "silu")
    num_layers, width, heads = (keys.whole(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if heads < 1:
        raise ValueError(f"'num_attention_heads' must be at least 1, got {heads}: is the config whole?")
    eps = keys.number("rms_norm_eps", default_eps)
    bias = keys.flag("attention_bias", False) if biases else False
    if kv_heads is None or keys.has("num_key_value_heads"):
        kv_heads = heads  # null, unlike an absent key, means one for each query head
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=keys.whole("num_key_value_heads", kv_heads),
        head_dim=keys.whole("head_dim", head_dim or width // heads),
        qkv_bias=bias or qkv_bias,
        out_bias=bias,
        qk_norm_eps=eps if qk_norm else None,
    )
    config = DecoderConfig(
        num_layers=num_layers,
        hidden_size=width,
        vocab_size=keys.whole("vocab_size"),
        attention=attention,
        mlp=MlpConfig(
            kind="swiglu",
            inner_size=keys.whole("intermediate_size"),
            bias=keys.flag("mlp_bias", False) if mlp_bias else False,
        ),
        norm=NormConfig(kind="rms", eps=eps),
        positions=read_rotary(keys, positions, default_theta),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        windows=windows(keys, num_layers),
        init_std=keys.number("initializer_range", 0.02) or 0.02,
    )
    keys.finish()
    return config


def read_llama(keys: Keys) -> DecoderConfig:
    """LlamaForCausalLM: Llama 2, 3, 3.1, 3.2 and what is built like them."""
    keys.only("model_type", "llama")
    keys.only("pretraining_tp", 1)
    return read_llama_like(
        keys,
        positions=2048,
        kv_heads=None,
        head_dim=None,
        biases=True,
        mlp_bias=True,
        qk_norm=False,
        windows=lambda keys, num_layers: (),
    )


def read_mistral(keys: Keys) -> DecoderConfig:
    """MistralForCausalLM; absent, the window is 4096 as in transformers; null means none."""
    keys.only("model_type", "mistral")
    return read_llama_like(
        keys,
        positions=131072,
        kv_heads=8,
        head_dim=None,
        biases=False,
        mlp_bias=False,
        qk_norm=False,
        windows=mistral_windows,
    )


def mistral_windows(keys: Keys, num_layers: int, absent: int | None = 4096) -> tuple[int | None, ...]:
    """One window for all layers, or none."""
    window = keys.whole("sliding_window", None) if keys.has("sliding_window") else absent
    return () if window is None else (window,) * num_layers


def read_qwen2(keys: Keys) -> DecoderConfig:
    """Qwen2ForCausalLM: biases on q, k and v alone, windows in some layers where `use_sliding_window` says so."""
    keys.only("model_type", "qwen2")
    return read_llama_like(
        keys,
        positions=32768,
        kv_heads=32,
        head_dim=None,
        biases=False,
        mlp_bias=False,
        qk_norm=False,
        windows=_qwen_windows,
        qkv_bias=True,
    )


def read_qwen3(keys: Keys) -> DecoderConfig:
    """Qwen3ForCausalLM: norms on q and k, windows in some layers where `use_sliding_window` says so."""
    keys.only("model_type", "qwen3")
    return read_llama_like(
        keys,
        positions=32768,
        kv_heads=32,
        head_dim=128,
        biases=True,
        mlp_bias=False,
        qk_norm=True,
        windows=_qwen_windows,
    )


def _qwen_windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    use = keys.flag("use_sliding_window", False)
    window = keys.whole("sliding_window", None if keys.has("sliding_window") else 4096)
    window = window if use else None
    first = keys.whole("max_window_layers", 28)
    windowed = [window is not None and layer >= first for layer in range(num_layers)]
    return windows_by_kind(keys, window, windowed, "'use_sliding_window' and 'sliding_window', got none: give both")


def windows_by_kind(keys: Keys, window: int | None, windowed: list[bool], needs: str) -> tuple[int | None, ...]:
    """Windows of the layers by `layer_types`, or where that is absent of those that are `windowed`; () for none.

    `needs`: what is missing, and the remedy, where a layer has a window and there is none.
    """
    kinds = keys.take("layer_types", list, None)
    if kinds is None:
        kinds = ["sliding_attention" if one else "full_attention" for one in windowed]
    known = {"full_attention": None, "sliding_attention": window}
    wrong = [kind for kind in kinds if not isinstance(kind, str) or kind not in known]
    if wrong or len(kinds) != len(windowed):
        raise ValueError(
            f"'layer_types' must name full_attention or sliding_attention for each of {len(windowed)} layers, "
            f"got {wrong[0] if wrong else len(kinds)!r}: longspan has no other"
        )
    if window is None and "sliding_attention" in kinds:
        raise ValueError(f"'layer_types' with sliding_attention needs {needs}")
    windows = tuple(known[kind] for kind in kinds)
    return windows if any(windows) else ()


def read_gpt2(keys: Keys) -> DecoderConfig:
    """GPT2LMHeadModel: learned positions, LayerNorm, biases everywhere, a tied head."""
    keys.only("model_type", "gpt2")
    keys.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        keys.only(key, False)
    activation = keys.take("activation_function", str, "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(
            f"'activation_function' must be one of {', '.join(_GPT2_ACTIVATIONS)}, got {activation!r}: "
            "longspan has no other"
        )
    width, heads = keys.whole("n_embd"), keys.whole("n_head")
    config = DecoderConfig(
        num_layers=keys.whole("n_layer"),
        hidden_size=width,
        vocab_size=keys.whole("vocab_size"),
        attention=AttentionConfig(num_heads=heads, head_dim=width // heads, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind=_GPT2_ACTIVATIONS[activation], inner_size=keys.whole("n_inner", 4 * width), bias=True),
        norm=NormConfig(kind="layer", eps=keys.number("layer_norm_epsilon", 1e-5)),
        positions=LearnedPositionsConfig(max_positions=keys.whole("n_positions", 1024)),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02) or 0.02,
    )
    keys.finish()
    return config


_GPT2_ACTIVATIONS: dict[str, MlpKind] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
