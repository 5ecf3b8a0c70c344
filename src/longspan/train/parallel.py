"""A plan applied to a model from outside: sharding and replication through FSDP2, recomputation, offload, precision.

One path serves all: parameters live on a 2-D mesh (replicate, shard) over the ranks that share them. ``shard="none"``
is a mesh (n, 1), whose gradients are all-reduced; "zero2" and "zero3" a mesh (copies, n / copies), whose gradients are
reduce-scattered, and "zero3" gathers parameters again in the backward. Tensor and pipeline ranks hold parts of the
model (``longspan.model.part``), each of which is treated so.

On one rank there is no FSDP: mixed precision is that of `longspan.train.precision`, or of the stream of layers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from longspan.layout.expert_parallel import ExpertSplit
from longspan.layout.mesh import Mesh
from longspan.layout.tensor_parallel import TensorSplit
from longspan.model.compiled import compile_blocks
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM
from longspan.model.encoder_config import EncoderConfig
from longspan.model.layer_stream import LayerStream, stream_layers
from longspan.model.lora import adapted_layers
from longspan.model.moe import Experts, Moe
from longspan.model.offload import ActivationOffload
from longspan.model.part import Layers
from longspan.model.parts import Mlp
from longspan.model.recompute import apply_recompute
from longspan.plan.plan import V_SHAPED, Plan
from longspan.train.precision import MasterWeights, compute_dtype


def tensor_split(mesh: Mesh) -> TensorSplit:
    """This rank's part of every weight."""
    return TensorSplit(mesh.tensor.rank, mesh.tensor.size, mesh.tensor.group)


def expert_split(mesh: Mesh) -> ExpertSplit:
    """This rank's part of every mixture's experts."""
    return ExpertSplit(mesh.expert.rank, mesh.expert.size, mesh.expert.group)


def check_plan(plan: Plan, config: DecoderConfig | EncoderConfig) -> None:
    """Raises ValueError where a model cannot be split as a plan says."""
    if isinstance(config, EncoderConfig):
        raise ValueError(
            f"plans are for decoders, which predict the next token, got {type(config).__name__}; train an encoder by "
            "its own loss, in a loop of your own"
        )
    heads, stages = config.attention.num_heads, plan.pipeline * plan.stages_per_rank
    num_experts = 0 if config.moe is None else config.moe.num_experts
    if plan.expert > 1 and num_experts < plan.expert:
        raise ValueError(
            f"expert parallelism needs an expert for every rank, got {num_experts} experts for expert {plan.expert}; "
            "use fewer, or data"
        )
    if plan.expert > 1 and plan.mlp_tile:
        raise ValueError(
            f"experts on other ranks are not mixed in tiles, got mlp_tile {plan.mlp_tile} with expert {plan.expert}; "
            "leave mlp_tile out"
        )
    if plan.pipeline > 1 and config.moe is not None and config.moe.balance == "aux_pooled":
        raise ValueError(
            "balance aux_pooled looks at all layers at once, which a pipeline has on different ranks, got pipeline "
            f"{plan.pipeline}; use balance aux or bias"
        )
    if heads < plan.tensor:
        raise ValueError(
            f"tensor parallelism needs a query head for every rank, got {heads} heads for tensor {plan.tensor}; use "
            f"at most {heads}"
        )
    if config.num_layers < stages:
        raise ValueError(
            f"a pipeline needs a layer for every stage, got {config.num_layers} layers for {stages} stages; use fewer"
        )
    if config.tie_embeddings and plan.pipeline > 1 and plan.pipeline_schedule in V_SHAPED:
        raise ValueError(
            f"{plan.pipeline_schedule} has first and last stage on one rank, which would hold a tied embedding twice; "
            "use zero_bubble or 1f1b, or untie them"
        )


def alone(mesh: Mesh) -> bool:
    """Whether one rank has all of the model to itself, and needs no FSDP."""
    return mesh.tokens.size * mesh.tensor.size * mesh.pipeline.size == 1


def master_weights(model: DecoderLM, plan: Plan, mesh: Mesh) -> MasterWeights | None:
    """What FSDP's mixed precision is elsewhere, for a rank that is alone; None where FSDP or a stream does it, or where
    all is in fp32."""
    if not alone(mesh) or plan.streams_layers or plan.precision != "bf16":
        return None
    # Of a model with adapters these alone are saved; the weights beside them stay in the checkpoint they came from.
    return MasterWeights(model, torch.bfloat16, keep_frozen=not adapted_layers(model))


def parallelise(root: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Recompute, shard and set precision in place. ``root`` has ``blocks``: the model, which may be on the meta device,
    or a pipeline stage that runs a part of one."""
    apply_saving(root, plan)
    if alone(mesh) or plan.streams_layers:
        return
    policy = MixedPrecisionPolicy()
    if (dtype := compute_dtype(plan.precision)) != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    again = plan.shard == "zero3"
    blocks = root.blocks
    assert isinstance(blocks, Layers)
    for block in blocks:
        for experts in (module for module in block.modules() if isinstance(module, Experts) and mesh.expert.size > 1):
            fully_shard(experts, mesh=mesh.expert_parameters, mp_policy=policy, reshard_after_forward=again)
        fully_shard(block, mesh=mesh.parameters, mp_policy=policy, reshard_after_forward=again)
    fully_shard(root, mesh=mesh.parameters, mp_policy=policy, reshard_after_forward=again)
    if isinstance(root, DecoderLM):
        for name in ("loss", "losses"):
            register_fsdp_forward_method(root, name)


def apply_saving(root: nn.Module, plan: Plan, *, min_bytes: int = 2**20) -> None:
    """Recomputation with the offload of what it keeps, tiles of the MLPs, compilation: what needs no mesh.

    `min_bytes`: smaller activations are not moved.
    """
    if plan.recompute != "none":
        limit_bytes = plan.offload_gib * 2**30 or None
        moves = None
        if plan.moves_activations:
            moves = ActivationOffload(min_bytes=min_bytes, limit_bytes=limit_bytes)
        apply_recompute(root, plan.recompute, keep_ops=(torch.ops.longspan.attention.default,), offload=moves)
    for mixer in (module for module in root.modules() if isinstance(module, Mlp | Moe)):
        mixer.tile = plan.mlp_tile or None
    if plan.compile:
        assert isinstance(root.blocks, Layers)
        compile_blocks(root.blocks, plan.activation_budget)


def stream(model: DecoderLM, plan: Plan, device: torch.device) -> LayerStream | None:
    """The stream of a plan that offloads layers, of a model that is filled, on the host; None for other plans.

    The host's parameters are the master weights; the device casts what it computes with.
    """
    if not plan.streams_layers:
        return None
    return stream_layers(model, device, dtype=compute_dtype(plan.precision))
