"""Which part of a parameter this process holds, and filling exactly that part.

A parameter is a plain tensor or a DTensor, of which each rank holds one box; under tensor parallelism what they share
is itself a box of the whole. Initialisation and import go through `fill`, so that no process ever materialises more
than its own box of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan.layout.weights import Box, whole

Region = tuple[slice, ...]


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


class Collector:
    """Brings whole parameters of a model to rank 0, one at a time, whichever ranks hold parts of them. Collective.

    Args:
        model: this rank's part; other ranks may hold other parameters.
        boxes: where parameters stand that are parts of whole ones.
    """

    def __init__(self, model: nn.Module, boxes: Mapping[str, Box]) -> None:
        self._own, self._boxes = dict(model.named_parameters()), boxes
        self.alone = not any(isinstance(p, DTensor) for p in self._own.values())
        self.first = self.alone or dist.get_rank() == 0
        self._holders: dict[str, dict[tuple[int, ...], tuple[int, torch.Size]]] = {}
        if self.alone:
            return
        boxes_here = {name: (boxes.get(name, whole(tuple(p.shape))), p.shape) for name, p in self._own.items()}
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, boxes_here)
        for rank, there in enumerate(of_all):
            for name, (box, shape) in there.items():
                self._holders.setdefault(name, {}).setdefault(box.start, (rank, shape))

    @torch.no_grad()
    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The whole parameter, on rank 0; None on the others. All ranks ask for the same names in the same order."""
        own = self._own.get(name)
        part = own.full_tensor() if isinstance(own, DTensor) else own
        if self.alone:
            return part
        rank, pieces = dist.get_rank(), self._holders[name]
        like = next(iter(self._own.values()))
        found = torch.empty(shape, dtype=like.dtype, device=like.device) if rank == 0 and len(pieces) > 1 else None
        for start, (holder, piece) in pieces.items():
            if rank not in (0, holder):
                continue
            if holder != 0 and rank == holder:
                assert part is not None
                dist.send(part.contiguous(), dst=0)
            if rank == 0:
                got = part if holder == 0 else torch.empty(piece, dtype=like.dtype, device=like.device)
                assert got is not None
                if holder != 0:
                    dist.recv(got, src=holder)
                if found is None:
                    return got
                found[tuple(slice(o, o + n) for o, n in zip(start, piece, strict=True))] = got
        return found
