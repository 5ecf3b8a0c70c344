"""cuDNN's fused attention on blocks: full and causal calls, flash attention for the rest.

Kernel: ``aten._scaled_dot_product_cudnn_attention`` and its backward, on Hopper 1.5 to 1.8 times as fast as torch's
flash attention. It knows "full" and "causal", not windows: bands bounded below and bands too small to be worth two
calls go to ``cuda_flash``. What differs otherwise is as there. Its backward adds up dq in no fixed order, so it is
refused under ``torch.use_deterministic_algorithms(True)``, as torch's own attention does; flash attention then takes
its deterministic backward. Cost: the allowed pairs; float32 for out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.bands import Bands
from longspan.attention.kernels.accumulate import backward_calls, forward_calls
from longspan.attention.kernels.calls import Call, plan_windows
from longspan.attention.kernels.contract import Backward, Forward, check_block, stand_in
from longspan.attention.kernels.cuda_flash import flash_backward, flash_forward, reason_against

MAX_HEAD_DIM = 128
MIN_SQUARE = 256  # rows and columns below which splitting a band in several calls does not pay


def _heads_first(x: Tensor) -> Tensor:
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


class Cudnn:
    """cuDNN attention. Every mask and head grouping, 16-bit types; no softcap."""

    name = "cudnn"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        reason = reason_against(q, softcap, MAX_HEAD_DIM)
        if reason is not None:
            return reason
        if not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN"
        if torch.cuda.get_device_capability(q.device) < (9, 0):
            return "cuDNN attention is used from compute capability 9.0 on"
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            return "its backward is not deterministic, and torch.use_deterministic_algorithms(True) is in force"
        return None

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None) -> Forward:
        check_block(self, q, k, v, softcap)
        q_in, k_in, v_in = (_heads_first(x) for x in (q, k, v))

        def one(call: Call) -> tuple[Tensor, Tensor]:
            if call.kind == "window":
                return flash_forward(q, k, v, call, scale)
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q_in[:, :, call.q0 : call.q1],
                k_in[:, :, call.k0 : call.k1],
                v_in[:, :, call.k0 : call.k1],
                None,
                True,
                0.0,
                call.kind == "causal",
                False,
                scale=scale,
            )
            return out.transpose(1, 2), lse.reshape(out.shape[:3])

        return forward_calls(q, plan_windows(bands, MIN_SQUARE), one)

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
        q_in, k_in, v_in = (_heads_first(x) for x in (q, k, v))
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # state of a dropout that is not there

        def one(call: Call) -> tuple[Tensor, Tensor, Tensor]:
            if call.kind == "window":
                return flash_backward(dout, q, k, v, out, lse, call, scale)
            rows, columns = slice(call.q0, call.q1), slice(call.k0, call.k1)
            # dout and out must agree in their strides: both are contiguous rows.
            grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout[:, rows].contiguous().transpose(1, 2),
                q_in[:, :, rows],
                k_in[:, :, columns],
                v_in[:, :, columns],
                out[:, rows].contiguous().transpose(1, 2),
                lse[:, :, rows].contiguous().unsqueeze(-1),
                unused,
                unused,
                None,
                None,
                None,
                call.q1 - call.q0,
                call.k1 - call.k0,
                0.0,
                call.kind == "causal",
                scale=scale,
            )
            dq, dk, dv = (x.transpose(1, 2) for x in grads)
            return dq, dk, dv

        return backward_calls(q, k, v, plan_windows(bands, MIN_SQUARE), one)
