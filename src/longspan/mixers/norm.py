"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4): y = w · x / sqrt(mean(x²) + eps), over the last dim.

All of it is in fp32 at least, and rounded once, at the end (Llama's own code rounds before the weight too). Kept for
the backward are the input itself and one factor a token, nothing wide: with r the factor, n = x·r and g = w·dy, the
gradients are dw = Σ dy·n over tokens and dx = r·(g - n·mean(g·n)).

It stands here because mixers use it on single heads; the decoder uses it on the whole width. `PlusOneRMSNorm` is
Gemma's: the factor is 1 + w.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight and no bias.

    Args:
        size: the last dim.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normed input, in its own shape and dtype."""
        return _normed(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class PlusOneRMSNorm(RMSNorm):
    """Root-mean-square norm whose factor is 1 + weight, all in fp32 at least; a fresh weight is 0."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normed input, in its own shape and dtype."""
        return _normed(x, 1 + _wide(self.weight), self.eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler makes its own kernels, and knows what to keep
        return _scaled(x, weight, eps)[0]
    if x.is_cuda and x.dtype == weight.dtype:  # torch has a kernel for it, and one for the backward
        return F.rms_norm(x, weight.shape, weight, eps)
    return _Normed.apply(x, weight, eps)


def _scaled(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed input, and the factor of each token."""
    wide = _wide(x)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factor * weight).to(x.dtype), factor


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, factor = _scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (x, weight, factor), wanted = grads, ctx.saved_tensors, ctx.needs_input_grad[:2]
        normed, grad = _wide(x) * factor, _wide(grad)
        dweight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype) if wanted[1] else None
        if not wanted[0]:
            return None, dweight, None
        grad = grad * weight
        grad -= normed.mul_((grad * normed).mean(-1, keepdim=True))
        return grad.mul_(factor).to(x.dtype), dweight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
