"""Rotary positions (RoFormer: Su et al. 2021, arXiv:2104.09864) and three ways of stretching them.

The head's dims are taken in pairs (j, j + d/2), as checkpoints of the Llama family have them, and each pair is rotated
by the angle position · theta^(-2j/d). Scaling changes these frequencies: linear (arXiv:2306.15595) divides all of them;
Llama 3.1's divides the slow ones; YaRN (arXiv:2309.00071, section 3.2) divides by parts and multiplies cos and sin by
an attention factor (eq. 22).

Frequencies, angles and rotation are in fp32 whatever the model's dtype: in bf16 position 257 is already 256. Cost:
3·l·d multiply-adds a head; cos and sin, l·d/2 fp32 values each, are kept for the backward, the rotated tensors are not.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longspan.mixers.config import LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling


def inverse_frequencies(
    config: RotaryConfig, head_dim: int, *, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " half"], float]:
    """Angle per position (radians, fp32) of each of the head_dim / 2 pairs, and the factor on cos and sin."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(torch.float32) / head_dim
    inv_freq = 1.0 / (config.theta**exponent)
    match config.scaling:
        case None:
            return inv_freq, 1.0
        case LinearScaling(factor=factor):
            return inv_freq / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(inv_freq, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(inv_freq, config.theta, head_dim, scaling), yarn_attention_factor(scaling)


def _llama3(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    # turns: how often a pair goes round within the original length; slow pairs (few turns) are stretched whole.
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def _yarn(inv_freq: Tensor, theta: float, head_dim: int, scaling: YarnScaling) -> Tensor:
    def pair_with(turns: float) -> float:
        """The (fractional) pair that goes round `turns` times within the original length."""
        return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=inv_freq.device)
    stretch = ((pairs - low) / (high - low)).clamp(0, 1)
    return stretch * inv_freq / scaling.factor + (1 - stretch) * inv_freq


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """The factor on cos and sin: given, or 0.1·ln(factor) + 1, or the ratio of the two with DeepSeek's mscales."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


class Rotary:
    """Rotates heads at given positions. One object serves all layers; it holds no parameter and no buffer.

    Buffers would be cast with the model to bf16 and would come out of the meta device unfilled, so the frequencies are
    computed on first use on each device.
    """

    def __init__(self, config: RotaryConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self._frequencies: dict[torch.device, Tensor] = {}

    def angles(
        self, positions: Int[Tensor, " l"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "l half"], Float[Tensor, "l half"]]:
        """cos and sin of the pairs' angles, times the attention factor, in fp32 at least (fp64 for fp64)."""
        inv_freq, factor = self._inverse_frequencies(positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        if torch.compiler.is_compiling():
            return angles_op(positions, inv_freq.to(wide), factor)
        return _angles(positions, inv_freq.to(wide), factor)

    def _inverse_frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        factor = yarn_attention_factor(self.config.scaling) if isinstance(self.config.scaling, YarnScaling) else 1.0
        found = self._frequencies.get(device)
        if found is not None:
            return found, factor
        # Outside inference mode: a tensor born inside could not be used in training later.
        with torch.inference_mode(False):
            inv_freq, factor = inverse_frequencies(self.config, self.head_dim, device=device)
        # A fake or traced tensor has no values to keep.
        if type(inv_freq) is Tensor and not torch.compiler.is_compiling():
            self._frequencies[device] = inv_freq
        return inv_freq, factor


def _angles(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = positions.to(inv_freq.dtype)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


@torch.library.custom_op("longspan::rotary_angles", mutates_args=())
def angles_op(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """`_angles` that a compiler does not look into: it would take cos and sin again for every head and in backward."""
    return _angles(positions, inv_freq, factor)


@angles_op.register_fake
def _(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    shape = positions.shape[0], inv_freq.shape[0]
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


def rotate(
    x: Float[Tensor, "b l h d"], cos: Float[Tensor, "l half"], sin: Float[Tensor, "l half"]
) -> Float[Tensor, "b l h d"]:
    """Rotates pair (j, j + d/2) of every head by its angle; computed in the dtype of `cos`, returned in that of `x`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
