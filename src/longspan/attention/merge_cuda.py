"""Merging on CUDA in one pass over memory, of up to four partial results at once: the torch form makes three a part.

Triton; imported by ``attention.merge`` where a merge has CUDA tensors, so that machines without it need not have it.
"""

# Triton comes with CUDA builds of torch only.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

MOST = 4  # parts of one launch
_ROWS = 16  # rows (of one head) per program


@triton.jit
def _lse_of(lse, token, head, num_tokens, num_heads, s_b, s_h, s_l, batch, row, at_head):
    """The part's lse of some rows of the whole, -inf where it has none."""
    inside = (row >= token) & (row < token + num_tokens) & (at_head >= head) & (at_head < head + num_heads)
    return tl.load(lse + batch * s_b + (at_head - head) * s_h + (row - token) * s_l, mask=inside, other=float("-inf"))


@triton.jit
def _rows_of(out, token, head, num_tokens, num_heads, s_b, s_l, s_h, batch, row, at_head, column, live):
    inside = (row >= token) & (row < token + num_tokens) & (at_head >= head) & (at_head < head + num_heads)
    at = out + batch * s_b + (row[:, None] - token) * s_l + (at_head - head) * s_h + column[None, :]
    return tl.load(at, mask=inside[:, None] & live, other=0.0).to(tl.float32)


# A variant for each way in which a place happens to be divisible would be compiled in the middle of a run.
_PLACES = ["first_row", "num_rows", *(f"{part}_{place}" for part in "abcd" for place in ("t", "h", "nt", "nh"))]


@triton.jit(do_not_specialize=_PLACES)
def _merge(
    out, lse, first_row, num_rows, num_heads, head_dim, to_ob, to_ol, to_oh, to_lb, to_lh, to_ll,
    a, a_lse, a_t, a_h, a_nt, a_nh, a_ob, a_ol, a_oh, a_lb, a_lh, a_ll,
    b, b_lse, b_t, b_h, b_nt, b_nh, b_ob, b_ol, b_oh, b_lb, b_lh, b_ll,
    c, c_lse, c_t, c_h, c_nt, c_nh, c_ob, c_ol, c_oh, c_lb, c_lh, c_ll,
    d, d_lse, d_t, d_h, d_nt, d_nh, d_ob, d_ol, d_oh, d_lb, d_lh, d_ll,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)  # times a stride it can pass 2^31
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = (first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = row < first_row + num_rows
    live = inside[:, None] & (column < head_dim)[None, :]
    lse_a = _lse_of(a_lse, a_t, a_h, a_nt, a_nh, a_lb, a_lh, a_ll, batch, row, head)
    lse_b = _lse_of(b_lse, b_t, b_h, b_nt, b_nh, b_lb, b_lh, b_ll, batch, row, head)
    lse_c = _lse_of(c_lse, c_t, c_h, c_nt, c_nh, c_lb, c_lh, c_ll, batch, row, head)
    lse_d = _lse_of(d_lse, d_t, d_h, d_nt, d_nh, d_lb, d_lh, d_ll, batch, row, head)
    peak, sure = tl.maximum(tl.maximum(lse_a, lse_b), tl.maximum(lse_c, lse_d)), lse_a + lse_b + lse_c + lse_d
    empty = peak == float("-inf")
    base = tl.where(empty, 0.0, peak)  # -inf - (-inf) is NaN
    share_a, share_b, share_c, share_d = (
        tl.exp(lse_a - base), tl.exp(lse_b - base), tl.exp(lse_c - base), tl.exp(lse_d - base)
    )  # fmt: skip
    whole = share_a + share_b + share_c + share_d
    total, whole = tl.log(whole) + base, tl.where(empty, 1.0, whole)
    unknown = sure != sure  # NaN stays visible: a maximum would drop it
    total, whole = tl.where(unknown, sure, total), tl.where(unknown, sure, whole)
    part_a = _rows_of(a, a_t, a_h, a_nt, a_nh, a_ob, a_ol, a_oh, batch, row, head, column, live)
    part_b = _rows_of(b, b_t, b_h, b_nt, b_nh, b_ob, b_ol, b_oh, batch, row, head, column, live)
    part_c = _rows_of(c, c_t, c_h, c_nt, c_nh, c_ob, c_ol, c_oh, batch, row, head, column, live)
    part_d = _rows_of(d, d_t, d_h, d_nt, d_nh, d_ob, d_ol, d_oh, batch, row, head, column, live)
    # Each part has its own weight: 1 - weight would lose a small share of large values in rounding.
    merged = part_a * (share_a / whole)[:, None] + part_b * (share_b / whole)[:, None]
    merged += part_c * (share_c / whole)[:, None] + part_d * (share_d / whole)[:, None]
    at_out = out + batch * to_ob + row[:, None] * to_ol + head * to_oh + column[None, :]
    tl.store(at_out, merged.to(out.dtype.element_ty), mask=live)
    tl.store(lse + batch * to_lb + head * to_lh + row * to_ll, total, mask=inside)


def merge_rows(
    out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor, int, int]], first: int, last: int
) -> None:
    """Rows ``first`` to ``last`` of (out, lse) from at most ``MOST``; see ``attention.merge``.

    Parts are (out, lse, token, head), with the place of their first row and head. One may be (out, lse) itself. The
    last dim of all outs is contiguous, the lse is float32.
    """
    b, _, num_heads, head_dim = out.shape
    arguments = []
    for number in range(MOST):
        part, part_lse, token, head = parts[min(number, len(parts) - 1)]
        rows = part.shape[1] if number < len(parts) else 0  # what stands for no part has no rows
        arguments += [part, part_lse, token, head, rows, part.shape[2], *part.stride()[:3], *part_lse.stride()]
    grid = triton.cdiv(last - first, _ROWS), b * num_heads
    _merge[grid](
        out, lse, first, last - first, num_heads, head_dim, *out.stride()[:3], *lse.stride(), *arguments,
        ROWS=_ROWS, WIDTH=triton.next_power_of_2(head_dim),
    )  # fmt: skip
