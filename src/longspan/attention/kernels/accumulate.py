"""Sums of the calls of one block: what every kernel that makes several library calls does with their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention.kernels.calls import Call
from longspan.attention.kernels.contract import Backward, Forward
from longspan.attention.merge import Placed, accumulator, merge_, merge_into

_AT_ONCE = 4  # calls whose results are merged in one pass on CUDA; of many, each may have few of the rows


def forward_calls(q: Tensor, plan: Sequence[Call], compute: Callable[[Call], tuple[Tensor, Tensor]]) -> Forward:
    """(out, lse) of a block from ``compute(call) -> (out (b l h d), lse (b h l))`` on the call's rows.

    The result of a plan of one call that covers all rows is returned as it is, in the dtype that the call gives.
    """
    b, length, h, _ = q.shape
    dtype = accumulator(q.dtype)
    if len(plan) == 1 and plan[0].q1 - plan[0].q0 == length:
        out, lse = compute(plan[0])
        return out, lse.to(dtype)
    if q.is_cuda and 0 < len(plan) <= _AT_ONCE:
        parts = [Placed(*compute(call), call.q0, 0) for call in plan]
        whole = all(call.fresh for call in plan)  # no row is of two calls
        out = torch.empty(q.shape, dtype=parts[0].out.dtype if whole else dtype, device=q.device)
        lse = torch.empty((b, h, length), dtype=dtype, device=q.device)
        merge_into(out, lse, parts)
        return out, lse
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((b, h, length), -torch.inf, dtype=dtype, device=q.device)
    for call in plan:
        new_out, new_lse = compute(call)
        rows, row_lse = out[:, call.q0 : call.q1], lse[:, :, call.q0 : call.q1]
        if call.fresh:
            rows.copy_(new_out)
            row_lse.copy_(new_lse)
        else:
            merge_(rows, row_lse, new_out, new_lse)
    return out, lse


def backward_calls(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Call], compute: Callable[[Call], tuple[Tensor, Tensor, Tensor]]
) -> Backward:
    """(dq, dk, dv) of a block from ``compute(call) -> (dq, dk, dv)``, each (b l h d) on the call's rows or columns.

    The result of a plan of one call that covers the block is returned as it is, in the dtype that the call gives.
    """
    dtype = accumulator(q.dtype)
    if len(plan) == 1 and plan[0][:4] == (0, q.shape[1], 0, k.shape[1]):
        return compute(plan[0])
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for call in plan:
        new_dq, new_dk, new_dv = compute(call)
        dq[:, call.q0 : call.q1] += new_dq
        dk[:, call.k0 : call.k1] += new_dk
        dv[:, call.k0 : call.k1] += new_dv
    return dq, dk, dv
