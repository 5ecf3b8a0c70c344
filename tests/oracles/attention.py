"""Dense softmax attention, its lse and all its gradients from the formula, in float64 numpy.

``P = exp(S - lse)``, ``S = scale * q k^T`` (softcap: ``S = cap * tanh(S / cap)``), ``dV = P^T dO``,
``dS = P * (dO V^T - rowsum(dO * O))``, ``dQ = scale * dS K``, ``dK = scale * dS^T Q``. A row without a key has out 0,
lse -inf and no gradient. Imports nothing from the package.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Dense(NamedTuple):
    """Everything about one attention: out (b q h d), lse and delta (b h q), dq, dk, dv."""

    out: np.ndarray
    lse: np.ndarray
    delta: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def dense_attention(q, k, v, dout, allowed, *, scale=None, softcap=None) -> Dense:
    """q, dout (b q h d), k, v (b k g d), allowed bool (q k); head i of q reads head i // (h / g) of k and v."""
    q, k, v, dout = (np.asarray(x, dtype=np.float64) for x in (q, k, v, dout))
    b, num_q, h, d = q.shape
    num_k, g = k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    out, lse, delta = np.zeros_like(q), np.full((b, h, num_q), -np.inf), np.zeros((b, h, num_q))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    some = allowed.any(axis=1)
    for row in range(b):
        for head in range(h):
            kv = head // (h // g)
            x = scale * (q[row, :, head] @ k[row, :, kv].T)
            slope = np.ones((num_q, num_k))
            if softcap is not None:
                slope = 1 - np.tanh(x / softcap) ** 2
                x = softcap * np.tanh(x / softcap)
            x = np.where(allowed, x, -np.inf)
            peak = np.where(some, x.max(axis=1, initial=-np.inf), 0)
            weights = np.exp(x - peak[:, None])
            total = weights.sum(axis=1)
            p = weights[some] / total[some, None]
            lse[row, head, some] = peak[some] + np.log(total[some])
            out[row, some, head] = p @ v[row, :, kv]
            do = dout[row, some, head]
            delta[row, head, some] = (do * out[row, some, head]).sum(axis=1)
            ds = p * (do @ v[row, :, kv].T - delta[row, head, some][:, None]) * slope[some] * scale
            dq[row, some, head] = ds @ k[row, :, kv]
            dk[row, :, kv] += ds.T @ q[row, some, head]
            dv[row, :, kv] += p.T @ do
    return Dense(out, lse, delta, dq, dk, dv)
