"""Softmax attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with its head groupings.

h query heads share g KV heads: g = h multi-head, 1 < g < h grouped (arXiv:2305.13245), g = 1 multi-query
(arXiv:1911.02150). Optional: an RMS norm on each head's q and k before the rotation (Qwen3), biases, a window, a
softcap on the logits.

Cost for n tokens of width c and p allowed pairs: 4·n·c·(h + g)·d + 4·h·d·p FLOPs (`longspan.mixers.flops`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from longspan.mixers.config import AttentionConfig
from longspan.mixers.contract import Context
from longspan.mixers.norm import PlusOneRMSNorm, RMSNorm
from longspan.mixers.rotary import Rotary, rotate


class Attention(nn.Module):
    """The softmax mixer; whether the sequence is split is known to the context alone.

    Args:
        config: heads, biases, norms.
        hidden_size: width c of the tokens.
        layer: index handed to the context.
        window: number of keys a query sees, itself included; None: all.
        rotary: rotation of q and k; None: none (learned positions).
    """

    def __init__(
        self,
        config: AttentionConfig,
        hidden_size: int,
        *,
        layer: int,
        window: int | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.window, self.rotary = config, layer, window, rotary
        d = config.head_dim
        self.q = nn.Linear(hidden_size, config.num_heads * d, bias=config.qkv_bias)
        self.k = nn.Linear(hidden_size, config.kv_heads * d, bias=config.qkv_bias)
        self.v = nn.Linear(hidden_size, config.kv_heads * d, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * d, hidden_size, bias=config.out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm_eps is not None:
            norm = {"rms": RMSNorm, "rms_plus_one": PlusOneRMSNorm}[config.qk_norm_kind]
            self.q_norm, self.k_norm = norm(d, config.qk_norm_eps), norm(d, config.qk_norm_eps)

    def forward(self, x: Float[Tensor, "b l c"], ctx: Context) -> Float[Tensor, "b l c"]:
        """Mixes the local tokens with the rest of the sequence."""
        q, k, v = (projection(x).unflatten(-1, (-1, self.config.head_dim)) for projection in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            cos, sin = self.rotary.angles(ctx.positions, x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = ctx.attend(
            q, k, v, layer=self.layer, window=self.window, scale=self.config.scale, softcap=self.config.softcap
        )
        return self.out(mixed.flatten(2))
