"""The dense formula in float64 on any device: the kernel that takes every mask, dtype, head grouping and softcap.

Formula: ``s = scale * q k^T``, with a softcap ``s = cap * tanh(s / cap)`` (Gemma 2, arXiv:2408.00118), softmax over the
allowed keys, times v. Cost: 2 to 4 matrices of b * h * lq * lk float64; meant for checking and for small blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.bands import Bands, dense
from longspan.attention.kernels.contract import Backward, Forward, check_block
from longspan.attention.merge import accumulator


def _scores(q: Tensor, k: Tensor, bands: Bands, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scores (b g r lq lk) with -inf where forbidden, and d score / d (scaled product)."""
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q, k) * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent.square()
    forbidden = torch.from_numpy(~dense(bands, q.shape[1], k.shape[1])).to(q.device)
    return scores.masked_fill_(forbidden, -torch.inf), slope


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """float64 (b, l, h, d) -> (b, l, g, h / g, d)."""
    return x.double().unflatten(2, (num_kv_heads, -1))


class Reference:
    """Dense attention in float64. Takes everything; the slowest and the most exact."""

    name = "reference"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        return None

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        dtype = accumulator(q.dtype)
        scores, _ = _scores(_grouped(q, k.shape[2]), k.double(), bands, scale, softcap)
        lse = torch.logsumexp(scores, dim=-1) if k.shape[1] else scores.new_full(scores.shape[:-1], -torch.inf)
        empty = lse == -torch.inf
        p = torch.exp(scores - lse.masked_fill(empty, 0).unsqueeze(-1))
        out = torch.einsum("bgrqk,bkgd->bqgrd", p, v.double())
        return out.flatten(2, 3).to(dtype), lse.flatten(1, 2).to(dtype)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        bands: Bands,
        *,
        scale: float,
        softcap: float | None,
        out: Tensor | None = None,
    ) -> Backward:
        check_block(self, q, k, v, softcap)
        dtype, num_kv_heads = accumulator(q.dtype), k.shape[2]
        wide_q, wide_dout = _grouped(q, num_kv_heads), _grouped(dout, num_kv_heads)
        scores, slope = _scores(wide_q, k.double(), bands, scale, softcap)
        row_lse = lse.double().masked_fill(lse == -torch.inf, 0)
        p = torch.exp(scores - row_lse.unflatten(1, (num_kv_heads, -1)).unsqueeze(-1))
        dv = torch.einsum("bgrqk,bqgrd->bkgd", p, wide_dout)
        dp = torch.einsum("bqgrd,bkgd->bgrqk", wide_dout, v.double())
        ds = p * (dp - delta.double().unflatten(1, (num_kv_heads, -1)).unsqueeze(-1)) * scale
        if slope is not None:
            ds = ds * slope
        dq = torch.einsum("bgrqk,bkgd->bqgrd", ds, k.double())
        dk = torch.einsum("bgrqk,bqgrd->bkgd", ds, wide_q)
        return dq.flatten(2, 3).to(dtype), dk.to(dtype), dv.to(dtype)
