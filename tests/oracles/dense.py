"""Dense attention and its gradients from the formula, in float64; imports nothing from the package."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float,
    dout: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, ...]:
    """(out, lse[, dq, dk, dv]) of b l h d tensors; query head i reads KV head i // (h // g). Empty rows: 0 and -inf."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group_size = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group_size, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp(min=-1e300).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total.clamp(min=1e-300), values)
    lse = (top + torch.log(total)).squeeze(-1)
    if dout is None:
        return out.detach(), lse.detach()
    grads = torch.autograd.grad(out, (q, k, v), dout.double())
    return (out.detach(), lse.detach(), *grads)
