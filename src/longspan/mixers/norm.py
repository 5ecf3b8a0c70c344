"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4): y = w · x / sqrt(mean(x²) + eps), over the last dim.

The statistics and the scaling are in fp32 at least, and the result is rounded to the input's dtype before the weight is
applied, in the order of Llama's own code. It stands here because mixers use it on single heads; the decoder uses it on
the whole width. `PlusOneRMSNorm` is Gemma's: the factor is 1 + w, and rounding comes last.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
        return self.weight * self._normed(x).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class PlusOneRMSNorm(RMSNorm):
    """Root-mean-square norm whose factor is 1 + weight, all in fp32 at least; a fresh weight is 0."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normed input, in its own shape and dtype."""
        normed = self._normed(x)
        return (normed * (1 + self.weight.to(normed.dtype))).to(x.dtype)
