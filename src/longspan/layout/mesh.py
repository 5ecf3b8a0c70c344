"""The device mesh of a plan: rank arithmetic in one place.

Ranks are numbered with context innermost, so that the ranks that exchange keys are neighbours on one node. Parameters
are sharded (or replicated) over data and context together: both see the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, slots=True)
class Mesh:
    """The groups of one rank.

    Attributes:
        device_mesh: axes ("data", "context").
        parameters: 2-D mesh (replicate, shard) over all ranks, for FSDP2.
        data_rank, data_size, context_rank, context_size: coordinates.
        context_group: the ranks that share this rank's sequences.
        tokens_group: the ranks that hold the batch together, data x context.
    """

    device_mesh: DeviceMesh
    parameters: DeviceMesh
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    tokens_group: dist.ProcessGroup


def make_mesh(data: int, context: int, *, shard: bool, device_type: str) -> Mesh:
    """The mesh of data x context ranks; collective. ``shard``: split parameters over all ranks, else replicate them.

    Raises ValueError where data x context is not the number of ranks.
    """
    world = dist.get_world_size()
    if data * context != world:
        raise ValueError(f"data x context must be the number of ranks, got {data} x {context} for {world}")
    mesh = init_device_mesh(device_type, (data, context), mesh_dim_names=("data", "context"))
    shape = (1, world) if shard else (world, 1)
    parameters = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    return Mesh(
        mesh,
        parameters,
        mesh.get_local_rank("data"),
        data,
        mesh.get_local_rank("context"),
        context,
        mesh.get_group("context"),
        parameters.get_group("shard" if shard else "replicate"),
    )
