"""The loss of a chunk of logits and its gradient in one Triton kernel, for CUDA: each row is read twice and its
gradient written once, in the dtype of the products that follow.

Bytes for n rows of V logits in fp32 and a 16-bit gradient: 4·n·V read twice (the second time partly from cache), 2·n·V
written; without a gradient one reading. What torch's operators did took some ten passes.
"""

# Triton comes with CUDA builds of torch only.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _rows(logits, targets, losses, grads, num_columns, cap, capped: tl.constexpr, graded: tl.constexpr,
          block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    line = logits + row * num_columns
    columns = tl.arange(0, block)
    largest = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, num_columns, block):
        inside = start + columns < num_columns
        z = tl.load(line + start + columns, mask=inside, other=float("-inf"))
        if capped:
            z = cap * (1 - 2 / (1 + tl.exp(2 * z / cap)))
            z = tl.where(inside, z, float("-inf"))
        above = tl.maximum(largest, z)
        # A column beyond the end is -inf in every block: its difference from itself must not be taken.
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.exp(z - shift)
        largest = above
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    ignored = target < 0
    picked = tl.load(line + tl.where(ignored, 0, target))
    if capped:
        picked = cap * (1 - 2 / (1 + tl.exp(2 * picked / cap)))
    tl.store(losses + row, tl.where(ignored, 0.0, lse - picked))
    if graded:
        for start in range(0, num_columns, block):
            inside = start + columns < num_columns
            z = tl.load(line + start + columns, mask=inside, other=0.0)
            slope = tl.full([block], 1.0, tl.float32)
            if capped:
                squashed = 1 - 2 / (1 + tl.exp(2 * z / cap))
                slope = 1 - squashed * squashed
                z = cap * squashed
            grad = tl.exp(z - lse)
            grad = tl.where(start + columns == target, grad - 1, grad) * slope
            grad = tl.where(ignored, 0.0, grad)
            tl.store(grads + row * num_columns + start + columns, grad.to(grads.dtype.element_ty), mask=inside)


@triton.jit
def _scale(wide, factors, narrow, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    value = tl.load(wide + at, mask=inside) * tl.load(factors).to(tl.float32)
    tl.store(narrow + at, value.to(narrow.dtype.element_ty), mask=inside)


def scaled(wide: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous fp32 tensor times a number on its device, (), in another dtype; each element is read and written
    once, where torch's own product of two dtypes goes element by element."""
    narrow = torch.empty_like(wide, dtype=dtype)
    with torch.cuda.device(wide.device):
        _scale[(triton.cdiv(wide.numel(), _BLOCK),)](wide, factor, narrow, wide.numel(), block=_BLOCK, num_warps=8)
    return narrow


def row_losses(logits: Tensor, targets: Tensor, softcap: float | None, grads: Tensor | None) -> Tensor:
    """Losses (n,) in fp32 of fp32 logits (n, V) against int64 targets (n,), -100 for none; fills ``grads`` (n, V), the
    gradient of their sum by the logits before the softcap."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _rows[(logits.shape[0],)](
            logits,
            targets,
            losses,
            losses if grads is None else grads,
            logits.shape[1],
            softcap or 1.0,
            capped=softcap is not None,
            graded=grads is not None,
            block=_BLOCK,
            num_warps=8,
        )
    return losses
