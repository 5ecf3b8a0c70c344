"""A plan applied to a model from outside: sharding and replication through FSDP2, recomputation, offload, precision.

One path serves all: parameters live on a 2-D mesh (replicate, shard) over data x context. ``shard="none"`` is a mesh
(world, 1), whose gradients are all-reduced; "zero2" and "zero3" a mesh (1, world), whose gradients are
reduce-scattered, and "zero3" gathers parameters again in the backward.

A plan that streams layers is on one rank, without FSDP: `stream`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from longspan.layout.mesh import Mesh
from longspan.model.decoder import DecoderLM
from longspan.model.layer_stream import LayerStream, stream_layers
from longspan.model.offload import ActivationOffload
from longspan.model.recompute import apply_recompute
from longspan.plan.plan import Plan

_NOT_YET = ("tensor", "pipeline", "expert")


def refuse_unsupported(plan: Plan) -> None:
    """Raises ValueError for axes that the trainer cannot run yet."""
    for name in _NOT_YET:
        if getattr(plan, name) != 1:
            raise ValueError(
                f"the trainer runs the axes data and context, got {name} {getattr(plan, name)}; set {name} to 1"
            )


def parallelise(model: DecoderLM, plan: Plan, mesh: Mesh) -> None:
    """Recompute, shard and set precision in place. The model may be on the meta device.

    Raises ValueError for axes that the trainer cannot run yet.
    """
    refuse_unsupported(plan)
    apply_saving(model, plan)
    if plan.streams_layers:
        return
    policy = MixedPrecisionPolicy()
    if plan.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    again = plan.shard == "zero3"
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        fully_shard(block, mesh=mesh.parameters, mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=mesh.parameters, mp_policy=policy, reshard_after_forward=again)
    register_fsdp_forward_method(model, "loss")


def apply_saving(model: DecoderLM, plan: Plan, *, min_bytes: int = 2**20) -> None:
    """Recomputation with the offload of what it keeps, and tiles of the MLPs: what needs no mesh.

    `min_bytes`: smaller activations are not moved.
    """
    if plan.recompute != "none":
        limit_bytes = plan.offload_gib * 2**30 or None
        moves = None
        if plan.moves_activations:
            moves = ActivationOffload(min_bytes=min_bytes, limit_bytes=limit_bytes)
        apply_recompute(model, plan.recompute, keep_ops=(torch.ops.longspan.attention.default,), offload=moves)
    model.mlp_tile = plan.mlp_tile or None


def stream(model: DecoderLM, plan: Plan, device: torch.device) -> LayerStream | None:
    """The stream of a plan that offloads layers, of a model that is filled, on the host; None for other plans.

    The host's parameters are the master weights; the device casts what it computes with.
    """
    if not plan.streams_layers:
        return None
    return stream_layers(model, device, dtype=torch.bfloat16 if plan.precision == "bf16" else None)
