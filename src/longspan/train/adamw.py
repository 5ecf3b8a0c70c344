"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) for one parameter with a 16-bit working copy.

The state is torch.optim.AdamW's. What differs: the gradient may be in the copy's dtype and is scaled on its way in, and
the new copy is written in the same pass. On CUDA that pass is one Triton kernel. Bytes a parameter with a 16-bit
gradient: 14 read, 14 written; apart, clipping, conversion, update and copy read 26 and write 22.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """What a step is taken with.

    Args:
        factor: on the gradient; below 1 where it is clipped.
        step: from 1 on.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    factor: float
    step: int

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        return (1 - self.beta2**self.step) ** 0.5


@torch.no_grad()
def adamw_(master: Tensor, copy: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    """Updates a parameter, its copy and its two moments in place. All of one shape and contiguous but for `grad`."""
    if master.is_cuda:
        from longspan.train.adamw_cuda import adamw_cuda_

        adamw_cuda_(master, copy, grad.contiguous(), exp_avg, exp_avg_sq, hyper)
        return
    wide = grad.to(master.dtype) * hyper.factor
    master.mul_(1 - hyper.lr * hyper.weight_decay)
    exp_avg.lerp_(wide, 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(wide, wide, value=1 - hyper.beta2)
    denominator = (exp_avg_sq.sqrt() / hyper.root_correction).add_(hyper.eps)
    master.addcdiv_(exp_avg, denominator, value=-hyper.step_size)
    copy.copy_(master)
