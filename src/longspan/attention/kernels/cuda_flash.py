"""Torch's built-in flash attention for CUDA on blocks: one call a band, merged exactly.

Kernel: ``aten._flash_attention_forward`` and its backward (FlashAttention-2, Dao 2023, arXiv:2307.08691). Its window is
aligned to the bottom right corner, so a tight band with any two diagonals is one call. What differs: results of several
bands merged in float32, and the backward of a block from the lse and delta of the whole row (the kernel computes delta
itself, from a stand-in for ``out``). Cost: the allowed pairs, rounded up to the kernel's tiles; float32 for out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.bands import Bands
from longspan.attention.kernels.accumulate import backward_calls, forward_calls
from longspan.attention.kernels.calls import Call, plan_windows, window
from longspan.attention.kernels.contract import Backward, Forward, check_block, stand_in

MAX_HEAD_DIM = 256


def _sides(call: Call) -> tuple[int, int]:
    """Window (left, right) of any call: full and causal calls (squares) are windows too."""
    if call.kind == "window":
        return window(call)
    return (-1, 0) if call.kind == "causal" else (-1, -1)


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """One call: (out (b l h d) in 16 bit, lse (b h l) in float32) on the call's rows."""
    q, k, v = (_rows_whole(x) for x in (q[:, call.q0 : call.q1], k[:, call.k0 : call.k1], v[:, call.k0 : call.k1]))
    left, right = _sides(call)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    # The kernel may pad its lse to whole tiles.
    return out, lse[:, :, : q.shape[1]]


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One call's (dq, dk, dv) in 16 bit; ``out`` is the stand-in, ``lse`` (b h lq) float32 of the whole row."""
    rows, columns = slice(call.q0, call.q1), slice(call.k0, call.k1)
    q, k, v = (_rows_whole(x) for x in (q[:, rows], k[:, columns], v[:, columns]))
    left, right = _sides(call)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of a dropout that is not there
    return torch.ops.aten._flash_attention_backward(
        dout[:, rows].contiguous(),
        q,
        k,
        v,
        out[:, rows].contiguous(),
        lse[:, :, rows].contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        unused,
        unused[0],
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )


def reason_against(q: Tensor, softcap: float | None, max_head_dim: int) -> str | None:
    """Why a 16-bit CUDA kernel without softcap cannot take such tensors, or None."""
    if q.device.type != "cuda":
        return f"it takes CUDA tensors, not {q.device.type}"
    if softcap is not None:
        return "it has no softcap"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > max_head_dim:
        return f"the head dim must be a multiple of 8 up to {max_head_dim}, got {q.shape[-1]}"
    return None


class CudaFlash:
    """Torch's CUDA flash attention. Every mask and head grouping, 16-bit types; no softcap."""

    name = "cuda_flash"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        reason = reason_against(q, softcap, MAX_HEAD_DIM)
        if reason is None and torch.cuda.get_device_capability(q.device) < (8, 0):
            return "flash attention needs a GPU of compute capability 8.0 or later"
        return reason

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        return forward_calls(q, plan_windows(bands), lambda call: flash_forward(q, k, v, call, scale))

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
        if out is None:
            dout, out = stand_in(dout, delta.float(), q.dtype)
        lse = lse.float().masked_fill(lse == -torch.inf, 0)
        return backward_calls(
            q, k, v, plan_windows(bands), lambda call: flash_backward(dout, q, k, v, out, lse, call, scale)
        )
