"""Blocks to test kernels on: masks, shapes, and one function that compares a kernel with the dense oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.attention import masks
from longspan.attention.bands import Bands, cut, dense, shift
from longspan.attention.kernels import Kernel
from longspan.attention.patterns import PATTERNS
from tests.oracles.attention import Dense, dense_attention

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

MASKS = {
    "full": masks.full(37),
    "causal": masks.causal(37),
    "documents": masks.documents([11, 1, 5, 20]),
    "full_documents": masks.documents([3, 14, 20], causal=False),
    "window": masks.sliding_window(37, 6, 0),
    "window_both": masks.sliding_window(37, 3, 9),
    "self_only": masks.sliding_window(37, 0, 0),
    "after": masks.from_bands([(0, 37, 0, 37, 2, 36)], 37),  # inverse causal: the last rows see nothing
    "prefix": masks.prefix_lm(37, 10),
    "odd": masks.from_bands([(3, 9, 2, 30, -2, 11), (12, 31, 0, 37, -5, 40), (3, 9, 30, 36, 0, 99)], 37),
    "nothing": masks.from_bands([], 37),
    "share_question": PATTERNS["share_question"](37, lengths=[8, 3, 12, 14]),
    "global_window": PATTERNS["global_sliding_window"](37, window=4, num_global=3),
    "blocks": PATTERNS["block_causal_document"](37, block=4, max_blocks=3),
}
RANGES = {"square": ((0, 37), (0, 37)), "wide": ((5, 16), (2, 31)), "tall": ((8, 37), (10, 19))}


def block(mask: str, ranges: str) -> tuple[Bands, int, int]:
    """(bands in local coordinates, lq, lk)."""
    q, k = RANGES[ranges]
    return shift(cut(MASKS[mask].bands, q, k), -q[0], -k[0]), q[1] - q[0], k[1] - k[0]


def tensors(
    num_q: int, num_k: int, h: int, g: int, *, d: int = 5, b: int = 2, dtype=torch.float64, device="cpu"
) -> Inputs:
    """q, k, v, dout of a block."""
    generator = torch.Generator().manual_seed(num_q * 1000 + num_k * 10 + h)
    shapes = ((b, num_q, h, d), (b, num_k, g, d), (b, num_k, g, d), (b, num_q, h, d))
    q, k, v, dout = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return q, k, v, dout


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bands: Bands, **options: Any) -> Dense:
    arrays = (x.detach().cpu().double().numpy() for x in (q, k, v, dout))
    q_array, k_array, v_array, dout_array = arrays
    return dense_attention(q_array, k_array, v_array, dout_array, dense(bands, q.shape[1], k.shape[1]), **options)


def run(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bands: Bands, truth: Dense, *, scale, softcap=None
) -> dict[str, np.ndarray]:
    """out, lse and the gradients of a kernel; its backward gets the true lse and delta."""
    out, lse = kernel.forward(q, k, v, bands, scale=scale, softcap=softcap)
    row_lse, delta = (torch.from_numpy(x).to(lse) for x in (truth.lse, truth.delta))
    grads = kernel.backward(dout, q, k, v, row_lse, delta, bands, scale=scale, softcap=softcap)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert lse.dtype == wide
    assert {x.dtype for x in (out, *grads)} <= {wide, q.dtype}
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    names = ("out", "lse", "dq", "dk", "dv")
    return {name: x.double().cpu().numpy() for name, x in zip(names, (out, lse, *grads), strict=True)}


def rms(x: np.ndarray) -> float:
    """In float32 the largest error of a few thousand entries is chance; their root mean square is not."""
    return float(np.sqrt(np.square(x).mean())) if x.size else 0.0


def errors(got: dict[str, np.ndarray], truth: Dense) -> dict[str, float]:
    """Root of the mean squared error of each result; rows without a key must be exact."""
    none = np.isneginf(truth.lse)
    np.testing.assert_array_equal(np.isneginf(got["lse"]), none)
    assert (got["out"].transpose(0, 2, 1, 3)[none] == 0).all()
    found = {}
    for name, x in got.items():
        assert not np.isnan(x).any(), name
        y = getattr(truth, name)
        found[name] = rms(np.where(np.isneginf(y), 0, x) - np.where(np.isneginf(y), 0, y))
    return found


def plain_errors(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bands: Bands, truth: Dense, *, scale
) -> dict[str, float]:
    """Errors of softmax(q k^T) v written out in torch in the dtype of q, with torch's own autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    share = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(share, dim=2).transpose(1, 2) for x in (k, v))
    allowed = torch.from_numpy(dense(bands, q.shape[1], k.shape[1])).to(q.device)
    scores = (q.transpose(1, 2) @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    weights = scores.masked_fill(~allowed.any(dim=1, keepdim=True), 0).softmax(dim=-1) * allowed.any(
        dim=1, keepdim=True
    )
    out = (weights @ values).transpose(1, 2)
    out.backward(dout)
    found = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {
        name: rms(x.detach().double().cpu().numpy() - getattr(truth, name))
        for name, x in found.items()
        if x is not None
    }
