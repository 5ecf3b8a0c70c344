"""The yardstick of small exact checks: dense attention from the formula, and how wrong a result may be.

A result in some dtype is judged against the formula in float64 on the same inputs; it may be twice as far off as the
plain formula evaluated in that dtype, and never need be closer than three roundings to that dtype (of the weights, of a
block's output, of the result: half a unit in the last place each) and some dozens of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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


def make_inputs(num_tokens: int, *, h: int = 4, g: int = 2, d: int = 16, dtype: torch.dtype) -> Inputs:
    """Normal values on the CPU, already rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, num_tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype)

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


def excess(
    got: Sequence[Float[Tensor, ...]], exact: Sequence[Float[Tensor, ...]], plain: Sequence[Float[Tensor, ...]]
) -> float:
    """The worst error as a multiple of what is allowed (1 is the limit; NaN counts as infinite).

    Args:
        got: results to judge, any device.
        exact: the same in float64.
        plain: the formula's, in the dtype that is judged; its dtype says what rounding is.
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
        error = float((mine.detach().cpu().double() - reference).abs().max())
        worst = max(worst, error / limit if error == error else float("inf"))
    return worst
