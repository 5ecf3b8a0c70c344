"""Softmax attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with its head groupings.

h query heads share g KV heads: g = h multi-head, 1 < g < h grouped (arXiv:2305.13245), g = 1 multi-query
(arXiv:1911.02150). Optional: an RMS norm on each head's q and k before the rotation (Qwen3), biases, a window, a
softcap on the logits.

Cost for n tokens of width c and p allowed pairs: 4·n·c·(h + g)·d + 4·h·d·p FLOPs (`longspan.mixers.flops`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from longspan.layout.tensor_parallel import WHOLE, Linear, TensorSplit, linear_boxes
from longspan.layout.weights import Box
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
        split: the heads of this rank, where a group shares them.
    """

    def __init__(
        self,
        config: AttentionConfig,
        hidden_size: int,
        *,
        layer: int,
        window: int | None = None,
        rotary: Rotary | None = None,
        split: TensorSplit = WHOLE,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.window, self.rotary = config, layer, window, rotary
        self.split, self.heads = split, split.heads(config.num_heads, config.kv_heads)
        d = config.head_dim
        q_channels = len(self.heads.query) * d
        kv_channels = d * (config.kv_heads if self.heads.shared else len(self.heads.kv))
        self.q = Linear(hidden_size, q_channels, bias=config.qkv_bias)
        self.k = Linear(hidden_size, kv_channels, bias=config.qkv_bias)
        self.v = Linear(hidden_size, kv_channels, bias=config.qkv_bias)
        self.out = Linear(q_channels, hidden_size, bias=config.out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm_eps is not None:
            norm = {"rms": RMSNorm, "rms_plus_one": PlusOneRMSNorm}[config.qk_norm_kind]
            self.q_norm, self.k_norm = norm(d, config.qk_norm_eps), norm(d, config.qk_norm_eps)

    def forward(self, x: Float[Tensor, "b l c"], ctx: Context) -> Float[Tensor, "b m c"]:
        """Mixes the local tokens with the rest of the sequence; m is l unless the heads are split."""
        q, k, v = self._heads_of(self.q, x), self._kv(self.k, x), self._kv(self.v, x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            cos, sin = self.rotary.angles(ctx.positions, x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if (expand := self.heads.expand) is not None:
            k, v = k[:, :, expand], v[:, :, expand]
        mixed = ctx.attend(
            q, k, v, layer=self.layer, window=self.window, scale=self.config.scale, softcap=self.config.softcap
        )
        return self.split.total(self.split.partial(mixed.flatten(2), self.out), self.out)

    def _heads_of(self, projection: Linear, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (-1, self.config.head_dim))

    def _kv(self, projection: Linear, x: Tensor) -> Tensor:
        if not self.heads.shared:
            return self._heads_of(projection, x)
        rows = slice(self.heads.kv.start * self.config.head_dim, self.heads.kv.stop * self.config.head_dim)
        return projection(x, rows).unflatten(-1, (-1, self.config.head_dim))

    def boxes(self) -> dict[str, Box]:
        """Where the split parameters stand in the whole ones."""
        config, d = self.config, self.config.head_dim
        q_start, q_total = self.heads.query.start * d, config.num_heads * d
        boxes = linear_boxes("q", self.q, 0, q_start, q_total) | linear_boxes("out", self.out, 1, q_start, q_total)
        if not self.heads.shared:
            for name, linear in (("k", self.k), ("v", self.v)):
                boxes |= linear_boxes(name, linear, 0, self.heads.kv.start * d, config.kv_heads * d)
        return boxes
