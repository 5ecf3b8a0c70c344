"""The passes of `longspan.train.adamw` on CUDA: one Triton kernel each, for a parameter."""

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
def _adamw(masters, copies, grads, averages, squares, size, factors, kept, new1, beta2, step_size, root_correction, eps,
           block: tl.constexpr):  # fmt: skip
    factor = tl.load(factors).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = (at < size) & (factor == factor)  # NaN: no step
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
            *_rates(hyper, master.device),
            block=_BLOCK,
            num_warps=8,
        )


def _rates(hyper: Hyper, device: torch.device) -> tuple[Tensor | float, ...]:
    """What both kernels take of a step, in their order."""
    kept = 1 - hyper.lr * hyper.weight_decay
    return (
        hyper.factor.to(device),
        kept,
        1 - hyper.beta1,
        hyper.beta2,
        hyper.step_size,
        hyper.root_correction,
        hyper.eps,
    )


@triton.jit
def _rounded(wide, chance):
    """Towards or away from zero by 16 random bits, of which `chance` has more: the upper ones are dropped."""
    bits = wide.to(tl.uint32, bitcast=True) + (chance & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _round_quarter(weights, grads, averages, squares, at, size, word, other, factor, kept, new1, beta2, step_size,
                   root_correction, eps):  # fmt: skip
    inside = (at < size) & (factor == factor)  # NaN: no step
    grad = tl.load(grads + at, mask=inside).to(tl.float32) * factor
    average = tl.load(averages + at, mask=inside).to(tl.float32)
    average += new1 * (grad - average)
    square = tl.load(squares + at, mask=inside).to(tl.float32)
    square = beta2 * square + (1 - beta2) * grad * grad
    weight = tl.load(weights + at, mask=inside).to(tl.float32) * kept
    weight -= step_size * average / (tl.sqrt(square) / root_correction + eps)
    # Three numbers of 16 bits, each two of which are independent.
    tl.store(weights + at, _rounded(weight, word), mask=inside)
    tl.store(averages + at, _rounded(average, word >> 16), mask=inside)
    tl.store(squares + at, _rounded(square, word ^ other), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _adamw_rounded(weights, grads, averages, squares, size, seed, factors, kept, new1, beta2, step_size,
                   root_correction, eps, quarter: tl.constexpr):  # fmt: skip
    factor = tl.load(factors).to(tl.float32)
    lane = tl.arange(0, quarter)
    # A call of the generator (Philox) is dear, and gives four words: four elements share it.
    a, b, c, d = tl.randint4x(seed, tl.program_id(0) * quarter + lane)
    at = tl.program_id(0).to(tl.int64) * (4 * quarter) + lane
    _round_quarter(weights, grads, averages, squares, at, size, a, b, factor, kept, new1, beta2, step_size,
                   root_correction, eps)  # fmt: skip
    _round_quarter(weights, grads, averages, squares, at + quarter, size, b, c, factor, kept, new1, beta2, step_size,
                   root_correction, eps)  # fmt: skip
    _round_quarter(weights, grads, averages, squares, at + 2 * quarter, size, c, d, factor, kept, new1, beta2,
                   step_size, root_correction, eps)  # fmt: skip
    _round_quarter(weights, grads, averages, squares, at + 3 * quarter, size, d, a, factor, kept, new1, beta2,
                   step_size, root_correction, eps)  # fmt: skip


def adamw_rounded_cuda_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper, seed: int
) -> None:
    """As `longspan.train.adamw.adamw_rounded_`, of contiguous tensors: bf16, and the gradient of any float dtype."""
    with torch.cuda.device(weight.device):
        _adamw_rounded[(triton.cdiv(weight.numel(), _BLOCK),)](
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            weight.numel(),
            seed,
            *_rates(hyper, weight.device),
            quarter=_BLOCK // 4,
            num_warps=4,
        )
