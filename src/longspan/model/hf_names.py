"""Names of tensors: Hugging Face's to ours, both ways from one list.

One stored tensor is one or several of our parameters joined along dim 0 (GPT-2 keeps q, k and v in one), transposed
where the checkpoint keeps (in, out) matrices (GPT-2's Conv1D); or it is one matrix of a stack of ours (an expert's).
`folded` is the checkpoint's shape where the same values in the same order have another one here (a convolution over
patches, which is a matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longspan.model.config import DecoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a checkpoint, and the parameters of ours that it holds; with `index`, that entry of dim 0 of one."""

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    index: int | None = None
    folded: tuple[int, ...] | None = None

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from the shapes of our parameters."""
        if self.folded is not None:
            return self.folded
        first = shapes[self.ours[0]]
        if self.index is not None:
            return first[1:]
        joined = (sum(shapes[name][0] for name in self.ours), *first[1:])
        return joined[::-1] if self.transposed else joined


def weights(theirs: str, ours: str, *, bias: bool) -> list[Stored]:
    """The weight of a linear or a norm, and its bias."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Stored(name=f"{theirs}.{kind}", ours=(f"{ours}.{kind}",)) for kind in kinds]


def mlp_names(theirs: str, ours: str, config: DecoderConfig, layer: int) -> list[Stored]:
    """The mlp of one layer of Llama and its like."""
    return [
        stored
        for name in ("gate", "up", "down")
        for stored in weights(f"{theirs}.mlp.{name}_proj", f"{ours}.mlp.{name}", bias=config.mlp.bias)
    ]


_NORMS = {"input_layernorm": "norm_mixer", "post_attention_layernorm": "norm_mlp"}


def llama_names(
    config: DecoderConfig,
    channel_mixer: Callable[[str, str, DecoderConfig, int], list[Stored]] = mlp_names,
    norms: Mapping[str, str] = _NORMS,
) -> list[Stored]:
    """Names of Llama, Mistral, Qwen2 and Qwen3; `channel_mixer(theirs, ours, config, layer)` names that of a layer,
    `norms` the norms of every block, theirs and ours."""
    attention = config.attention
    stored = weights("model.embed_tokens", "embed", bias=False)
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        for name, norm in norms.items():
            stored += weights(f"{theirs}.{name}", f"{ours}.{norm}", bias=False)
        for name in ("q", "k", "v"):
            stored += weights(f"{theirs}.self_attn.{name}_proj", f"{ours}.mixer.{name}", bias=attention.qkv_bias)
        stored += weights(f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out", bias=attention.out_bias)
        if attention.qk_norm_eps is not None:
            for name in ("q_norm", "k_norm"):
                stored += weights(f"{theirs}.self_attn.{name}", f"{ours}.mixer.{name}", bias=False)
        stored += channel_mixer(theirs, ours, config, i)
    stored += weights("model.norm", "norm", bias=False)
    if not config.tie_embeddings:
        stored += weights("lm_head", "head", bias=False)
    return stored


def gpt2_names(config: DecoderConfig) -> list[Stored]:
    """Names of GPT-2, whose linear layers are Conv1D: (in, out), with q, k and v in one."""

    def conv1d(theirs: str, *ours: str) -> list[Stored]:
        return [
            Stored(name=f"{theirs}.weight", ours=tuple(f"{name}.weight" for name in ours), transposed=True),
            Stored(name=f"{theirs}.bias", ours=tuple(f"{name}.bias" for name in ours)),
        ]

    stored = weights("transformer.wte", "embed", bias=False)
    stored += weights("transformer.wpe", "embed_positions", bias=False)
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        stored += weights(f"{theirs}.ln_1", f"{ours}.norm_mixer", bias=True)
        stored += conv1d(f"{theirs}.attn.c_attn", *(f"{ours}.mixer.{name}" for name in ("q", "k", "v")))
        stored += conv1d(f"{theirs}.attn.c_proj", f"{ours}.mixer.out")
        stored += weights(f"{theirs}.ln_2", f"{ours}.norm_mlp", bias=True)
        stored += conv1d(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up")
        stored += conv1d(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down")
    stored += weights("transformer.ln_f", "norm", bias=True)
    if not config.tie_embeddings:
        stored += weights("lm_head", "head", bias=False)
    return stored
