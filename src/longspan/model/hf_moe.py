"""Mixtral and Qwen3-MoE of Hugging Face: config.json and tensor names, both ways.

An expert's matrices are tensors of their own there (transformers 5 stacks them in memory and still writes them singly),
and each is one entry of a stack of ours. The balance of experts concerns training alone: `output_router_logits` true is
balance "aux_pooled", with `router_aux_loss_coef` for its coefficient; false is "none", and so is an "aux" of ours
written. A selection bias and a capacity change logits, and these architectures have no words for them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

from longspan.model.config import DecoderConfig, MoeConfig
from longspan.model.hf_configs import Keys, mistral_windows, read_llama_like
from longspan.model.hf_export import demand, llama_like
from longspan.model.hf_names import Stored, llama_names, mlp_names


def _read_balance(keys: Keys, absent: float = 0.001) -> dict[str, Any]:
    pooled, coef = keys.flag("output_router_logits", False), keys.number("router_aux_loss_coef", absent)
    return {"balance": "aux_pooled", "aux_coef": coef} if pooled else {}


def _write_balance(moe: MoeConfig) -> dict[str, Any]:
    if moe.balance != "aux_pooled":
        return {"output_router_logits": False}
    return {"output_router_logits": True, "router_aux_loss_coef": moe.aux_coef}


def read_mixtral(keys: Keys) -> DecoderConfig:
    """MixtralForCausalLM: experts in every layer, chosen softmax scores divided by their sum."""
    keys.only("model_type", "mixtral")
    keys.only("router_jitter_noise", 0)
    found = {
        "num_experts": keys.whole("num_local_experts", 8),
        "experts_per_token": keys.whole("num_experts_per_tok", 2),
        **_read_balance(keys),
    }
    config = read_llama_like(
        keys,
        positions=131072,
        kv_heads=8,
        head_dim=None,
        biases=False,
        mlp_bias=False,
        qk_norm=False,
        windows=partial(mistral_windows, absent=None),
        default_eps=1e-5,
        default_theta=1e6,
    )
    return dataclasses.replace(config, moe=MoeConfig(inner_size=config.mlp.inner_size, **found))


def read_qwen3_moe(keys: Keys) -> DecoderConfig:
    """Qwen3MoeForCausalLM: norms on q and k; mlps in `mlp_only_layers` and between steps of `decoder_sparse_step`."""
    keys.only("model_type", "qwen3_moe")
    name = "num_local_experts" if keys.has("num_local_experts") else "num_experts"
    moe = MoeConfig(
        num_experts=keys.whole(name, 128),
        experts_per_token=keys.whole("num_experts_per_tok", 8),
        inner_size=keys.whole("moe_intermediate_size", 768),
        renormalise=keys.flag("norm_topk_prob", False),
        **_read_balance(keys),
    )
    keys.only("num_experts", moe.num_experts)  # transformers 5 writes it under the other name
    only, step = keys.take("mlp_only_layers", list, []), keys.whole("decoder_sparse_step", 1)
    if step < 1:
        raise ValueError(f"'decoder_sparse_step' must be at least 1, got {step}: is the config whole?")
    config = read_llama_like(
        keys,
        positions=32768,
        kv_heads=4,
        head_dim=None,
        biases=True,
        mlp_bias=False,
        qk_norm=True,
        windows=_qwen3_moe_windows,
    )
    dense = tuple(i for i in range(config.num_layers) if i in only or (i + 1) % step)
    return dataclasses.replace(config, moe=moe, dense_layers=dense)


def _qwen3_moe_windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    use = keys.flag("use_sliding_window", False)
    keys.whole("max_window_layers", 0)  # not read by transformers either
    windows = mistral_windows(keys, num_layers)
    return windows if use else ()


def write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a MixtralForCausalLM. Raises ValueError naming what Mixtral has no words for."""
    name = "MixtralForCausalLM"
    values, moe = _values(config, name, "mixtral")
    demand(
        name,
        experts_in_every_layer=not config.dense_layers,
        chosen_scores_divided_by_their_sum=moe.renormalise,
        no_norm_on_q_and_k=config.attention.qk_norm_eps is None,
        no_biases=not config.attention.qkv_bias,
    )
    return values | {
        "intermediate_size": moe.inner_size,
        "num_local_experts": moe.num_experts,
        "sliding_window": config.window(0),
    }


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Qwen3MoeForCausalLM. Raises ValueError naming what Qwen3-MoE has no words for."""
    name = "Qwen3MoeForCausalLM"
    values, moe = _values(config, name, "qwen3_moe")
    demand(
        name,
        norms_on_q_and_k_with_the_eps_of_the_other_norms=config.attention.qk_norm_eps == config.norm.eps,
        an_mlp_without_biases=not (config.dense_layers and config.mlp.bias),
    )
    return values | {
        "attention_bias": config.attention.qkv_bias,
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.inner_size,
        "norm_topk_prob": moe.renormalise,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
        "use_sliding_window": bool(config.windows),
        "sliding_window": config.window(0),
    }


def _values(config: DecoderConfig, name: str, model_type: str) -> tuple[dict[str, Any], MoeConfig]:
    values, moe = llama_like(config, name, model_type, moe=True), config.moe
    assert moe is not None
    demand(
        name,
        softmax_scores=moe.score == "softmax",
        experts_without_a_shared_one=not moe.shared_inner_size,
        a_choice_without_a_bias=moe.balance != "bias",
        no_capacity=moe.capacity_factor is None,
        one_window_for_all_layers=len(set(config.windows)) <= 1,
    )
    return values | {"num_experts_per_tok": moe.experts_per_token, **_write_balance(moe)}, moe


class _Words(NamedTuple):
    """How an architecture names the mixture of a layer, and an expert's gate, up and down."""

    mixture: str
    gate: str
    up: str
    down: str


def _sparse_names(theirs: str, ours: str, config: DecoderConfig, layer: int, *, words: _Words) -> list[Stored]:
    if layer in config.dense_layers or config.moe is None:
        return mlp_names(theirs, ours, config, layer)
    stored = [Stored(name=f"{theirs}.{words.mixture}.gate.weight", ours=(f"{ours}.mlp.router.weight",))]
    for name in ("gate", "up", "down"):
        for index in range(config.moe.num_experts):
            expert = f"{theirs}.{words.mixture}.experts.{index}.{getattr(words, name)}.weight"
            stored.append(Stored(name=expert, ours=(f"{ours}.mlp.experts.{name}",), index=index))
    return stored


def mixtral_names(config: DecoderConfig) -> list[Stored]:
    """Names of Mixtral."""
    return llama_names(config, partial(_sparse_names, words=_Words("block_sparse_moe", "w1", "w3", "w2")))


def qwen3_moe_names(config: DecoderConfig) -> list[Stored]:
    """Names of Qwen3-MoE."""
    return llama_names(config, partial(_sparse_names, words=_Words("mlp", "gate_proj", "up_proj", "down_proj")))
