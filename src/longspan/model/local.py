"""The context of one process that holds whole rows: causal attention by torch's own fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class LocalContext:
    """Causal attention over rows of `num_tokens` tokens, one document each. Implements
    `longspan.mixers.contract.Context`.

    Without window and softcap, torch picks its fused kernel. A window shorter than the row needs an explicit mask of
    num_tokens² booleans,
    and a softcap the plain formula with num_tokens² scores a head: `longspan.context.SequenceContext` does both in
    blocks.
    """

    def __init__(self, num_tokens: int, device: torch.device | str | None = None) -> None:
        self._positions = torch.arange(num_tokens, device=device)
        self._masks: dict[int, Tensor] = {}

    @property
    def positions(self) -> Int[Tensor, " l"]:
        """0, 1, ..., num_tokens - 1."""
        return self._positions

    def attend(
        self,
        q: Float[Tensor, "b l h d"],
        k: Float[Tensor, "b l g d"],
        v: Float[Tensor, "b l g d"],
        *,
        layer: int,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "b l h d"]:
        """Causal attention within each row; differentiable. `layer` is of no matter: nothing is kept between calls."""
        num_tokens = q.shape[1]
        if num_tokens != self._positions.shape[0]:
            raise ValueError(
                f"a local context attends over its own {self._positions.shape[0]} tokens, got q of {num_tokens}: "
                "make one LocalContext for each length"
            )
        mask = None if window is None or window >= num_tokens else self._mask(window)
        grouped = q.shape[2] != k.shape[2]
        if grouped and (softcap is not None or (mask is not None and q.is_cuda)):
            # CUDA's masked kernels know no groups, and torch would fall back to its unfused form.
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            grouped = False
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if softcap is not None:
            mask = self._mask(num_tokens) if mask is None else mask
            return _capped(q, k, v, mask, scale, softcap).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def total(self, x: Tensor) -> Tensor:
        """`x` itself: no other process holds tokens."""
        return x

    def _mask(self, window: int) -> Tensor:
        if window not in self._masks:
            back = self._positions[:, None] - self._positions
            self._masks[window] = (back >= 0) & (back < window)
        return self._masks[window]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v
