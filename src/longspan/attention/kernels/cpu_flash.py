"""Torch's flash attention for CPU on blocks: few calls to aten, merged exactly.

Kernel: ``aten._scaled_dot_product_flash_attention_for_cpu`` and its backward (FlashAttention-2, Dao 2023,
arXiv:2307.08691, on AVX). What differs: any bands (see ``calls``), results of several calls merged in float32, and the
backward of a block from the lse and delta of the whole row. Rows without a key, for which aten returns lse 0, are put
right. The backward of 16-bit inputs is computed in float32: summed over calls and heads, 16-bit gradients had up to 2.7
times the error of the plain formula. So is the forward of float16, in which aten is slow.
Cost: the allowed pairs, plus half a tile of rows along each lower diagonal; memory b * lq * h * d in float32 for out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.bands import Bands, dense
from longspan.attention.kernels.accumulate import backward_calls, forward_calls
from longspan.attention.kernels.calls import Call, plan_calls
from longspan.attention.kernels.contract import Backward, Forward, check_block, stand_in
from longspan.attention.merge import accumulator

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _forward_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


class _Masks:
    """Additive masks of one forward or backward; the tiles of a window share theirs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[tuple[Bands, int, int], tuple[Tensor, Tensor | None]] = {}

    def of(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """(mask to add, rows without a key or None) of a call; (None, None) where it needs none."""
        if call.kind != "masked":
            return None, None
        key = (call.bands, call.q1 - call.q0, call.k1 - call.k0)
        if key not in self._made:
            allowed = torch.from_numpy(dense(*key))
            empty = ~allowed.any(dim=1)
            mask = torch.zeros(allowed.shape, dtype=self._dtype).masked_fill_(~allowed, -torch.inf)
            self._made[key] = mask, empty if bool(empty.any()) else None
        return self._made[key]


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, l, h, d) -> (b, h, l, d) as aten takes it: any strides, but rows of d in one piece."""
    x = x.to(dtype)
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


class CpuFlash:
    """Torch's CPU flash attention. Every mask and head grouping; no softcap."""

    name = "cpu_flash"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        if q.device.type != "cpu":
            return f"it takes CPU tensors, not {q.device.type}"
        if softcap is not None:
            return "torch's CPU flash attention has no softcap"
        if q.dtype not in _DTYPES:
            return f"it takes {', '.join(str(dtype) for dtype in _DTYPES)}, not {q.dtype}"
        return None

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return accumulator(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        compute = _forward_dtype(q.dtype)
        masks = _Masks(compute)
        q_in, k_in, v_in = (_heads_first(x, compute) for x in (q, k, v))

        def one(call: Call) -> tuple[Tensor, Tensor]:
            mask, empty = masks.of(call)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_in[:, :, call.q0 : call.q1],
                k_in[:, :, call.k0 : call.k1],
                v_in[:, :, call.k0 : call.k1],
                0.0,
                call.kind == "causal",
                attn_mask=mask,
                scale=scale,
            )
            return out.transpose(1, 2), lse if empty is None else lse.masked_fill_(empty, -torch.inf)

        return forward_calls(q, plan_calls(bands), one)

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
        dtype = accumulator(q.dtype)
        masks = _Masks(dtype)
        q_in, k_in, v_in = (_heads_first(x, dtype) for x in (q, k, v))
        if out is None:
            dout, out = stand_in(dout, delta.to(dtype), dtype)
        dout_in, out_in = dout.transpose(1, 2), out.transpose(1, 2)
        # A row that is empty in the whole sequence is masked or in no call: any finite lse keeps it free of NaN.
        row_lse = lse.to(dtype).masked_fill(lse == -torch.inf, 0)

        def one(call: Call) -> tuple[Tensor, Tensor, Tensor]:
            rows, columns = slice(call.q0, call.q1), slice(call.k0, call.k1)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout_in[:, :, rows],
                q_in[:, :, rows],
                k_in[:, :, columns],
                v_in[:, :, columns],
                out_in[:, :, rows],
                row_lse[:, :, rows],
                0.0,
                call.kind == "causal",
                attn_mask=masks.of(call)[0],
                scale=scale,
            )
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

        return backward_calls(q, k, v, plan_calls(bands), one)
