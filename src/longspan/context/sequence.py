"""The context that a model's mixers see when a sequence is split: positions, and attention by a schedule.

Mixers call ``ctx.attend`` and read ``ctx.positions``; they do not know whether, or how, the sequence is split.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from longspan.attention.bands import tighten
from longspan.attention.masks import Mask, from_bands
from longspan.context.attend import compare, group_in_force, where_of, world_and_rank
from longspan.context.build import Built, build, resolve
from longspan.context.choose import Where
from longspan.context.run import Bound, attend, bind, rebind, release
from longspan.hardware.transfers import upload
from longspan.layout.tokens import Layout

LayerKind = tuple[int, int, int | None]  # query heads, KV heads, window


@lru_cache(maxsize=64)
def windowed(mask: Mask, window: int) -> Mask:
    """The mask cut to the ``window`` latest keys of each query, itself included (the convention of sliding_window)."""
    if window < 1:
        raise ValueError(f"a window must hold at least the token itself, got {window}")
    bands = (tighten(band._replace(lo=max(band.lo, 1 - window))) for band in mask.bands)
    return from_bands([band for band in bands if band is not None], mask.num_tokens)


def build_layer(
    mask: Mask,
    kind: LayerKind,
    world: int,
    rank: int,
    method: str = "auto",
    layout: Layout | str | None = None,
    where: Where | None = None,
) -> Built:
    """One rank's programs for a kind of attention layer, on the layout of the whole mask. Pure; for data workers."""
    num_heads, num_kv_heads, window = kind
    layout = resolve(mask, world, method, layout)[1]
    return build(
        mask if window is None else windowed(mask, window),
        world=world,
        rank=rank,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        method=method,
        layout=layout,
        where=where,
    )


def _release_all(handles: Mapping[Any, int]) -> None:
    release(*handles.values())


class SequenceContext:
    """One mask over the ranks of a group, for all layers of a model.

    Args: ``positions`` are the position ids of the *global* sequence (int64 (s,)), by default 0, 1, ...; packed
    documents restart them. ``method``, ``layout`` and ``where`` as in ``attention``. ``tokens_group``: the ranks over
    which ``total`` sums, where other ranks hold other rows of the batch; by default those that share the sequence.

    ``renew`` takes the next step's mask: handles stay the same, so compiled code does too.
    """

    def __init__(
        self,
        mask: Mask,
        group: dist.ProcessGroup | None = None,
        *,
        method: str = "auto",
        layout: Layout | str | None = None,
        positions: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
        where: Where | None = None,
        tokens_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.where = where
        self.tokens_group = tokens_group
        self.group, self.device, self.kernel = group_in_force(group), torch.device(device), kernel
        self.world, self.rank = world_and_rank(group)
        self.method, self._layout = method, layout
        self._handles: dict[tuple[int, int, int | None, float | None, float | None], int] = {}
        weakref.finalize(self, _release_all, self._handles)
        self.positions: Int[Tensor, " l"]
        self.renew(mask, positions)

    def renew(
        self,
        mask: Mask,
        positions: np.ndarray | None = None,
        built: Mapping[LayerKind, Built] | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Set the mask (and position ids) of the next sequence; ``built`` programs from a data worker are used.

        ``layout`` of this mask alone, in place of the context's own.
        Collective over the group: ranks compare their masks. The backward of what ran before must be over.
        """
        self.mask = mask
        self.layout = resolve(mask, self.world, self.method, self._layout if layout is None else layout)[1]
        local = self.layout.positions(self.rank)
        if positions is not None and np.shape(positions) != (mask.num_tokens,):
            raise ValueError(
                f"positions must be one number for each of the mask's {mask.num_tokens} tokens, got shape "
                f"{np.shape(positions)}; pass those of the global sequence"
            )
        ids = local if positions is None else np.asarray(positions)[local]
        self.positions = upload(torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)), self.device)
        self._built = built or {}
        for key, handle in self._handles.items():
            rebind(handle, self._build(key[:3]))

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a global tensor."""
        return x.index_select(dim, torch.from_numpy(self.layout.positions(self.rank)).to(x.device))

    def _build(self, kind: LayerKind) -> Built:
        built = self._built.get(kind)
        if built is None:
            built = build_layer(self.mask, kind, self.world, self.rank, self.method, self.layout, self.where)
        mask = self.mask if kind[2] is None else windowed(self.mask, kind[2])
        mine = (mask.fingerprint, self.layout.fingerprint, self.rank, *kind[:2])
        given = (built.mask, built.layout.fingerprint, built.rank, built.num_heads, built.num_kv_heads)
        if mine != given:
            raise ValueError(
                f"programs must be built for this mask, layout, rank and heads, {mine}, got some for {given}; "
                "build them with build_layer from the same mask"
            )
        compare(built, self.group, self.device)
        return built

    def handle(
        self, num_heads: int, num_kv_heads: int, window: int | None, scale: float | None, softcap: float | None
    ) -> int:
        """The handle of one kind of attention layer; made on first use, which must not be in compiled code. Collective
        then."""
        key = (num_heads, num_kv_heads, window, scale, softcap)
        if key not in self._handles:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"compiled code attends with handles made before, got none for {key}; call the context's `handle` "
                    "with these for each kind of layer first"
                )
            built = self._build((num_heads, num_kv_heads, window))
            group = self.group if self.world > 1 else None
            self._handles[key] = bind(Bound(built, group, scale, softcap, self.kernel))
        return self._handles[key]

    def attend(
        self,
        q: Float[Tensor, "b l h d"],
        k: Float[Tensor, "b l g d"],
        v: Float[Tensor, "b l g d"],
        *,
        layer: int,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "b l h d"]:
        """Attention of the local queries over the whole sequence."""
        del layer  # the same mask for every layer with one window
        if self.where is None and self.method == "auto" and self.world > 1:
            self.where = where_of(self.group, q.device, dtype=q.dtype, head_dim=q.shape[3], batch=q.shape[0])
        return attend(q, k, v, self.handle(q.shape[2], k.shape[2], window, scale, softcap))

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks of ``tokens_group``, without gradient. Collective over them."""
        group = self.group if self.tokens_group is None else self.tokens_group
        if group is None or dist.get_world_size(group) == 1:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total
