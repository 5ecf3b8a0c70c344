"""Softmax attention from the formula in float64, one query row and one head at a time."""

from __future__ import annotations

import numpy as np


def causal_attention(q, k, v, *, window=None, scale=None, softcap=None):
    """q (b, s, h, d), k and v (b, s, g, d) -> (b, s, h, d) float64; a query sees `window` keys, itself last."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    num_rows, num_tokens, num_heads, head_dim = q.shape
    share = num_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros_like(q)
    for b in range(num_rows):
        for i in range(num_tokens):
            first = 0 if window is None else max(0, i - window + 1)
            for h in range(num_heads):
                scores = scale * (k[b, first : i + 1, h // share] @ q[b, i, h])
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, first : i + 1, h // share]
    return out
