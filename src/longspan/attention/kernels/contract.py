"""What a block kernel is, and what all of them share: row sums, head grouping, the stand-in for ``out``.

A kernel computes attention of a block of queries on a block of keys under bands in the block's own rows and columns.
Its backward takes the lse and delta of the *whole* row, so that gradients of blocks add up to those of the row.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.attention.bands import Bands

Forward = tuple[Float[Tensor, "b lq h d"], Float[Tensor, "b h lq"]]
Backward = tuple[Float[Tensor, "b lq h d"], Float[Tensor, "b lk g d"], Float[Tensor, "b lk g d"]]


class Kernel(Protocol):
    """A back end for blocks of attention.

    Results are in the accumulation dtype (float32, or float64 for float64 inputs), or, lse excepted, in the inputs'
    where one library call has rounded them to it. ``h`` is a multiple of ``g``: query
    head i reads KV head i // (h // g). A row that the bands give no key has ``out`` 0 and ``lse`` -inf.
    """

    name: str

    def supports(
        self,
        q: Float[Tensor, "b lq h d"],
        k: Float[Tensor, "b lk g d"],
        v: Float[Tensor, "b lk g d"],
        *,
        softcap: float | None,
    ) -> str | None:
        """None where the kernel can take such tensors, else the reason in words."""
        ...

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """For inputs of ``dtype``, that of the ``out`` which backward wants; None where delta is enough."""
        ...

    def forward(
        self,
        q: Float[Tensor, "b lq h d"],
        k: Float[Tensor, "b lk g d"],
        v: Float[Tensor, "b lk g d"],
        bands: Bands,
        *,
        scale: float,
        softcap: float | None,
    ) -> Forward:
        """(out, lse): attention over the allowed keys of the block, and the natural log of its sum of exponentials."""
        ...

    def backward(
        self,
        dout: Float[Tensor, "b lq h d"],
        q: Float[Tensor, "b lq h d"],
        k: Float[Tensor, "b lk g d"],
        v: Float[Tensor, "b lk g d"],
        lse: Float[Tensor, "b h lq"],
        delta: Float[Tensor, "b h lq"],
        bands: Bands,
        *,
        scale: float,
        softcap: float | None,
        out: Float[Tensor, "b lq h d"] | None = None,
    ) -> Backward:
        """(dq, dk, dv) of the block, from the lse of the whole row and delta = rowsum(dout * out) of the whole row.

        ``out``: what ``stand_in`` made of dout and delta, in the kernel's ``out_dtype``, as is dout then: blocks of the
        same queries share it. A kernel that wants none ignores it.
        """
        ...


def check_block(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> None:
    """Refuses tensors that are not one block, or that the kernel does not support, in one line.

    Raises:
        ValueError: q, k, v are not (b, l, h, d), differ in dtype, the heads of k and v do not divide those of q, or
            the kernel does not support them.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]):
        raise ValueError(f"attention takes q (b lq h d), k and v (b lk g d), got {shapes}; transpose or reshape them")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {shapes}; repeat or drop heads")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; convert them")
    reason = kernel.supports(q, k, v, softcap=softcap)
    if reason is not None:
        raise ValueError(f"kernel {kernel.name!r} cannot take this block: {reason}; take kernel 'auto'")


def row_sums(dout: Float[Tensor, "b l h d"], out: Float[Tensor, "b l h d"]) -> Float[Tensor, "b h l"]:
    """delta = rowsum(dout * out), in the dtype of ``out`` where that is the wider: what every backward needs."""
    return (dout.to(out.dtype) * out).sum(-1).transpose(1, 2)


def stand_in(
    dout: Float[Tensor, "b l h d"], delta: Float[Tensor, "b h l"], dtype: torch.dtype
) -> tuple[Float[Tensor, "b l h d"], Float[Tensor, "b l h d"]]:
    """(dout, a tensor in place of ``out``) of ``dtype``, contiguous, whose row sums are ``delta``.

    Kernels that compute delta from ``out`` themselves get ``dout * delta / |dout|^2``: the projection of ``out`` on
    ``dout``, so no larger than ``out``. A row of zero ``dout`` with a delta (the gradient came through lse alone) gets
    one entry of ``dout`` so small that only its product with the stand-in counts.
    """
    wide = dout.to(delta.dtype)
    row_delta = delta.transpose(1, 2).unsqueeze(-1)
    # Measured in units of the row's largest entry: squares of small gradients would underflow.
    peak = wide.abs().amax(dim=-1, keepdim=True)
    zero = peak == 0
    unit = wide / peak.masked_fill(zero, 1)
    square = unit.square().sum(dim=-1, keepdim=True)
    out = unit.mul_(row_delta / peak.masked_fill(zero, 1)).div_(square.masked_fill(zero, 1))
    small = 2.0**-12 if dtype == torch.float16 else 2.0**-64
    only_delta = zero & (row_delta != 0)
    first = wide[..., :1].masked_fill(only_delta, small)
    out[..., :1] += (row_delta / small).masked_fill(~only_delta, 0)
    # Kernels may read both with the strides of one.
    return torch.cat([first, wide[..., 1:]], dim=-1).to(dtype).contiguous(), out.to(dtype).contiguous()
