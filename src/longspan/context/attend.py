"""The front door: exact attention over a sequence that is split between ranks.

``attention`` takes local ``b l h d`` tensors and returns the local output, differentiable, for any mask, any length and
any head grouping. ``shard`` and ``unshard`` split and join anything that runs along the sequence by the same layout.
Models and compiled code call ``prepare`` once and pass its handle to ``attend`` in every layer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from longspan.attention.kernels import KERNELS
from longspan.attention.masks import Mask
from longspan.context.build import Built, build, resolve
from longspan.context.choose import Where, here, sizes_of
from longspan.context.exchange import agree, backend_for, from_rank_0, open_lanes
from longspan.context.run import Bound, attend, bind, bound, is_bound, release
from longspan.layout.tokens import Layout


def group_in_force(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """What None means: torch's default group where there is one, else (still None) this process alone."""
    return dist.group.WORLD if group is None and dist.is_available() and dist.is_initialized() else group


def world_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Size of a group and own rank in it."""
    group = group_in_force(group)
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What a handle is asked for; equal requests get one handle."""

    mask: Mask
    num_heads: int
    num_kv_heads: int
    group: dist.ProcessGroup | None
    method: str
    layout: Layout | str | None
    scale: float | None
    softcap: float | None
    kernel: str
    where: Where | None

    def bind(self) -> int:
        """A new handle. Raises ValueError where the request cannot be met."""
        if self.kernel != "auto" and self.kernel not in KERNELS:
            raise ValueError(f"unknown kernel {self.kernel!r}; known: auto, {', '.join(KERNELS)}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(
                f"scale must be a finite number other than 0, got {self.scale}; leave it out for 1/sqrt(d)"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a finite number above 0, got {self.softcap}; leave it out for none")
        world, rank = world_and_rank(self.group)
        built = build(
            self.mask,
            world=world,
            rank=rank,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            method=self.method,
            layout=self.layout,
            where=self.where,
        )
        return bind(Bound(built, self.group if world > 1 else None, self.scale, self.softcap, self.kernel))


class _Handles:
    """Handles by request. ``limit``: only so many latest ones are kept, earlier ones are released."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._known: OrderedDict[_Request, int] = OrderedDict()

    def of(self, request: _Request, device: torch.device | str, tensors: str) -> int:
        """The handle of a request. Collective: ranks that ask for something else, or are refused, stop all of them."""
        handle = self._known.get(request)
        if handle is None or not is_bound(handle):
            try:
                handle = request.bind()
            except ValueError:
                with suppress(ValueError):  # this rank's own refusal says more than that the others differ
                    _agree("refused", request.group, device)
                raise
            self._known[request] = handle
        built = bound(handle).built
        _agree(f"{built.fingerprint} {request.scale} {request.softcap} {tensors}", request.group, device, built.lanes)
        self._known.move_to_end(request)
        if self._limit is not None and len(self._known) > self._limit:
            release(self._known.popitem(last=False)[1])
        return handle


_PREPARED = _Handles()
_RECENT = _Handles(limit=256)  # attention's: packed documents bring a new mask every step


def prepare(
    mask: Mask,
    *,
    num_heads: int,
    num_kv_heads: int,
    group: dist.ProcessGroup | None = None,
    method: str = "auto",
    layout: Layout | str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
    device: torch.device | str = "cpu",
    where: Where | None = None,
) -> int:
    """A handle for ``attend`` and ``torch.ops.longspan.attention``. Collective over ``group``: ranks compare digests.

    Args: ``mask`` of the global sequence; ``scale`` of the scores, 1/sqrt(head_dim) by default; ``softcap`` c turns
    scores x into c·tanh(x/c); ``device`` of the tensors to come; ``where`` they run, for method "auto" to choose by
    estimated time (``where_of`` says it for a group), else it takes a default of the layout. Equal arguments give the
    same handle until it is released (``longspan.context.run.release``); nothing else ends it.
    Raises ValueError, on every rank, where the ranks' masks, schedules or settings differ, and for unknown or unfit
    options.
    """
    request = _Request(
        mask=mask,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        group=group_in_force(group),
        method=method,
        layout=layout,
        scale=scale,
        softcap=softcap,
        kernel=kernel,
        where=where,
    )
    return _PREPARED.of(request, device, "")


def compare(built: Built, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
    """Refuse, on every rank, masks or schedules that differ between the ranks of a group."""
    _agree(built.fingerprint, group_in_force(group), device, built.lanes)


def _agree(text: str, group: dist.ProcessGroup | None, device: torch.device | str, lanes: tuple[int, ...] = ()) -> None:
    """Compare over the ranks what they are about to do, and open the lanes for it. Raises ValueError as ``agree``."""
    if group is not None and dist.get_world_size(group) > 1:
        digest = blake2b(text.encode(), digest_size=8).hexdigest()
        agree(group, digest, "mask, layout, schedule, scale and shape", torch.device(device))
        open_lanes(group, torch.device(device), lanes)


_KNOWN_WHERE: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Where]] = WeakKeyDictionary()


def where_of(
    group: dist.ProcessGroup | None, device: torch.device, *, dtype: torch.dtype, head_dim: int, batch: int = 1
) -> Where:
    """What the ranks of a group run on, as rank 0 sees it, so that all of them choose the same method.

    Ranks on other hosts may have other profiles saved. Collective at the first call for a group and device, after which
    wires and device are known; the sizes are this rank's own.
    Raises ValueError, on every rank, where rank 0 cannot tell, or where some rank is about to do something else.
    """
    group = group_in_force(group)
    world, rank = world_and_rank(group)
    if group is None or world == 1:
        return here(world, device, dtype=dtype, head_dim=head_dim, batch=batch)
    known = _KNOWN_WHERE.setdefault(group, {})
    if device not in known:
        # A rank that was given a method compares its schedule now: it must meet a comparison, not a broadcast.
        _agree("rank 0 says where", group, device)
        found: Where | str = ""
        if rank == 0:
            try:
                found = here(world, device, dtype=dtype, head_dim=head_dim, batch=batch)
            except ValueError as error:
                found = str(error)
        found = from_rank_0(group, found, device)
        if isinstance(found, str):
            raise ValueError(found)
        known[device] = found
    return replace(known[device], sizes=sizes_of(dtype, head_dim, batch))


def attention(
    q: Float[Tensor, "b l h d"],
    k: Float[Tensor, "b l g d"],
    v: Float[Tensor, "b l g d"],
    *,
    mask: Mask,
    group: dist.ProcessGroup | None = None,
    method: str = "auto",
    layout: Layout | str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
    where: Where | None = None,
) -> Float[Tensor, "b l h d"]:
    """Exact attention of a sequence split over ``group``, on local tensors; differentiable once.

    The local tokens are those that ``shard(x, mask, group, method=method, layout=layout)`` gives. Every call compares
    the ranks' masks and schedules (one tiny collective); ``prepare`` and ``attend`` do so once for many layers.
    Method "auto" takes what should be fastest on these ranks, as rank 0 knows them, or on those that ``where`` says.
    Raises ValueError for shapes, methods, layouts or kernels that do not fit, or where ranks disagree.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q, k and v must be (batch, local tokens, heads, head_dim), got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    world, _ = world_and_rank(group)
    if method == "auto" and where is None and world > 1:
        where = where_of(group, q.device, dtype=q.dtype, head_dim=q.shape[3], batch=q.shape[0])
    request = _Request(
        mask=mask,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        group=group_in_force(group),
        method=method,
        layout=layout,
        scale=scale,
        softcap=softcap,
        kernel=kernel,
        where=where,
    )
    handle = _RECENT.of(request, q.device, f"{q.shape[0]} {q.shape[3]} {q.dtype}")
    return attend(q, k, v, handle)


def _layout(mask: Mask, world: int, method: str, layout: Layout | str | None) -> Layout:
    return resolve(mask, world, method, layout)[1]


def shard(
    x: Tensor,
    mask: Mask,
    group: dist.ProcessGroup | None,
    dim: int = 1,
    method: str = "auto",
    layout: Layout | str | None = None,
) -> Tensor:
    """This rank's tokens of a global tensor, along ``dim``, in local order; differentiable.

    Raises ValueError where ``x`` does not have the mask's length along ``dim``.
    """
    world, rank = world_and_rank(group)
    if x.shape[dim] != mask.num_tokens:
        raise ValueError(
            f"dim {dim} of x must be the mask's {mask.num_tokens} tokens, got {x.shape[dim]}; pass the global tensor"
        )
    positions = _layout(mask, world, method, layout).positions(rank)
    return x.index_select(dim, torch.from_numpy(positions).to(x.device))


def unshard(
    x: Tensor,
    mask: Mask,
    group: dist.ProcessGroup | None,
    dim: int = 1,
    method: str = "auto",
    layout: Layout | str | None = None,
) -> Tensor:
    """The global tensor, on every rank, of local tensors along ``dim``. Collective; has no gradient.

    Raises ValueError where ``x`` does not have this rank's number of tokens along ``dim``, or wants a gradient.
    """
    group = group_in_force(group)
    world, rank = world_and_rank(group)
    chosen = _layout(mask, world, method, layout)
    if x.shape[dim] != chosen.local_sizes[rank]:
        raise ValueError(
            f"dim {dim} of x must be this rank's {chosen.local_sizes[rank]} tokens, got {x.shape[dim]}; "
            "pass what shard gave"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("unshard has no gradient; call it on x.detach(), or keep the loss on local tokens")
    slots = torch.from_numpy(chosen.slots).to(x.device)
    if group is None or world == 1:
        return x.index_select(dim, slots)
    local = x.movedim(dim, 0)
    padded = local.new_zeros((max(chosen.local_sizes), *local.shape[1:]))
    padded[: local.shape[0]] = local
    staged = x.device.type == "cuda" and backend_for(group, x.device) != "nccl"
    if staged:
        padded = padded.cpu()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    joined = torch.cat([part[:size] for part, size in zip(parts, chosen.local_sizes, strict=True)])
    return joined.to(x.device).index_select(0, slots).movedim(0, dim)
