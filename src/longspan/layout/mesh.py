"""The device mesh of a plan: rank arithmetic in one place.

Axes from outermost to innermost: pipeline, data, expert, context, tensor. The ranks that exchange most are neighbours
on one node: tensor ranks in every block, context ranks in every attention.

Ranks along data, expert and context hold other tokens and the same weights: the *token* ranks. Expert ranks draw other
rows as data ranks do, and differ in the experts they hold. Weights are replicated or sharded over the token ranks,
those of experts over data x context alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

AXES = ("pipeline", "data", "expert", "context", "tensor")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as one rank sees it: its place, the number of places, and the group of ranks along it."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Mesh:
    """The groups of one rank.

    Attributes:
        pipeline, data, expert, context, tensor: the axes.
        tokens: the token ranks, in the order data, expert, context.
        ends: the first and the last pipeline rank of this rank's pipeline; None where there is one.
        rows_rank, rows_size: of the ranks that draw different rows, data x expert.
        parameters, expert_parameters: 2-D meshes (replicate, shard) over the ranks that share a weight, for FSDP2.
    """

    pipeline: Axis
    data: Axis
    expert: Axis
    context: Axis
    tensor: Axis
    tokens: Axis
    ends: dist.ProcessGroup | None
    rows_rank: int
    rows_size: int
    parameters: DeviceMesh
    expert_parameters: DeviceMesh


def make_mesh(
    data: int,
    context: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    shard: bool,
    replicas: int = 1,
    device_type: str,
) -> Mesh:
    """The mesh of all ranks; collective.

    ``shard``: split parameters over the token ranks, in ``replicas`` equal copies (HSDP); else every token rank has
    them whole. Experts' parameters are sharded over the data x context ranks likewise.

    Raises ValueError where the axes do not multiply to the number of ranks, or the copies do not divide them.
    """
    world, sizes = dist.get_world_size(), (pipeline, data, expert, context, tensor)
    if world != math.prod(sizes):
        axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ValueError(f"a mesh's axes must multiply to the number of ranks, got {axes or 'one rank'} for {world}")
    if data % replicas:
        raise ValueError(f"copies of sharded weights must divide the data ranks, got {replicas} for {data}")
    ranks = torch.arange(world).view(sizes)
    axes = DeviceMesh(device_type, ranks, mesh_dim_names=AXES)
    num_tokens = data * expert * context
    tokens = DeviceMesh(
        device_type, ranks.view(pipeline, num_tokens, tensor), mesh_dim_names=("pipeline", "tokens", "tensor")
    )

    def weights(holders: torch.Tensor) -> DeviceMesh:
        """(replicate, shard) of this rank, from (pipeline, tensor, ranks that share a weight)."""
        copies = replicas if shard else holders.shape[-1]
        shape = (*holders.shape[:2], copies, holders.shape[-1] // copies)
        mesh = DeviceMesh(
            device_type, holders.reshape(shape), mesh_dim_names=("pipeline", "part", "replicate", "shard")
        )
        return mesh["replicate", "shard"]

    of_all = ranks.view(pipeline, num_tokens, tensor).transpose(1, 2)
    of_experts = ranks.permute(0, 4, 2, 1, 3).reshape(pipeline, tensor * expert, data * context)

    def axis(mesh: DeviceMesh, name: str) -> Axis:
        return Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))

    found = {name: axis(axes, name) for name in AXES}
    return Mesh(
        **found,
        tokens=axis(tokens, "tokens"),
        ends=_ends(ranks.view(pipeline, -1)),
        rows_rank=found["data"].rank * expert + found["expert"].rank,
        rows_size=data * expert,
        parameters=weights(of_all),
        expert_parameters=weights(of_experts) if expert > 1 else weights(of_all),
    )


def _ends(pipelines: torch.Tensor) -> dist.ProcessGroup | None:
    """Of the column of (stages, pipelines) that this rank stands in."""
    if len(pipelines) == 1:
        return None
    own, _ = dist.new_subgroups_by_enumeration([[int(column[0]), int(column[-1])] for column in pipelines.T])
    return own if isinstance(own, dist.ProcessGroup) else None
