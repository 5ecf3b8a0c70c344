"""Configs of the token mixers and of rotary positions; no torch here, so that command lines read them cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RmsKind = Literal["rms", "rms_plus_one"]


def require(ok: bool, rule: str, value: object, remedy: str) -> None:
    """Raises the house's one-line `ValueError` unless `ok`."""
    if not ok:
        raise ValueError(f"{rule}, got {value!r}: {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every frequency divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: float

    def __post_init__(self) -> None:
        require(self.kind == "linear", "kind of LinearScaling is 'linear'", self.kind, "leave it out")
        require(
            self.factor >= 1, "linear rope scaling needs factor >= 1", self.factor, "give extended / original length"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        require(self.kind == "llama3", "kind of Llama3Scaling is 'llama3'", self.kind, "leave it out")
        require(
            self.factor >= 1, "llama3 rope scaling needs factor >= 1", self.factor, "give extended / original length"
        )
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor",
            (self.low_freq_factor, self.high_freq_factor),
            "Llama 3.1 has 1 and 4",
        )
        require(
            self.original_max_positions > 0,
            "original_max_positions must be positive",
            self.original_max_positions,
            "Llama 3.1: 8192",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolation by parts, and a factor on cos and sin.

    `attention_factor` None: computed from `factor` and the two mscales. `truncate`: the ramp's ends rounded to whole
    dimensions.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.kind == "yarn", "kind of YarnScaling is 'yarn'", self.kind, "leave it out")
        require(self.factor >= 1, "yarn rope scaling needs factor >= 1", self.factor, "give extended / original length")
        require(
            self.original_max_positions > 0,
            "original_max_positions must be positive",
            self.original_max_positions,
            "the length before",
        )
        require(
            self.beta_fast > self.beta_slow > 0,
            "yarn rope scaling needs beta_fast > beta_slow > 0",
            (self.beta_fast, self.beta_slow),
            "the paper has 32 and 1",
        )
        require(
            self.attention_factor is None or self.attention_factor > 0,
            "attention_factor must be positive",
            self.attention_factor,
            "None computes it",
        )


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """Rotary positions. `max_positions`, the length the model was made for, goes to checkpoints and limits nothing."""

    kind: Literal["rotary"] = "rotary"
    theta: float = 10000.0
    max_positions: int = 8192
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require(self.kind == "rotary", "kind of RotaryConfig is 'rotary'", self.kind, "leave it out")
        require(self.theta > 1, "rotary theta must be > 1", self.theta, "10000 is usual")
        require(self.max_positions > 0, "max_positions must be positive", self.max_positions, "give the trained length")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Softmax attention with h query heads over g KV heads of `head_dim` (independent of the model's width).

    Args:
        num_kv_heads: g; h is a multiple of it (g = h multi-head, g = 1 multi-query); None: h.
        qkv_bias, out_bias: biases of the input and of the output projections.
        qk_norm_eps: epsilon of an RMS norm over each head's q and k before the rotation (Qwen3); None: no norm.
        qk_norm_kind: its factor: rms: the weight; rms_plus_one: 1 + the weight (Gemma 3).
        scale: factor on q·k; None: head_dim ** -0.5.
        softcap: c in c·tanh(scores / c); None: no cap.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = field(default=None)
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm_kind: RmsKind = "rms"

    @property
    def kv_heads(self) -> int:
        """Number of KV heads, g."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def __post_init__(self) -> None:
        require(self.num_heads > 0, "num_heads must be positive", self.num_heads, "give at least 1")
        require(self.head_dim > 0, "head_dim must be positive", self.head_dim, "give at least 2")
        require(
            self.kv_heads > 0 and self.num_heads % self.kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads",
            (self.num_heads, self.num_kv_heads),
            "change one of them",
        )
        require(
            self.qk_norm_eps is None or self.qk_norm_eps > 0,
            "qk_norm_eps must be positive",
            self.qk_norm_eps,
            "None: no norm",
        )
        require(
            self.qk_norm_kind in ("rms", "rms_plus_one"),
            "qk_norm_kind must be rms or rms_plus_one",
            self.qk_norm_kind,
            "pick one of these",
        )
        require(
            self.scale is None or self.scale > 0,
            "attention scale must be positive",
            self.scale,
            "None: head_dim ** -0.5",
        )
        require(self.softcap is None or self.softcap > 0, "softcap must be positive", self.softcap, "None: no cap")
