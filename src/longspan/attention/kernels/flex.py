"""Compiled flex attention on blocks, for CUDA: the kernel for a softcap, for float32, and for masks of many pieces.

Kernel: torch's ``flex_attention`` (Dong et al. 2024, FlexAttention, arXiv:2412.05496), one call for a mask of any
number of bands. Which blocks of 128 x 128 are filled, and which only in part, comes from the bands by interval
arithmetic; blocks in part that look alike share one bitmap, so no lq x lk tensor exists.

What differs: the backward of a block from the lse and delta of the whole row. With ``w = exp(lse_local - lse)``,
sending ``(w * dout, w * (rowsum(dout * out_local) - delta))`` back through the local (out, lse) gives
``dS = P * (dout V^T - delta)`` with the P of the whole row.

Cost: the allowed pairs in blocks of 128; the backward computes the forward again; a graph is compiled for each shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from longspan.attention.bands import Band, Bands, cut, dense, shift
from longspan.attention.kernels.contract import Backward, Forward, check_block, row_sums
from longspan.attention.merge import accumulator

BLOCK = 128  # rows and columns of flex's blocks
SHAPES = 1024  # graphs kept: blocks of a schedule come in a few shapes, and each is compiled once
_LEAST_BITMAPS = 8  # their number is rounded up to a power of two: it is part of the shape that a graph is compiled for


class Blocks(NamedTuple):
    """A mask in blocks of ``BLOCK`` x ``BLOCK``.

    Attributes:
        partial: (nq, nk) bool, which blocks are allowed in part; one that reaches over an end counts as such.
        filled: (nq, nk) bool, which blocks one band fills.
        bitmap_of: (nq, nk) int32, the bitmap of a partial block; 0 for others.
        bitmaps: (n, BLOCK, BLOCK) bool, each once.
    """

    partial: np.ndarray
    filled: np.ndarray
    bitmap_of: np.ndarray
    bitmaps: np.ndarray


def blocks_of(bands: Bands, num_q: int, num_k: int) -> Blocks:
    """The bands of a block of ``num_q`` queries and ``num_k`` keys in blocks for flex.

    Cost: O(blocks that bands touch) in numpy, and Python for the partial ones.
    """
    filled = np.zeros((-(-num_q // BLOCK), -(-num_k // BLOCK)), dtype=bool)
    touching: dict[tuple[int, int], list[Band]] = defaultdict(list)
    for band in bands:
        rows, columns = (np.arange(x0 // BLOCK, -(-x1 // BLOCK)) for x0, x1 in (band[:2], band[2:4]))
        q0, k0 = rows[:, None] * BLOCK, columns[None, :] * BLOCK
        a0, a1 = np.maximum(q0, band.q0), np.minimum(q0 + BLOCK, band.q1)
        c0, c1 = np.maximum(k0, band.k0), np.minimum(k0 + BLOCK, band.k1)
        low, high = c0 - (a1 - 1), c1 - 1 - a0
        some = np.maximum(low, band.lo) <= np.minimum(high, band.hi)
        whole = (a1 - a0 == BLOCK) & (c1 - c0 == BLOCK) & (low >= band.lo) & (high <= band.hi)
        filled[rows[:, None], columns] |= whole
        for row, column in np.argwhere(some & ~whole).tolist():
            touching[int(rows[row]), int(columns[column])].append(band)
    partial, index = np.zeros_like(filled), np.zeros(filled.shape, np.int32)
    known: dict[Bands, int] = {}
    for (row, column), some_bands in touching.items():
        if filled[row, column]:
            continue
        start = row * BLOCK, column * BLOCK
        q, k = ((first, min(first + BLOCK, num)) for first, num in zip(start, (num_q, num_k), strict=True))
        inside = shift(cut(some_bands, q, k), -start[0], -start[1])
        partial[row, column] = True
        index[row, column] = known.setdefault(inside, len(known))
    bitmaps = np.zeros((len(known), BLOCK, BLOCK), dtype=bool)
    for inside, number in known.items():
        bitmaps[number] = dense(inside, BLOCK, BLOCK)
    return Blocks(partial, filled, index, bitmaps)


def element_mask(index: Tensor, bitmaps: Tensor) -> Callable[..., Tensor]:
    """Flex's mask function of ``Blocks``: asked for elements of partial blocks alone."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return bitmaps[index[q // BLOCK, k // BLOCK], q % BLOCK, k % BLOCK]

    return allowed


@lru_cache(maxsize=32)
def _block_mask(bands: Bands, num_q: int, num_k: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~blocks, axis=1, kind="stable")
        count, index = blocks.sum(axis=1), order
        return tuple(torch.from_numpy(x.astype(np.int32)).to(device)[None, None] for x in (count, index))  # type: ignore[return-value]

    blocks = blocks_of(bands, num_q, num_k)
    padded = 1 << max(len(blocks.bitmaps) - 1, _LEAST_BITMAPS - 1).bit_length()
    bitmaps = np.zeros((padded, BLOCK, BLOCK), dtype=bool)
    bitmaps[: len(blocks.bitmaps)] = blocks.bitmaps
    # Transposed here, and not by `from_kv_blocks`: its vmap fails in an operator that a selective checkpoint watches.
    return BlockMask(
        (num_q, num_k),
        *listed(blocks.partial),
        *listed(blocks.filled),
        *listed(blocks.partial.T),
        *listed(blocks.filled.T),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=element_mask(torch.from_numpy(blocks.bitmap_of).to(device), torch.from_numpy(bitmaps).to(device)),
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
    """(out (b l h d), lse (b h l)) over the bands."""
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

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        with torch.no_grad():
            out, lse = _attend(q, k, v, bands, scale, softcap, compiled())
        return out.to(accumulator(q.dtype)), lse.to(accumulator(q.dtype))

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
        stream = torch.cuda.current_stream(q.device)

        def differentiate() -> tuple[Tensor, ...]:
            # Not in autograd's own thread of the device: that one runs the backward which waits for this.
            with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
                q_in, k_in, v_in = (x.detach().requires_grad_() for x in (q, k, v))
                out, local_lse = _attend(q_in, k_in, v_in, bands, scale, softcap, compiled())
                cotangents = local_cotangents(dout, out, local_lse, lse, delta)
                return torch.autograd.grad((out, local_lse), (q_in, k_in, v_in), cotangents)

        # Inside a custom op (where the project's attention runs) this thread's autograd is switched off, whatever
        # enable_grad says; a new thread starts with it on.
        with ThreadPoolExecutor(1) as thread:
            dq, dk, dv = thread.submit(differentiate).result()
        wide = accumulator(q.dtype)
        return dq.to(wide), dk.to(wide), dv.to(wide)


def local_cotangents(dout: Tensor, out: Tensor, local_lse: Tensor, lse: Tensor, delta: Tensor) -> Forward:
    """What to send back through a local (out, lse) for the gradient of the whole row: see the module's docstring."""
    out, local_lse = out.detach(), local_lse.detach()
    weight = torch.exp(local_lse.float() - lse.float().masked_fill(lse == -torch.inf, 0))
    through_lse = weight * (row_sums(dout.float(), out.float()) - delta.float())
    through_out = weight.transpose(1, 2).unsqueeze(-1) * dout.float()
    return through_out.to(out.dtype), through_lse.to(local_lse.dtype)
