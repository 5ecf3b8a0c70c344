"""Tensor parallelism with sequence and loss parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv:1909.08053, section 3;
Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).

A rank holds some heads of every attention, some inner channels of every MLP and some words of the vocabulary
(``longspan.layout.weights``). Between these parts, in norms and residuals, it holds all channels of some of the tokens.
``gather`` brings the tokens together before a split part, ``scatter`` sums the ranks' partial results and deals the
tokens out after it; each is the other's backward. Tokens are padded at their end to a multiple of the ranks.

What differs from the paper: heads, channels and vocabulary may be any number (parts differ by one), and KV heads fewer
than ranks are held whole by all.

Cost for n tokens of width c and t ranks, a block: two gathers and two scatters forward, of n·c·(t-1)/t elements each
way and rank, as many backward, and again what is recomputed. Gradients of parameters that all ranks hold (norms, biases
after a scatter) are partial sums, to be added over the ranks: ``sum_over``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.layout.weights import Box, Heads, Split, along, heads


@dataclass(frozen=True, slots=True)
class TensorSplit(Split):
    """One rank of a tensor-parallel group."""

    def heads(self, num_heads: int, num_kv_heads: int) -> Heads:
        """This rank's attention heads."""
        return heads(num_heads, num_kv_heads, self.size, self.rank)

    def tokens(self, num_tokens: int) -> int:
        """Tokens of every rank, the padding of the last ones counted."""
        return -(-num_tokens // self.size)

    def gather(self, x: Tensor, num_tokens: int) -> Tensor:
        """All tokens (b, num_tokens, c) of every rank's (b, tokens(num_tokens), c)."""
        return x if self.size == 1 else _Gather.apply(x, self, num_tokens)  # type: ignore[no-any-return]

    def scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of (b, l, c), and of it this rank's tokens: (b, tokens(l), c)."""
        return x if self.size == 1 else _Scatter.apply(x, self)  # type: ignore[no-any-return]

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's tokens of values that all ranks have for all tokens along ``dim``, padded with zeros."""
        if self.size == 1:
            return x
        count = self.tokens(x.shape[dim])
        after = x.ndim - 1 - dim  # F.pad counts from the last dim
        padded = F.pad(x, (*(0, 0) * after, 0, count * self.size - x.shape[dim]))
        return padded.narrow(dim, self.rank * count, count)

    def partial(self, x: Tensor, linear: Linear) -> Tensor:
        """Of a linear whose input channels are split, this rank's addend for all tokens."""
        return linear(x, with_bias=self.size == 1)

    def total(self, x: Tensor, linear: Linear) -> Tensor:
        """The ranks' ``partial`` results summed and dealt out, the bias added once."""
        if self.size == 1:
            return x
        out = self.scatter(x)
        return out if linear.bias is None else out + linear.bias


WHOLE = TensorSplit()


class Linear(nn.Linear):
    """torch's, to be split along its outputs (dim 0 of the weight) or its inputs (dim 1)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch calls x input)
        self, x: Tensor, rows: slice | None = None, *, with_bias: bool = True
    ) -> Tensor:
        """The output, or ``rows`` of its channels, or all of it but the bias."""
        weight, bias = self.weight, self.bias if with_bias else None
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return F.linear(x, weight, bias)

    def boxes(self, dim: int, start: int, total: int) -> dict[str, Box]:
        """Where the parameters of one split along ``dim`` stand in the whole ones; a bias is split with dim 0 alone."""
        boxes = {"weight": along(tuple(self.weight.shape), dim, start, total)}
        if dim == 0 and self.bias is not None:
            boxes["bias"] = along(tuple(self.bias.shape), 0, start, total)
        return boxes


def linear_boxes(name: str, linear: Linear, dim: int, start: int, total: int) -> dict[str, Box]:
    """``Linear.boxes`` by the names that the parameters have where the linear is called ``name``."""
    return {f"{name}.{leaf}": box for leaf, box in linear.boxes(dim, start, total).items()}


# torch 2.13 has new names for both, and warns of the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gathered(x: Tensor, split: TensorSplit, num_tokens: int) -> Tensor:
    flat = x.transpose(0, 1).contiguous()
    out = flat.new_empty(flat.shape[0] * split.size, *flat.shape[1:])
    all_gather_single(out, flat, group=split.group)
    return out[:num_tokens].transpose(0, 1).contiguous()


def _scattered(x: Tensor, split: TensorSplit) -> Tensor:
    count = split.tokens(x.shape[1])
    flat = F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, count * split.size - x.shape[1])).contiguous()
    out = flat.new_empty(count, *flat.shape[1:])
    _reduce_scatter(out, flat, group=split.group)
    return out.transpose(0, 1).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TensorSplit, num_tokens: int) -> Tensor:
        ctx.split = split
        return _gathered(x, split, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grads[0], ctx.split), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TensorSplit) -> Tensor:
        ctx.split, ctx.num_tokens = split, x.shape[1]
        return _scattered(x, split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.split, ctx.num_tokens), None


@torch.no_grad()
def sum_over(group: dist.ProcessGroup, parameters: Iterable[Tensor]) -> None:
    """Adds the gradients of ``parameters`` over a group, all in one message for each dtype. Collective."""
    grads: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        grads.setdefault(grad.dtype, []).append(grad)
    for of_dtype in grads.values():
        flat = torch.cat([grad.flatten() for grad in of_dtype])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(of_dtype, flat.split([grad.numel() for grad in of_dtype]), strict=True):
            grad.copy_(total.view_as(grad))
