"""``merge_`` on CUDA in one pass over memory: the torch form makes three, and temporaries.

Triton; imported by ``attention.merge`` where a merge has CUDA tensors, so that machines without it need not have it.
"""

# Triton comes with CUDA builds of torch only.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # rows (of one head) per program


@triton.jit
def _merge(
    out, lse, new_out, new_lse, num_tokens, num_heads, head_dim,
    out_b, out_l, out_h, lse_b, lse_h, lse_l, new_b, new_l, new_h, new_lse_b, new_lse_h, new_lse_l,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)  # times a stride it can pass 2^31
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    live = row < num_tokens
    at_lse = batch * lse_b + head * lse_h + row * lse_l
    old = tl.load(lse + at_lse, mask=live, other=float("-inf"))
    new = tl.load(new_lse + batch * new_lse_b + head * new_lse_h + row * new_lse_l, mask=live, other=float("-inf"))
    peak = tl.maximum(old, new)
    empty = peak == float("-inf")
    base = tl.where(empty, 0.0, peak)  # -inf - (-inf) is NaN
    mine_share, other_share = tl.exp(old - base), tl.exp(new - base)
    both_shares = mine_share + other_share
    total = tl.log(both_shares) + base
    whole = tl.where(empty, 1.0, both_shares)
    # Each side has its own weight: 1 - weight would lose a small share of large values in rounding.
    weight, new_weight = mine_share / whole, other_share / whole
    # NaN stays visible: a maximum would drop it.
    unknown = (old != old) | (new != new)
    total, weight = tl.where(unknown, old + new, total), tl.where(unknown, old + new, weight)
    both = live[:, None] & (column < head_dim)[None, :]
    at_out = out + batch * out_b + head * out_h + row[:, None] * out_l + column[None, :]
    at_new = new_out + batch * new_b + head * new_h + row[:, None] * new_l + column[None, :]
    mine = tl.load(at_out, mask=both, other=0.0)
    other = tl.load(at_new, mask=both, other=0.0).to(mine.dtype)
    merged = mine * weight[:, None].to(mine.dtype) + other * new_weight[:, None].to(mine.dtype)
    tl.store(at_out, merged, mask=both)
    tl.store(lse + at_lse, total, mask=live)


def merge_rows_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """``attention.merge.merge_`` for float32 sums on CUDA, whose last dim is contiguous in out and new_out."""
    b, num_tokens, num_heads, head_dim = out.shape
    grid = triton.cdiv(num_tokens, _ROWS), b * num_heads
    _merge[grid](
        out, lse, new_out, new_lse, num_tokens, num_heads, head_dim,
        *out.stride()[:3], *lse.stride(), *new_out.stride()[:3], *new_lse.stride(),
        ROWS=_ROWS, WIDTH=triton.next_power_of_2(head_dim),
    )  # fmt: skip
