"""The yardstick of small exact checks: dense attention from the formula, and how wrong a result may be.

A result in some dtype is judged against the formula in float64 on the same inputs; it may be twice as far off as the
plain formula evaluated in that dtype, and never need be closer than three roundings to that dtype (of the weights, of a
block's output, of the result: half a unit in the last place each) and some dozens of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.attention.bands import cut, dense, shift
from longspan.attention.masks import Mask

_ROWS = 512  # queries at a time in the answer by rows: its memory is linear in the length
_ROUNDINGS = 3
_SUM_ROUNDINGS = 64  # some dozens of additions in another order


class Inputs(NamedTuple):
    """q, dout (b s h d), k, v (b s g d): the same on every rank and device."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def to(self, where: torch.device | torch.dtype) -> Inputs:
        return Inputs(*(x.to(where) for x in self))


class Results(NamedTuple):
    """out, dq (b s h d), dk, dv (b s g d)."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(
    num_tokens: int, *, h: int = 4, g: int = 2, d: int = 16, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Inputs:
    """Normal values, already rounded to ``dtype``; the same in every process, but not on every kind of device."""
    generator = torch.Generator(device).manual_seed(num_tokens)

    def draw(heads: int) -> Tensor:
        shape = (1, num_tokens, heads, d)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)

    return Inputs(draw(h), draw(g), draw(g), draw(h))


def formula(inputs: Inputs, allowed: Bool[Tensor, "s s"]) -> Results:
    """softmax(q k^T / sqrt(d)) v and its gradients, densely, in the dtype of the inputs. Every row has a key."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    share = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(share, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[3] ** -0.5
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return Results(out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout))


def formula_by_rows(inputs: Inputs, mask: Mask) -> Results:
    """``formula``, some rows at a time: P = softmax(S), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)).

    Sums over rows are taken in float32 at least, as any kernel does. Every row has a key.
    """
    q, k, v, _ = inputs
    sums = torch.promote_types(q.dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
    for start in range(0, mask.num_tokens, _ROWS):
        rows = range(start, min(start + _ROWS, mask.num_tokens))
        part = slice(rows.start, rows.stop)
        out[:, part], dq[:, part] = formula_of_rows(inputs, mask, rows, (dk, dv))
    return Results(out, dq, dk.to(q.dtype), dv.to(q.dtype))


def formula_of_rows(
    inputs: Inputs, mask: Mask, rows: Sequence[int], add_to: tuple[Tensor, Tensor] | None = None
) -> tuple[Float[Tensor, "1 r h d"], Float[Tensor, "1 r h d"]]:
    """out and dq of some rows of one sequence; what they give to dk and dv is added to ``add_to`` (1 s g d)."""
    q, k, v, dout = (x[0].transpose(0, 1) for x in inputs)  # (h or g) s d
    share, scale = q.shape[0] // k.shape[0], q.shape[2] ** -0.5
    allowed = torch.from_numpy(_allowed(mask, rows)).to(q.device)
    seen = allowed.any(dim=0).nonzero()
    columns = slice(int(seen[0]), int(seen[-1]) + 1)
    forbidden = ~allowed[:, columns]
    index = torch.tensor(rows, device=q.device)
    results = []
    for head in range(q.shape[0]):
        kv = head // share
        queries, keys, values, grads = q[head, index], k[kv, columns], v[kv, columns], dout[head, index]
        scores = (queries @ keys.T * scale).masked_fill_(forbidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        out = weights @ values
        delta = (grads * out).sum(-1, keepdim=True)
        dscores = weights * (grads @ values.T - delta) * scale
        results.append((out, dscores @ keys))
        if add_to is not None:
            add_to[0][0, columns, kv] += dscores.T @ queries
            add_to[1][0, columns, kv] += weights.T @ grads
    out, dq = (torch.stack(x, dim=1)[None] for x in zip(*results, strict=True))
    return out, dq


def _allowed(mask: Mask, rows: Sequence[int]) -> np.ndarray:
    """Some rows of the dense mask, in rising order, without the others."""
    first, last = rows[0], rows[-1] + 1
    near = [band for band in mask.bands if band.q0 < last and band.q1 > first]
    if len(rows) == last - first:
        return dense(shift(cut(near, (first, last), (0, mask.num_tokens)), -first, 0), len(rows), mask.num_tokens)
    return np.concatenate([_allowed(mask, range(row, row + 1)) for row in rows])


def excess(
    got: Sequence[Float[Tensor, ...]], exact: Sequence[Float[Tensor, ...]], plain: Sequence[Float[Tensor, ...]]
) -> float:
    """The worst error as a multiple of what is allowed (1 is the limit; NaN counts as infinite).

    Args:
        got: results to judge, any device.
        exact: the same in float64.
        plain: the formula's, on the device of ``exact``; its dtype is the one that is judged and says what rounding is.
    """
    worst = 0.0
    for mine, reference, yardstick in zip(got, exact, plain, strict=True):
        if mine.shape != reference.shape:
            raise ValueError(f"a result must have the shape {tuple(reference.shape)}, got {tuple(mine.shape)}")
        if not reference.numel():
            continue
        sums = torch.promote_types(yardstick.dtype, torch.float32)
        rounding = _ROUNDINGS / 2 * torch.finfo(yardstick.dtype).eps + _SUM_ROUNDINGS * torch.finfo(sums).eps
        limit = max(2 * float((yardstick.double() - reference).abs().max()), rounding * float(reference.abs().max()))
        error = float((mine.detach().to(reference) - reference).abs().max())
        worst = max(worst, error / limit if error == error else float("inf"))
    return worst
