"""Compiled flex attention on blocks, for CUDA: the kernel for a softcap and for float32 there.

Kernel: torch's ``flex_attention`` (Dong et al. 2024, FlexAttention, arXiv:2412.05496). The block mask is built from the
bands by interval arithmetic and the element-wise view from a small table of bands, so no lq x lk tensor exists. Bands
come in groups of ``GROUP``, one call each, merged exactly. What differs: the backward of a block from the lse and delta
of the whole row. With ``w = exp(lse_local - lse)``, sending ``(w * dout, w * (rowsum(dout * out_local) - delta))`` back
through the local (out, lse) gives ``dS = P * (dout V^T - delta)`` with the P of the whole row.
Cost: the allowed pairs in blocks of 128; the backward computes the forward again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from longspan.attention.bands import Band, Bands, coalesce
from longspan.attention.kernels.contract import Backward, Forward, check_block, row_sums
from longspan.attention.merge import accumulator, merge_

GROUP = 8  # bands of one call: the compiled mask has this many terms
BLOCK = 128  # rows and columns of flex's blocks
SHAPES = 1024  # graphs kept: blocks of a schedule come in a few shapes, and each is compiled once
_NOTHING = Band(0, 0, 0, 0, 1, 0)


def block_table(bands: Bands, num_q: int, num_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of ``BLOCK`` x ``BLOCK`` the bands touch in part, and which one band fills: two bool (nq, nk).

    A block that reaches over the end counts as touched in part.
    """
    q0 = np.arange(0, num_q, BLOCK)[:, None]
    k0 = np.arange(0, num_k, BLOCK)[None, :]
    q1, k1 = np.minimum(q0 + BLOCK, num_q), np.minimum(k0 + BLOCK, num_k)
    some = np.zeros(np.broadcast_shapes(q0.shape, k0.shape), dtype=bool)
    filled = some.copy()
    for b in bands:
        a0, a1 = np.maximum(q0, b.q0), np.minimum(q1, b.q1)
        c0, c1 = np.maximum(k0, b.k0), np.minimum(k1, b.k1)
        low, high = c0 - (a1 - 1), c1 - 1 - a0
        inside = (a0 < a1) & (c0 < c1)
        some |= inside & (np.maximum(low, b.lo) <= np.minimum(high, b.hi))
        whole = inside & (a0 == q0) & (a1 == q0 + BLOCK) & (c0 == k0) & (c1 == k0 + BLOCK)
        filled |= whole & (low >= b.lo) & (high <= b.hi)
    return some & ~filled, filled


def element_mask(table: Tensor) -> Callable[..., Tensor]:
    """Flex's mask function of a table (GROUP, 6) of bands."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result = q < 0
        for i in range(GROUP):
            inside = (q >= table[i, 0]) & (q < table[i, 1]) & (k >= table[i, 2]) & (k < table[i, 3])
            result = result | (inside & (k - q >= table[i, 4]) & (k - q <= table[i, 5]))
        return result

    return allowed


def _block_mask(bands: Bands, num_q: int, num_k: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~blocks, axis=1, kind="stable")
        count, index = blocks.sum(axis=1), order
        return tuple(torch.from_numpy(x.astype(np.int32)).to(device)[None, None] for x in (count, index))  # type: ignore[return-value]

    padded = list(bands) + [_NOTHING] * (GROUP - len(bands))
    table = torch.tensor(padded, dtype=torch.int32, device=device)
    partial, filled = block_table(bands, num_q, num_k)
    return BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(filled),
        BLOCK_SIZE=BLOCK,
        mask_mod=element_mask(table),
        seq_lengths=(num_q, num_k),
    )


@cache
def compiled() -> Callable[..., Any]:
    """Torch's flex attention, compiled once for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    # One graph a shape: with dynamic shapes the lowering of torch 2.11 fails.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bands: Bands, scale: float, softcap: float | None, flex: Callable[..., Any]
) -> Forward:
    """One call: (out (b l h d), lse (b h l)) over up to GROUP bands."""
    from torch.nn.attention.flex_attention import AuxRequest

    def bend(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap is not None else score

    with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
        out, aux = flex(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=None if softcap is None else bend,
            block_mask=_block_mask(bands, q.shape[1], k.shape[1], q.device),
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=True),
            kernel_options={"BACKEND": "TRITON"},  # its variant for short queries does not take every shape
        )
    return out.transpose(1, 2), aux.lse


def _groups(bands: Bands) -> list[Bands]:
    fewer = coalesce(bands)
    return [fewer[i : i + GROUP] for i in range(0, len(fewer), GROUP)]


class Flex:
    """Compiled flex attention. Every mask and head grouping, float32 and 16-bit types, softcap; CUDA only."""

    name = "flex"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        if q.device.type != "cuda":
            return f"flex attention has no backward on {q.device.type}, only on cuda"
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {q.dtype}"
        if q.shape[-1] < 16:
            return f"the head dim must be at least 16, got {q.shape[-1]}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        b, length, h, _ = q.shape
        dtype = accumulator(q.dtype)
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = torch.full((b, h, length), -torch.inf, dtype=dtype, device=q.device)
        with torch.no_grad():
            for group in _groups(bands):
                merge_(out, lse, *_attend(q, k, v, group, scale, softcap, compiled()))
        return out, lse

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
    ) -> Backward:
        check_block(self, q, k, v, softcap)
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator(q.dtype), device=q.device) for x in (q, k, v))
        stream = torch.cuda.current_stream(q.device)

        def differentiate() -> None:
            with torch.cuda.stream(stream):
                for group in _groups(bands):
                    q_in, k_in, v_in = (x.detach().requires_grad_() for x in (q, k, v))
                    out, local_lse = _attend(q_in, k_in, v_in, group, scale, softcap, compiled())
                    cotangents = local_cotangents(dout, out, local_lse, lse, delta)
                    grads = torch.autograd.grad((out, local_lse), (q_in, k_in, v_in), cotangents)
                    for total, new in zip((dq, dk, dv), grads, strict=True):
                        total += new

        # Inside a custom op (where the project's attention runs) this thread's autograd is switched off, whatever
        # enable_grad says; a new thread starts with it on.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(differentiate).result()
        return dq, dk, dv


def local_cotangents(dout: Tensor, out: Tensor, local_lse: Tensor, lse: Tensor, delta: Tensor) -> Forward:
    """What to send back through a local (out, lse) for the gradient of the whole row: see the module's docstring."""
    out, local_lse = out.detach(), local_lse.detach()
    weight = torch.exp(local_lse.float() - lse.float().masked_fill(lse == -torch.inf, 0))
    through_lse = weight * (row_sums(dout.float(), out.float()) - delta.float())
    through_out = weight.transpose(1, 2).unsqueeze(-1) * dout.float()
    return through_out.to(out.dtype), through_lse.to(local_lse.dtype)
