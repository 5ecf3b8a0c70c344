"""Which part of a parameter this process holds, and filling exactly that part.

A parameter is a plain tensor, held whole, or a DTensor, of which each rank holds one box. Initialisation and import go
through `fill`, so that no process ever materialises more than its own box of a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Region = tuple[slice, ...]

_ROWS_PER_DRAW = 64


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


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def drawn(
    seed: int,
    name: str,
    region: Region,
    num_columns: int,
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor],
) -> Tensor:
    """The box `region` of a random matrix that depends on (seed, name) alone: see `decoder.init_weights`.

    Args:
        draw: makes values of a shape with a CPU generator.
    """
    rows, columns = region
    out = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
    first = rows.start - rows.start % _ROWS_PER_DRAW
    for start in range(first, rows.stop, _ROWS_PER_DRAW):
        digest = hashlib.blake2b(f"{seed}/{name}/{start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        values = draw((_ROWS_PER_DRAW, num_columns), generator)
        top, bottom = max(start, rows.start), min(start + _ROWS_PER_DRAW, rows.stop)
        out[top - rows.start : bottom - rows.start] = values[top - start : bottom - start, columns]
    return out
