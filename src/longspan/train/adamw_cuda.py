"""The pass of `longspan.train.adamw` on CUDA: one Triton kernel for a parameter."""

# Triton comes with CUDA builds of torch only.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.train.adamw import Hyper

_BLOCK = 2048


@triton.jit
def _adamw(masters, copies, grads, averages, squares, size, factor, kept, new1, beta2, step_size, root_correction, eps,
           block: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    grad = tl.load(grads + at, mask=inside).to(tl.float32) * factor
    average = tl.load(averages + at, mask=inside)
    average += new1 * (grad - average)
    square = tl.load(squares + at, mask=inside)
    square = beta2 * square + (1 - beta2) * grad * grad
    master = tl.load(masters + at, mask=inside) * kept
    master -= step_size * average / (tl.sqrt(square) / root_correction + eps)
    tl.store(averages + at, average, mask=inside)
    tl.store(squares + at, square, mask=inside)
    tl.store(masters + at, master, mask=inside)
    tl.store(copies + at, master.to(copies.dtype.element_ty), mask=inside)


def adamw_cuda_(master: Tensor, copy: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    """As `longspan.train.adamw.adamw_`, of contiguous tensors: fp32, and the copy and gradient of any float dtype."""
    with torch.cuda.device(master.device):
        _adamw[(triton.cdiv(master.numel(), _BLOCK),)](
            master,
            copy,
            grad,
            exp_avg,
            exp_avg_sq,
            master.numel(),
            hyper.factor,
            1 - hyper.lr * hyper.weight_decay,
            1 - hyper.beta1,
            hyper.beta2,
            hyper.step_size,
            hyper.root_correction,
            hyper.eps,
            block=_BLOCK,
            num_warps=8,
        )
