"""Merging of partial softmax attention: the only place where two partial results become one.

Attention over disjoint sets of keys merges exactly from (out, lse) of each: with ``lse = logaddexp(lse_a, lse_b)``,
``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)`` (FlashAttention, Dao et al. 2022, arXiv:2205.14135,
section 3.1; Ring Attention, Liu et al. 2023, arXiv:2310.01889). What differs: a row that has seen no key has
``lse = -inf`` and ``out = 0``, and keeps them when both sides are empty. Cost: one pass over ``out``, three temporaries
of the size of lse; on CUDA one kernel without temporaries (``merge_cuda``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ACCUMULATORS = (torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results of inputs of ``dtype`` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(
    out: Float[Tensor, "b l h d"],
    lse: Float[Tensor, "b h l"],
    new_out: Float[Tensor, "b l h d"],
    new_lse: Float[Tensor, "b h l"],
) -> None:
    """Merges a second partial result into (out, lse), in place.

    Args:
        out: attention over the keys seen so far, float32 or float64; 0 in rows that have seen none. A view is fine.
        lse: natural log of the sum of exponentials of the scores, -inf in rows that have seen no key.
        new_out: the same over other keys, of any floating dtype.
        new_lse: its lse.

    Raises:
        ValueError: out or lse is of a lower precision than float32, in which sums must not be kept.
    """
    if out.dtype not in ACCUMULATORS or lse.dtype not in ACCUMULATORS:
        raise ValueError(
            f"partial results are kept in float32 or float64, got out {out.dtype} and lse {lse.dtype}; convert them"
        )
    if _in_one_pass(out, [new_out]):
        from longspan.attention.merge_cuda import merge_rows

        merge_rows(out, lse, [(out, lse, 0, 0), (new_out, new_lse, 0, 0)], 0, out.shape[1])
        return
    new_lse = new_lse.to(lse.dtype)
    # A row that is empty on both sides is measured from 0, where exp(-inf) is 0. A NaN of the input stays visible.
    peak = torch.maximum(lse, new_lse)
    base = peak.masked_fill(peak == -torch.inf, 0)
    share, new_share = torch.exp(lse - base), torch.exp(new_lse - base)
    both = share + new_share
    total = base + torch.log(both)
    # Each side has its own weight: 1 - weight would lose a small share of large values in rounding.
    both.masked_fill_(both == 0, 1)
    weight, new_weight = ((x / both).transpose(1, 2).unsqueeze(-1).to(out.dtype) for x in (share, new_share))
    out.mul_(weight).addcmul_(new_out.to(out.dtype), new_weight)
    lse.copy_(total)


def _in_one_pass(out: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether ``merge_cuda`` takes them: rows of a head in one piece, sums in float32."""
    wide = any(x.dtype == torch.float64 for x in (out, *parts))
    return out.is_cuda and not wide and all(x.stride(-1) == 1 for x in (out, *parts)) and out.numel() > 0


class Placed(NamedTuple):
    """A partial result of some rows and heads of a whole, which begin at ``token`` and ``head`` there."""

    out: Float[Tensor, "b l h d"]
    lse: Float[Tensor, "b h l"]
    token: int
    head: int


def merge_into(out: Float[Tensor, "b l h d"], lse: Float[Tensor, "b h l"], parts: Sequence[Placed]) -> None:
    """The merged parts, in order; rows that no part has are empty.

    Args:
        out: written, of any floating dtype. It may be the first part's, as lse is then.
        lse: written, float32 or float64.
    """
    inner = out if out.dtype in ACCUMULATORS else None
    if len(parts) > 1 and _in_one_pass(out, [part.out for part in parts]):
        from longspan.attention.merge_cuda import MOST, merge_rows

        while len(parts) > MOST:
            inner = torch.empty_like(out, dtype=accumulator(out.dtype)) if inner is None else inner
            merge_rows(inner, lse, parts[:MOST], 0, out.shape[1])
            parts = [Placed(inner, lse, 0, 0), *parts[MOST:]]
        first, last = 0, out.shape[1]
        if parts[0].out is out:  # its other rows stay
            first = min(part.token for part in parts[1:])
            last = max(part.token + part.out.shape[1] for part in parts[1:])
        merge_rows(out, lse, parts, first, last)
        return
    if parts[0].out is out and inner is not None:
        parts = parts[1:]
    else:
        inner, total = torch.zeros_like(out, dtype=accumulator(out.dtype)), torch.full_like(lse, -torch.inf)
        rows, row_lse = _place(inner, total, parts[0])
        rows.copy_(parts[0].out)
        row_lse.copy_(parts[0].lse)
        lse.copy_(total)
        parts = parts[1:]
    for part in parts:
        merge_(*_place(inner, lse, part), part.out, part.lse)
    if inner is not out:
        out.copy_(inner)


def _place(out: Tensor, lse: Tensor, part: Placed) -> tuple[Tensor, Tensor]:
    """The views of a whole that a part has."""
    _, num_tokens, num_heads, _ = part.out.shape
    tokens, heads = slice(part.token, part.token + num_tokens), slice(part.head, part.head + num_heads)
    return out[:, tokens, heads], lse[:, heads, tokens]


def merge(
    parts: Iterable[tuple[Float[Tensor, "b l h d"], Float[Tensor, "b h l"]]],
) -> tuple[Float[Tensor, "b l h d"], Float[Tensor, "b h l"]]:
    """One result from partial results over disjoint keys; the parts stay as they are.

    Raises:
        ValueError: there is no part.
    """
    out: Tensor | None = None
    lse: Tensor | None = None
    for new_out, new_lse in parts:
        if out is None or lse is None:
            out = new_out.to(accumulator(new_out.dtype), copy=True)
            lse = new_lse.to(accumulator(new_lse.dtype), copy=True)
        else:
            merge_(out, lse, new_out, new_lse)
    if out is None or lse is None:
        raise ValueError("merge needs at least one partial result, got none; pass (out, lse) pairs")
    return out, lse
