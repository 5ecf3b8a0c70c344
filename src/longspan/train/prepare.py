"""How ranks share a sequence, mask by mask: token layout, methods, and this rank's programs; runs in the data worker.

With method "auto" they are those of the least estimated time where the run runs. The choice is a function of mask,
model, plan and ``Where`` alone, never of the masks before it: all ranks that share a sequence come to the same, and so
does a run that goes on from a checkpoint. A mask that is new costs a tenth of a second or so, in the worker's time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.attention.masks import Mask
from longspan.context.attend import where_of
from longspan.context.build import WHOLE_RANKS, Built, resolve
from longspan.context.choose import Where, choose_layout, in_words, layout_of
from longspan.context.sequence import LayerKind, build_layer, windowed
from longspan.layout.mesh import Mesh
from longspan.layout.tokens import Layout
from longspan.layout.weights import heads
from longspan.model.config import DecoderConfig
from longspan.plan.plan import Plan
from longspan.train.data.batches import Batch
from longspan.train.precision import compute_dtype


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a rank needs to attend under one mask: the layout of all layers, and programs by kind of layer.

    ``why`` says what was chosen for the widest kind of layer, in one line; "" where nothing was.
    """

    layout: Layout
    built: dict[LayerKind, Built]
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layout and the methods."""
        return (self.layout.name, *(built.method for built in self.built.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Prepares masks for one rank. Picklable; equal ones give equal results in any process and in any order.

    Args:
        kinds: the kinds of attention layer on this rank.
        world, rank: of the ranks that share a sequence.
        method, layout: as the plan has them.
        where: what those ranks run on, the same on all of them; None where nothing is chosen by time, and "auto" is
            the default of mask and ranks.
        layout_kinds: those by which the layout is chosen, where tensor ranks, which have different kinds, must agree on
            it; none for ``kinds``.
    """

    kinds: tuple[LayerKind, ...]
    world: int
    rank: int
    method: str
    layout: str | None
    where: Where | None
    layout_kinds: tuple[LayerKind, ...] = ()

    def __call__(self, batch: Batch) -> Prepared | None:
        """For a batch of packed documents; plain rows all have one mask, which ``of`` prepares once."""
        return None if batch.lengths is None else self.of(masks.documents(batch.lengths, causal=True))

    def of(self, mask: Mask, rows: int = 1) -> Prepared:
        """For a mask that ``rows`` rows have. Raises ValueError where method or layout do not fit it."""
        if self.where is None:
            layout = resolve(mask, self.world, self.method, self.layout)[1]
            methods, why = dict.fromkeys(self.kinds, self.method), ""
        else:
            where = replace(self.where, sizes=replace(self.where.sizes, batch=rows))
            by = self.layout_kinds or self.kinds
            layout, methods, why = _choose(mask, self.kinds, by, self.world, self.layout, where)
        built = {
            kind: build_layer(mask, kind, self.world, self.rank, method, layout) for kind, method in methods.items()
        }
        return Prepared(layout, built, why)


@lru_cache(maxsize=64)
def _choose(
    mask: Mask,
    kinds: tuple[LayerKind, ...],
    layout_kinds: tuple[LayerKind, ...],
    world: int,
    layout_name: str | None,
    where: Where,
) -> tuple[Layout, dict[LayerKind, str], str]:
    """The layout, by the layers that see most, and on it each kind's method."""
    seen = {kind: mask if kind[2] is None else windowed(mask, kind[2]) for kind in (*kinds, *layout_kinds)}
    widest = max(layout_kinds, key=lambda kind: seen[kind].area)
    given = None if layout_name is None else (layout_of(layout_name, mask, world),)
    layout, choice = choose_layout(seen[widest], world, *widest[:2], where, layouts=given)
    methods = {
        kind: choose_layout(seen[kind], world, *kind[:2], where, layouts=(layout,))[1].chosen.method
        for kind in kinds
        if kind != widest
    }
    return layout, {widest: choice.chosen.method, **methods}, in_words(choice, layout, where)


def make_prepare(config: DecoderConfig, plan: Plan, mesh: Mesh, device: torch.device) -> Prepare:
    """For this rank of a run. Collective: the first rank says where those that share a sequence run, for all of them,
    so that tensor and pipeline ranks choose one layout.

    ``plan`` with its precision resolved. Raises ValueError, on all of those ranks, where that cannot be told.
    """
    where = None
    if plan.method == "auto" and 1 < mesh.context.size <= WHOLE_RANKS:
        dtype = compute_dtype(plan.precision)
        where = where_of(mesh.context.group, device, dtype=dtype, head_dim=config.attention.head_dim)
        if mesh.tensor.size > 1 or mesh.pipeline.size > 1:
            said = [where]
            dist.broadcast_object_list(said, src=0)
            where = said[0]
    return Prepare(
        kinds=layer_kinds(config, mesh.tensor.size, mesh.tensor.rank),
        layout_kinds=layer_kinds(config, mesh.tensor.size, 0),
        world=mesh.context.size,
        rank=mesh.context.rank,
        method=plan.method,
        layout=None if plan.layout == "auto" else plan.layout,
        where=where,
    )


def layer_kinds(config: DecoderConfig, tensor_size: int = 1, tensor_rank: int = 0) -> tuple[LayerKind, ...]:
    """The different kinds of attention layer of a model, as one of its tensor ranks has them."""
    own = heads(config.attention.num_heads, config.attention.kv_heads, tensor_size, tensor_rank)
    windows = (config.window(layer) for layer in range(config.num_layers))
    return tuple(dict.fromkeys((len(own.query), own.num_kv_heads, window) for window in windows))
