"""Which part of a parameter this process holds, and filling exactly that part.

A parameter is a plain tensor, held whole, or a DTensor, of which each rank holds one box. Initialisation and import go
through `fill`, so that no process ever materialises more than its own box of a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Region = tuple[slice, ...]


def local_part(parameter: Tensor) -> tuple[Tensor, Region]:
    """The tensor in this process's memory, and the box of the whole parameter that it holds."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, n) for n in parameter.shape)
    local = parameter.to_local()
    if local.numel() == 0:
        return local, tuple(slice(0, 0) for _ in parameter.shape)
    # What torch's own distributed checkpoint asks a DTensor.
    chunks = parameter.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
        raise ValueError(
            f"a sharded parameter must hold one box on each rank, got {len(chunks)} for {parameter.placements}: "
            "shard with Shard and Replicate placements"
        )
    return local, tuple(slice(o, o + n) for o, n in zip(chunks[0].offsets, chunks[0].sizes, strict=True))


@torch.no_grad()
def fill(parameter: Tensor, read: Callable[[Region], Tensor]) -> None:
    """Copies `read(region)` into the part of `parameter` held here; a rank that holds nothing reads nothing.

    Raises:
        ValueError: the parameter is on the meta device, where there is nothing to fill.
    """
    local, region = local_part(parameter)
    if local.is_meta:
        raise ValueError('parameters to fill need memory, got them on "meta": call model.to_empty(device=...) first')
    if local.numel():
        local.copy_(read(region))


@torch.no_grad()
def fill_entry(parameter: Tensor, index: int, read: Callable[[Region], Tensor]) -> None:
    """As `fill`, for the entry `index` of the parameter's dim 0 alone: reads where this process holds a part of it."""
    local, region = local_part(parameter)
    if local.is_meta:
        raise ValueError('parameters to fill need memory, got them on "meta": call model.to_empty(device=...) first')
    if region[0].start <= index < region[0].stop:
        local[index - region[0].start].copy_(read(region[1:]))


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    return any(isinstance(p, DTensor) for p in model.parameters())
