"""Which part of a parameter this process holds, and filling exactly that part.

A parameter is a plain tensor or a DTensor, of which each rank holds one box; under tensor parallelism what they share
is itself a box of the whole. Initialisation and import go through `fill`, so that no process ever materialises more
than its own box of a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.layout.weights import Box, whole

Region = tuple[slice, ...]

_ROWS_PER_DRAW = 64


def local_part(parameter: Tensor, box: Box | None = None) -> tuple[Tensor, Region]:
    """The tensor in this process's memory, and the box of the whole parameter that it holds.

    `box`: where the parameter itself stands in a whole one; None: it is the whole.
    """
    local, region = _in_parameter(parameter)
    if box is not None:
        region = tuple(slice(r.start + o, r.stop + o) for r, o in zip(region, box.start, strict=True))
    return local, region


def _in_parameter(parameter: Tensor) -> tuple[Tensor, Region]:
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
def fill(parameter: Tensor, read: Callable[[Region], Tensor], box: Box | None = None) -> None:
    """Copies `read(region)` into the part of `parameter` held here; a rank that holds nothing reads nothing.

    Raises:
        ValueError: the parameter is on the meta device, where there is nothing to fill.
    """
    local, region = local_part(parameter, box)
    if local.is_meta:
        raise ValueError('parameters to fill need memory, got them on "meta": call model.to_empty(device=...) first')
    if local.numel():
        local.copy_(read(region))


class Collector(Mapping[str, Tensor]):
    """Whole parameters of a model on rank 0, one at a time, whichever ranks hold parts of them.

    All ranks make one and ask for the same names in the same order; on the others what is asked for is empty.

    Args:
        model: this rank's part; other ranks may hold other parameters.
        boxes: where parameters stand that are parts of whole ones.
    """

    def __init__(self, model: nn.Module, boxes: Mapping[str, Box]) -> None:
        self._own = dict(model.named_parameters())
        self.alone = not is_sharded(model)
        here = {name: (boxes.get(name, whole(tuple(p.shape))), tuple(p.shape)) for name, p in self._own.items()}
        of_all: list[Any] = [here]
        if not self.alone:
            of_all = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, here)
        # For every part of every parameter the first rank that holds it.
        self._parts: dict[str, dict[Box, tuple[int, tuple[int, ...]]]] = {}
        for rank, there in enumerate(of_all):
            for name, (box, shape) in there.items():
                self._parts.setdefault(name, {}).setdefault(box, (rank, shape))

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        own = self._own.get(name)
        mine = own.full_tensor() if isinstance(own, DTensor) else own
        if self.alone:
            assert mine is not None
            return mine
        rank, like = dist.get_rank(), next(iter(self._own.values()))
        found: list[tuple[Box, Tensor]] = []
        for box, (holder, shape) in self._parts[name].items():
            if rank == holder:
                assert mine is not None
                if rank:
                    dist.send(mine.contiguous(), dst=0)
                else:
                    found.append((box, mine))
            elif rank == 0:
                found.append((box, torch.empty(shape, dtype=like.dtype, device=like.device)))
                dist.recv(found[-1][1], src=holder)
        if rank:
            return torch.empty(0)
        if len(found) == 1:
            return found[0][1]
        total = torch.empty(found[0][0].shape, dtype=like.dtype, device=like.device)
        for box, part in found:
            total[tuple(slice(o, o + n) for o, n in zip(box.start, part.shape, strict=True))] = part
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


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
