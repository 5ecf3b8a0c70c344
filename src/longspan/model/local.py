"""The context of one process that holds whole rows: causal or full attention by torch's own fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class LocalContext:
    """Attention over rows of `num_tokens` tokens, one document each, causal unless `causal` is False: then every token
    sees every token, as under `longspan.attention.masks.full`. Implements `longspan.mixers.contract.Context`.

    `lengths`, one for each row (int64 (b,)), says how many tokens of it are no padding: the keys after them are seen by
    no query, and what padded queries give means nothing. A context of a split sequence has one mask for all rows and so
    no padding: pack rows of unequal lengths there as `masks.documents(lengths, causal=False)`.

    Without window and softcap, torch picks its fused kernel. A window shorter than the row needs an explicit mask of
    num_tokens² booleans, and a softcap the plain formula with num_tokens² scores a head:
    `longspan.context.SequenceContext` does both in blocks.
    """

    def __init__(
        self,
        num_tokens: int,
        device: torch.device | str | None = None,
        *,
        causal: bool = True,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> None:
        if lengths is not None and (lengths.ndim != 1 or lengths.min() < 1 or lengths.max() > num_tokens):
            raise ValueError(
                f"lengths must be one number in 1..{num_tokens} for each row, got {lengths.tolist()}: padding stands "
                "behind a row's tokens"
            )
        self._causal, self._lengths = causal, None if lengths is None else lengths.to(device)
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
        """Attention within each row; differentiable. `layer` is of no matter: nothing is kept between calls.

        Raises:
            ValueError: rows of another length or number than the context's, or a window where attention is full.
        """
        num_tokens = q.shape[1]
        if num_tokens != self._positions.shape[0]:
            raise ValueError(
                f"a local context attends over its own {self._positions.shape[0]} tokens, got q of {num_tokens}: "
                "make one LocalContext for each length"
            )
        if window is not None and not self._causal:
            raise ValueError(
                f"a window counts the keys before a query, got {window} under full attention: use windows in a decoder"
            )
        if self._lengths is not None and self._lengths.shape[0] != q.shape[0]:
            raise ValueError(
                f"a context with lengths must have one for each row, got {self._lengths.shape[0]} for {q.shape[0]} "
                "rows: make one context for each batch"
            )
        window = num_tokens if window is None else min(window, num_tokens)
        # Without a mask of its own, the kernel's causal and full cases.
        plain = self._lengths is None and (not self._causal or window == num_tokens)
        mask = None if plain else self._mask(window)
        grouped = q.shape[2] != k.shape[2]
        if grouped and (softcap is not None or (mask is not None and q.is_cuda)):
            # CUDA's masked kernels know no groups, and torch would fall back to its unfused form.
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            grouped = False
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if softcap is not None:
            mask = self._mask(window) if mask is None else mask
            return _capped(q, k, v, mask, scale, softcap).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self._causal and mask is None, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def total(self, x: Tensor) -> Tensor:
        """`x` itself: no other process holds tokens."""
        return x

    def _mask(self, window: int) -> Tensor:
        """Pairs (l, l), or (b, 1, l, l) where rows have lengths of their own, that may attend."""
        if window not in self._masks:
            back = self._positions[:, None] - self._positions
            mask = (back >= 0) & (back < window) if self._causal else torch.ones_like(back, dtype=torch.bool)
            if self._lengths is not None:
                mask = mask & (self._positions < self._lengths[:, None, None, None])
            self._masks[window] = mask
        return self._masks[window]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v
