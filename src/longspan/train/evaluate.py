"""Held-out loss of a model that may be sharded, on sequences that may be split."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.layout.mesh import Mesh
from longspan.mixers.config import AttentionConfig
from longspan.model.decoder import DecoderLM
from longspan.train.data.batches import NO_LABEL
from longspan.train.data.evaluation import HeldOutWindows
from longspan.train.pipeline import Micro, Pipeline
from longspan.train.prepare import Prepare, Prepared

_TOKENS_AT_ONCE = 16384


def make_context(
    num_tokens: int, prepare: Prepare, mesh: Mesh, device: torch.device, *, rows: int = 1
) -> tuple[SequenceContext, Prepared]:
    """A causal context for rows of one length, and what was chosen for it."""
    mask = masks.causal(num_tokens)
    prepared = prepare.of(mask, rows)
    ctx = SequenceContext(
        mask,
        mesh.context.group,
        method=prepare.method,
        layout=prepared.layout,
        device=device,
        where=prepare.where,
        tokens_group=mesh.tokens.group,
    )
    ctx.renew(mask, built=prepared.built)
    return ctx, prepared


def make_handles(ctx: SequenceContext, prepare: Prepare, config: AttentionConfig) -> None:
    """Makes what attention layers of all kinds are called by: compiled code cannot. Collective where they are new."""
    for kind in prepare.kinds:
        ctx.handle(*kind, config.scale, config.softcap)


def reduce_sums(values: list[float]) -> list[float]:
    """Sums over all ranks, in float64."""
    if dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def total_nats(
    model: DecoderLM,
    windows: HeldOutWindows,
    prepare: Prepare,
    mesh: Mesh,
    device: torch.device,
    pipeline: Pipeline | None = None,
    contexts: dict[int, SequenceContext] | None = None,
) -> tuple[float, int]:
    """(sum of losses in nats, number of labels) of held-out windows, over all ranks. Collective.

    Args:
        contexts: filled by length, for the next call: with others, blocks would be compiled anew.
    """
    num_windows, context = windows.tokens.shape
    at_once = max(1, _TOKENS_AT_ONCE // context)
    contexts = {} if contexts is None else contexts
    if context not in contexts:
        contexts[context], _ = make_context(context, prepare, mesh, device, rows=at_once)
    ctx = contexts[context]
    make_handles(ctx, prepare, model.config.attention)
    nats, labels = 0.0, 0
    step = at_once * mesh.rows_size
    for first in range(0, num_windows, step):
        start = first + mesh.rows_rank * at_once
        rows = windows.tokens[start : start + at_once], windows.labels[start : start + at_once]
        if not len(rows[0]):  # every rank must run the model: collectives wait for all
            rows = windows.tokens[:1], torch.full_like(windows.labels[:1], NO_LABEL)
        micro = Micro.of(ctx, *rows, device)
        nats += float(model.losses(*micro).cross_entropy) if pipeline is None else pipeline.loss(micro)
        labels += int((micro.labels != NO_LABEL).sum())
    for root in [model] if pipeline is None else pipeline.stages:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward, parameters would stay gathered, and exports not be sharded
    total, number = reduce_sums([nats / mesh.tensor.size, labels / (mesh.tensor.size * mesh.pipeline.size)])
    return total, round(number)
