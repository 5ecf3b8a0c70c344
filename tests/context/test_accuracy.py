"""Rounding: the error of split attention is at most twice that of the plain formula, and does not grow with the ranks.

Errors are root mean squares against float64 on the same (rounded) inputs. The bound on growth is sqrt(2): the kernel
may round each block's output to the inputs' dtype; merging weighs blocks by shares that add up to 1, so all these
roundings together are at most as large as one, and the last rounding, which a single block has too, is as large again.
Gradients are summed in fp32: P summands round P times, each by 2^-24/sqrt(3) of the sum in root mean square, which
counts only where the inputs are fp32 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.attention.bands import Bands
from longspan.attention.kernels import Kernel, pick
from longspan.context.emulate import emulate
from longspan.context.engine import Settings
from longspan.context.methods import builder
from longspan.context.passes import prune_schedule
from longspan.layout.tokens import make_layout
from tests.context.cases import MASKS, geometry_of, inputs
from tests.oracles.attention import dense_attention

S, H, G, D = 128, 4, 2, 32
SCALE = D**-0.5
WORLDS = (1, 2, 3, 4, 8, 16)
METHODS = {
    "ring": "striped",
    "zigzag": "zigzag",
    "descending": "zigzag",
    "token_ring": "contiguous",
    "ulysses": "contiguous",
    "usp": "zigzag",
    "mask_aware": "zigzag",
    "kept_keys": "zigzag",
}  # and the layout
RANKS_GROWTH = 2**0.5
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Inputs of a dtype, the float64 results, and the plain formula's errors."""

    tensors: tuple[Tensor, ...]
    exact: tuple[np.ndarray, ...]
    plain_errors: tuple[float, ...]


def _error(got: Tensor, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got.double().numpy() - exact) ** 2) / np.mean(exact**2)))


def _plain(tensors: list[Tensor], allowed: Tensor) -> tuple[Tensor, ...]:
    """softmax(q k^T) v and its autograd gradients, every step in the inputs' dtype."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    keys, values = (x.repeat_interleave(H // G, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * SCALE
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


@cache
def _problem(mask: str, dtype: torch.dtype) -> Problem:
    tensors = inputs(S, H, G, dtype=dtype, d=D, b=1)
    allowed = MASKS[mask](S).dense()
    q, k, v, dout = (x.double() for x in tensors)
    dense = dense_attention(q, k, v, dout, allowed.numpy())
    exact = dense.out, dense.dq, dense.dk, dense.dv
    plain = _plain(tensors, allowed)
    return Problem(tuple(tensors), exact, tuple(_error(x, y) for x, y in zip(plain, exact, strict=True)))


def _errors(method: str, mask: str, dtype: torch.dtype, world: int, kernel: Kernel | None = None) -> list[float]:
    problem = _problem(mask, dtype)
    geometry = geometry_of(MASKS[mask](S), make_layout(METHODS[method], S, world))
    schedule = prune_schedule(builder(method, world)(geometry.layout, H, G), geometry)
    q, k, v, dout = problem.tensors
    settings = Settings(kernel or pick(q, softcap=None), SCALE, None)
    got = emulate(schedule, geometry, q, k, v, settings, dout)
    assert got.grads is not None and got.out.dtype == dtype
    return [_error(x, y) for x, y in zip((got.out, *got.grads), problem.exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "full", "documents"])
@pytest.mark.parametrize("method", METHODS)
def test_error_is_at_most_twice_the_plain_formulas_and_does_not_grow(
    method: str, mask: str, dtype: torch.dtype
) -> None:
    plain = _problem(mask, dtype).plain_errors
    alone = _errors(method, mask, dtype, 1)
    for world in WORLDS:
        for name, error, own, reference in zip(NAMES, _errors(method, mask, dtype, world), alone, plain, strict=True):
            assert error <= 2 * reference, f"{name} on {world} ranks: {error:.2e}, plain formula {reference:.2e}"
            assert error <= RANKS_GROWTH * own + (world / 3) ** 0.5 * 2**-24, (
                f"{name} on {world} ranks: {error:.2e}, on one rank {own:.2e}"
            )


class _Rounding:
    """The reference kernel with a common mistake: one of its results in 16 bits."""

    name = "rounding"

    def __init__(self, what: str) -> None:
        self._kernel, self._what = pick(torch.zeros(1, 1, 1, 1), softcap=None, name="reference"), what

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, *, scale: float, softcap: float | None):
        out, lse = self._kernel.forward(q, k, v, bands, scale=scale, softcap=softcap)
        return out, lse.bfloat16().to(lse.dtype) if self._what == "lse" else lse

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return None

    def backward(self, dout, q, k, v, lse, delta, bands, *, scale, softcap, out=None):
        grads = self._kernel.backward(dout, q, k, v, lse, delta, bands, scale=scale, softcap=softcap)
        return tuple(x.bfloat16().to(x.dtype) for x in grads) if self._what == "gradients" else grads


@pytest.mark.parametrize("what", ["lse", "gradients"])
def test_the_rule_bites(what: str) -> None:
    """A 16-bit lse, or 16-bit gradients of blocks, under fp32 inputs break the rule that a right kernel keeps."""
    plain = _problem("full", torch.float32).plain_errors
    wrong = _errors("ring", "full", torch.float32, 8, _Rounding(what))  # type: ignore[arg-type]
    assert any(error > 2 * reference for error, reference in zip(wrong, plain, strict=True))
    right = _errors("ring", "full", torch.float32, 8, _Rounding("nothing"))  # type: ignore[arg-type]
    assert all(error <= 2 * reference for error, reference in zip(right, plain, strict=True))
