"""Records: what each kind of data is made of, how it lies in a message, and copies of parts of it.

A record is the tuple of tensors of one kind of data on some tokens and heads: q (b, n, h, d); kv two of these; do the
output gradient with lse and delta (b, h, n); o the output with its lse; dq; dkv.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.context.schedule import Kind


class Axes(NamedTuple):
    tokens: int
    heads: int


DATA, STAT = Axes(1, 2), Axes(2, 1)
COMPONENTS: dict[Kind, tuple[Axes, ...]] = {
    "q": (DATA,),
    "kv": (DATA, DATA),
    "do": (DATA, STAT, STAT),
    "o": (DATA, STAT),
    "dq": (DATA,),
    "dkv": (DATA, DATA),
}
Record = tuple[Tensor, ...]


class Form(NamedTuple):
    """How a record lies in a message: a row per token, its data tensors one after another; then statistics."""

    num_tokens: int
    num_heads: int
    num_data: int
    dtype: torch.dtype
    row_bytes: int
    stats: tuple[tuple[int, int], ...]  # first and last byte of each
    num_bytes: int


_WIDE = torch.complex128  # 16 bytes


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)``, on CUDA 16 bytes at a time where that is possible: rows of some heads are short."""
    if target.is_cuda and target.dtype == source.dtype and _wide(target) and _wide(source):
        target, source = target.view(_WIDE), source.view(_WIDE)
    target.copy_(source)


def _wide(x: Tensor) -> bool:
    size = _WIDE.itemsize // x.itemsize
    return (
        x.stride(-1) == 1
        and x.data_ptr() % _WIDE.itemsize == 0
        and x.storage_offset() % size == 0
        and x.shape[-1] % size == 0
        and all(stride % size == 0 for stride in x.stride()[:-1])
    )


def narrow(tensor: Tensor, axes: Axes, token: int, num_tokens: int, head: int, num_heads: int) -> Tensor:
    if tensor.shape[axes.tokens] != num_tokens:
        tensor = tensor.narrow(axes.tokens, token, num_tokens)
    if tensor.shape[axes.heads] != num_heads:
        tensor = tensor.narrow(axes.heads, head, num_heads)
    return tensor
