"""BERT and ViT in Hugging Face's words: their configs, both ways, and their tensors' names."""

from __future__ import annotations

from typing import Any

from longspan.mixers.config import AttentionConfig
from longspan.model.config import MlpConfig, MlpKind, NormConfig
from longspan.model.encoder_config import EncoderConfig, Head, PatchesConfig, TokensConfig
from longspan.model.hf_configs import Keys
from longspan.model.hf_export import demand
from longspan.model.hf_names import Stored, weights

_READ: dict[str, MlpKind] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
# Of earlier code, and of heads that are not built here.
_BERT_HARMLESS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing")
_VIT_HARMLESS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_act", "label2id")


def _pass_over(keys: Keys, names: tuple[str, ...]) -> None:
    for name in names:
        keys.take(name, object, None)


def _common(keys: Keys) -> dict[str, Any]:
    width, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    if heads < 1 or width % heads:
        raise ValueError(
            f"'hidden_size' must be a multiple of 'num_attention_heads', got {width} and {heads}: is the config whole?"
        )
    name = keys.take("hidden_act", str, "gelu")
    if name not in _READ:
        raise ValueError(f"'hidden_act' must be one of {', '.join(_READ)}, got {name!r}: longspan has no other")
    return {
        "num_layers": keys.whole("num_hidden_layers"),
        "hidden_size": width,
        "attention": AttentionConfig(
            num_heads=heads, head_dim=width // heads, qkv_bias=keys.flag("qkv_bias", True), out_bias=True
        ),
        "mlp": MlpConfig(kind=_READ[name], inner_size=keys.whole("intermediate_size"), bias=True),
        "norm": NormConfig(kind="layer", eps=keys.number("layer_norm_eps", 1e-12)),
        "init_std": keys.number("initializer_range", 0.02) or 0.02,
    }


def _read_bert(keys: Keys, head: Head) -> EncoderConfig:
    keys.only("model_type", "bert")
    keys.only("position_embedding_type", "absolute")
    keys.only("tie_word_embeddings", True)
    keys.only("qkv_bias", True)
    for key in ("is_decoder", "add_cross_attention"):
        keys.only(key, False)
    keys.take("chunk_size_feed_forward", int, None)
    _pass_over(keys, _BERT_HARMLESS)
    inputs = TokensConfig(
        vocab_size=keys.whole("vocab_size"),
        max_positions=keys.whole("max_position_embeddings", 512),
        num_types=keys.whole("type_vocab_size", 2),
    )
    config = EncoderConfig(inputs=inputs, wiring="post", embed_norm=True, head=head, **_common(keys))
    keys.finish()
    return config


def read_bert_masked(keys: Keys) -> EncoderConfig:
    """BertForMaskedLM."""
    return _read_bert(keys, "masked_lm")


def read_bert(keys: Keys) -> EncoderConfig:
    """BertModel, with its pooler."""
    return _read_bert(keys, "pooler")


def read_vit(keys: Keys) -> EncoderConfig:
    """ViTForImageClassification: a class for each entry of `id2label`, two where it is absent."""
    keys.only("model_type", "vit")
    _pass_over(keys, _VIT_HARMLESS)
    keys.take("pooler_output_size", int, None)
    names = keys.take("id2label", dict, None)
    inputs = PatchesConfig(
        image_size=_pair(keys, "image_size", 224),
        patch_size=_pair(keys, "patch_size", 16),
        num_channels=keys.whole("num_channels", 3),
    )
    config = EncoderConfig(
        inputs=inputs,
        head="classifier",
        num_classes=keys.whole("num_labels", 2 if names is None else len(names)),
        **_common(keys),
    )
    keys.finish()
    return config


def _pair(keys: Keys, key: str, default: int) -> tuple[int, int]:
    value = keys.take(key, (int, list), default)
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"{key!r} must be one or two whole numbers, got {value!r}: mend the file")
    return sides[0], sides[1]


def _write(config: EncoderConfig, name: str, model_type: str, wiring: str, head: Head) -> dict[str, Any]:
    attention = config.attention
    demand(
        name,
        layer_norms=config.norm.kind == "layer",
        a_gelu_mlp_with_biases=config.mlp.kind in _WRITTEN and config.mlp.bias,
        a_bias_behind_attention=attention.out_bias,
        as_many_KV_heads_as_query_heads=attention.kv_heads == attention.num_heads,
        head_dim_times_num_heads_to_be_the_hidden_size=attention.head_dim * attention.num_heads == config.hidden_size,
        no_norm_on_q_and_k=attention.qk_norm_eps is None,
        the_usual_attention_scale=attention.scale in (None, attention.head_dim**-0.5),
        attention_without_softcap=attention.softcap is None,
        **{f"{wiring}_wiring": config.wiring == wiring, f"a_{head}_head": config.head == head},
    )
    return {
        "architectures": [name],
        "model_type": model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.inner_size,
        "num_attention_heads": attention.num_heads,
        "hidden_act": _WRITTEN[config.mlp.kind],
        "layer_norm_eps": config.norm.eps,
        "initializer_range": config.init_std,
        # No dropout was applied; what reads this should not begin to.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _write_bert(config: EncoderConfig, name: str, head: Head) -> dict[str, Any]:
    values, inputs = _write(config, name, "bert", "post", head), config.inputs
    demand(name, token_inputs=isinstance(inputs, TokensConfig))
    assert isinstance(inputs, TokensConfig)
    demand(
        name,
        token_types=inputs.num_types > 0,
        a_norm_behind_the_embedding=config.embed_norm,
        biases_on_q_k_and_v=config.attention.qkv_bias,
    )
    return values | {
        "vocab_size": inputs.vocab_size,
        "max_position_embeddings": inputs.max_positions,
        "type_vocab_size": inputs.num_types,
        "position_embedding_type": "absolute",
        "pad_token_id": None,
    }


def write_bert_masked(config: EncoderConfig) -> dict[str, Any]:
    """config.json of a BertForMaskedLM. Raises ValueError naming what BERT has no words for."""
    return _write_bert(config, "BertForMaskedLM", "masked_lm")


def write_bert(config: EncoderConfig) -> dict[str, Any]:
    """config.json of a BertModel. Raises ValueError naming what BERT has no words for."""
    return _write_bert(config, "BertModel", "pooler")


def write_vit(config: EncoderConfig) -> dict[str, Any]:
    """config.json of a ViTForImageClassification. Raises ValueError naming what ViT has no words for."""
    name = "ViTForImageClassification"
    values, inputs = _write(config, name, "vit", "sequential", "classifier"), config.inputs
    demand(name, image_inputs=isinstance(inputs, PatchesConfig))
    assert isinstance(inputs, PatchesConfig)
    demand(name, no_norm_behind_the_embedding=not config.embed_norm)
    sides = {"image_size": inputs.image_size, "patch_size": inputs.patch_size}
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return values | {
        **{key: side[0] if side[0] == side[1] else list(side) for key, side in sides.items()},
        "num_channels": inputs.num_channels,
        "qkv_bias": config.attention.qkv_bias,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _bert_names(config: EncoderConfig, prefix: str) -> list[Stored]:
    stored: list[Stored] = []
    for theirs, ours in (("word", "embed"), ("position", "positions"), ("token_type", "types")):
        stored += weights(f"{prefix}embeddings.{theirs}_embeddings", f"inputs.{ours}", bias=False)
    stored += weights(f"{prefix}embeddings.LayerNorm", "embed_norm", bias=True)
    parts = {
        "attention.self.query": "mixer.q",
        "attention.self.key": "mixer.k",
        "attention.self.value": "mixer.v",
        "attention.output.dense": "mixer.out",
        "attention.output.LayerNorm": "norm_mixer",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "norm_mlp",
    }
    for i in range(config.num_layers):
        for theirs, ours in parts.items():
            stored += weights(f"{prefix}encoder.layer.{i}.{theirs}", f"blocks.{i}.{ours}", bias=True)
    return stored


def bert_masked_names(config: EncoderConfig) -> list[Stored]:
    """Names of BertForMaskedLM."""
    stored = _bert_names(config, "bert.")
    stored += weights("cls.predictions.transform.dense", "head.dense", bias=True)
    stored += weights("cls.predictions.transform.LayerNorm", "head.norm", bias=True)
    return [*stored, Stored(name="cls.predictions.bias", ours=("head.bias",))]


def bert_names(config: EncoderConfig) -> list[Stored]:
    """Names of BertModel."""
    return _bert_names(config, "") + weights("pooler.dense", "head.0", bias=True)


def vit_names(config: EncoderConfig) -> list[Stored]:
    """Names of ViTForImageClassification, whose patches go through a convolution."""
    inputs, width = config.inputs, config.hidden_size
    demand("ViTForImageClassification", image_inputs=isinstance(inputs, PatchesConfig))
    assert isinstance(inputs, PatchesConfig)
    theirs = "vit.embeddings"
    stored = [
        Stored(name=f"{theirs}.cls_token", ours=("inputs.cls",), folded=(1, 1, width)),
        Stored(
            name=f"{theirs}.position_embeddings",
            ours=("inputs.positions.weight",),
            folded=(1, inputs.num_tokens, width),
        ),
        Stored(
            name=f"{theirs}.patch_embeddings.projection.weight",
            ours=("inputs.patch.weight",),
            folded=(width, inputs.num_channels, *inputs.patch_size),
        ),
        Stored(name=f"{theirs}.patch_embeddings.projection.bias", ours=("inputs.patch.bias",)),
    ]
    bias = config.attention.qkv_bias
    parts = {
        "layernorm_before": ("norm_mixer", True),
        "attention.attention.query": ("mixer.q", bias),
        "attention.attention.key": ("mixer.k", bias),
        "attention.attention.value": ("mixer.v", bias),
        "attention.output.dense": ("mixer.out", True),
        "layernorm_after": ("norm_mlp", True),
        "intermediate.dense": ("mlp.up", True),
        "output.dense": ("mlp.down", True),
    }
    for i in range(config.num_layers):
        for name, (ours, biased) in parts.items():
            stored += weights(f"vit.encoder.layer.{i}.{name}", f"blocks.{i}.{ours}", bias=biased)
    return stored + weights("vit.layernorm", "norm", bias=True) + weights("classifier", "head", bias=True)
