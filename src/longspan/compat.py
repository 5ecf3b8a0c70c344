"""The functions of ring-flash-attention under their own names and signatures, on longspan's schedules.

Interface: https://github.com/zhuzilin/ring-flash-attention (0.1.7). Change the import and nothing else: every rank
passes the tensors it passed there, and P ranks together hold the sequence in the same order.

=================  ============================================================================================
ring               rank r holds the r-th of P equal parts of each row
zigzag             rank r holds parts r and 2P-1-r of 2P
stripe             rank r holds tokens r, r + P, ...
ring ... varlen    rank r holds the r-th of P equal parts of *each document*; cu_seqlens are of the local tokens
zigzag ... varlen  rank r holds parts r and 2P-1-r of 2P of each document; cu_seqlens likewise
llama3 ... varlen  rank r holds the r-th of P equal parts of all documents end to end, which may cut documents
=================  ============================================================================================

What differs there: ``window_size`` means the window of the whole sequence (there each block is cut by itself);
``causal=False`` works with every layout; gradients are summed in fp32; there is no demand on document lengths but that
the parts be equal, as the layout says. ``heads_k_stride`` (how many KV heads are gathered at a time: memory, not the
result) must divide the KV heads as it does there; what is sent when is the schedule's affair. Dropout and ALiBi are
refused. ``softmax_lse`` is fp32, (batch, heads, local tokens), without the batch for varlen.

``longspan.context.attention`` has none of these limits: any length, any mask, uneven shards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.bands import Band
from longspan.attention.masks import Mask, from_bands, spans
from longspan.context.attend import group_in_force, prepare, world_and_rank
from longspan.layout.tokens import Layout, Segment, make_layout

__all__ = [
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]

Window = tuple[int, int]
Output = Any  # out, or with return_attn_probs (out, softmax_lse, None)

_EVERYWHERE: Window = (-1, -1)


@lru_cache(maxsize=64)
def _mask(lengths: tuple[int, ...], causal: bool, window: Window) -> Mask:
    """Documents end to end, each cut to (left, right) keys beside the query; -1 is no limit, causal sets right to 0."""
    bands = []
    for start, stop in spans(lengths):
        left, right = (stop - start - 1 if side < 0 else side for side in window)
        bands.append(Band(start, stop, start, stop, -left, 0 if causal else right))
    return from_bands(bands, sum(lengths))


@lru_cache(maxsize=64)
def _dealt(local: tuple[int, ...], world: int, folded: bool) -> Layout:
    """Each document in ``world`` parts of ``local`` tokens, one to a rank; folded: in twice as many, two to a rank."""
    starts = list(accumulate((n * world for n in local), initial=0))[:-1]
    ranks = []
    for rank in range(world):
        segments = []
        for start, n in zip(starts, local, strict=True):
            size, parts = (n // 2, (rank, 2 * world - 1 - rank)) if folded else (n, (rank,))
            segments += [Segment(start + part * size, 1, size) for part in parts]
        ranks.append(tuple(segments))
    return Layout("zigzag by document" if folded else "contiguous by document", tuple(ranks))


def _refuse(
    dropout_p: float, window_size: Sequence[int], alibi_slopes: Tensor | None, deterministic: bool, device: torch.device
) -> Window:
    """Refuses what no schedule does; the window as a pair of integers."""
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: no kernel drops attention weights; drop activations")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes must be None, got slopes: no kernel adds a bias; use rotary positions")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size must be (left, right), each -1 or a number of keys >= 0, got {window_size}")
    if deterministic and device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic=True on CUDA follows torch's own switch, which is off; call "
            "torch.use_deterministic_algorithms(True) first"
        )
    return int(window_size[0]), int(window_size[1])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    layout: Layout,
    method: str,
    scale: float | None,
    group: dist.ProcessGroup | None,
    want_lse: bool,
) -> Output:
    """Attention of (b, l, heads, d), or of (l, heads, d) for varlen."""
    flat = q.ndim == 3
    if flat:
        q, k, v = q[None], k[None], v[None]
    handle = prepare(
        mask,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        group=group,
        method=method,
        layout=layout,
        scale=scale,
        device=q.device,
    )
    out, lse = torch.ops.longspan.attention(q, k, v, handle)[:2]
    if flat:
        out, lse = out[0], lse[0]
    return (out, lse, None) if want_lse else out


def _ndim(q: Tensor, ndim: int) -> None:
    if q.ndim != ndim:
        rule = "(tokens, heads, head_dim)" if ndim == 3 else "(batch, tokens, heads, head_dim)"
        other = "without" if ndim == 3 else "with"
        raise ValueError(f"q must be {rule}, got {tuple(q.shape)}; the functions {other} varlen take the other form")


def _batched(name: str, method: str, layout: str):
    """The three forms for rows of one document."""

    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Sequence[int] = _EVERYWHERE,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Output:
        window = _refuse(dropout_p, window_size, alibi_slopes, deterministic, q.device)
        _ndim(q, 4)
        world, _ = world_and_rank(group)
        if layout == "zigzag" and q.shape[1] % 2:
            raise ValueError(
                f"a zigzag shard is two equal parts, so its tokens must be even, got {q.shape[1]}; pad the sequence, "
                "or use longspan.context.attention with layout='zigzag', which takes any length"
            )
        if q.shape[1] == 0:
            raise ValueError("every rank must hold at least one token, got an empty shard; use fewer ranks")
        num_tokens = q.shape[1] * world
        mask = _mask((num_tokens,), causal, window)
        dealt = make_layout(layout, num_tokens, world)
        return _attend(q, k, v, mask, dealt, method, softmax_scale, group, return_attn_probs)

    return _forms(name, func)


def _varlen(name: str, method: str, folded: bool):
    """The three forms for packed documents of which every rank holds an equal part."""

    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Sequence[int] = _EVERYWHERE,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Output:
        window = _refuse(dropout_p, window_size, alibi_slopes, deterministic, q.device)
        _ndim(q, 3)
        local = _lengths("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q.shape[0])
        odd = [n for n in local if n % 2]
        if folded and odd:
            raise ValueError(
                f"a zigzag shard of a document is two equal parts, so its tokens must be even, got {odd[0]}; pad the "
                "document to a multiple of 2P, or use longspan.context.attention with masks.documents, which takes "
                "any length"
            )
        world, _ = world_and_rank(group)
        mask = _mask(tuple(n * world for n in local), causal, window)
        dealt = _dealt(local, world, folded)
        return _attend(q, k, v, mask, dealt, method, softmax_scale, group, return_attn_probs)

    return _forms(name, func)


def _forms(name: str, func: Callable[..., Output]) -> tuple[Callable[..., Output], ...]:
    """func itself, and func with k and v, or all three, in one tensor, stacked before the heads; named and signed."""

    def kvpacked(q: Tensor, kv: Tensor, *rest: Any, **named: Any) -> Output:
        return func(q, *_unpack("kv", kv, 2), *rest, **named)

    def qkvpacked(qkv: Tensor, *rest: Any, **named: Any) -> Output:
        return func(*_unpack("qkv", qkv, 3), *rest, **named)

    signature = inspect.signature(func)
    q, _, _, *rest = signature.parameters.values()
    packed = {"kvpacked_": (kvpacked, [q, q.replace(name="kv")]), "qkvpacked_": (qkvpacked, [q.replace(name="qkv")])}
    for form, (made, first) in packed.items():
        made.__name__ = made.__qualname__ = f"{name}_{form}func"
        made.__signature__ = signature.replace(parameters=[*first, *rest])  # pyright: ignore[reportFunctionMemberAccess]
    func.__name__ = func.__qualname__ = f"{name}_func"
    for made in (func, kvpacked, qkvpacked):
        made.__doc__ = made.__doc__ or f"ring-flash-attention's {made.__name__}: `longspan.compat` says what differs."
    return func, kvpacked, qkvpacked


def _unpack(name: str, packed: Tensor, num: int) -> tuple[Tensor, ...]:
    if packed.ndim < 4 or packed.shape[-3] != num:
        raise ValueError(f"{name} must be (..., {num}, heads, head_dim), got {tuple(packed.shape)}; stack before heads")
    return packed.unbind(-3)


def _lengths(name: str, cu_seqlens: Tensor, longest: str, max_seqlen: int, num_tokens: int) -> tuple[int, ...]:
    """Lengths of the documents that cumulative lengths speak of, empty ones left out."""
    edges = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(edges)]
    if not lengths or edges[0] != 0 or edges[-1] != num_tokens or min(lengths) < 0 or max(lengths) == 0:
        raise ValueError(
            f"{name} must rise from 0 to the {num_tokens} tokens they divide (at least one), got {_short(edges)}; pass "
            "the cumulative lengths of the tensors of this call"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(f"{longest} must be at least the longest document, {max(lengths)} tokens, got {max_seqlen}")
    return tuple(n for n in lengths if n)


def _short(edges: list[int]) -> str:
    return str(edges) if len(edges) <= 8 else f"[{', '.join(map(str, edges[:4]))}, ..., {edges[-1]}]"


ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = _batched(
    "ring_flash_attn", "ring", "contiguous"
)
zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = _batched(
    "zigzag_ring_flash_attn", "zigzag", "zigzag"
)
stripe_flash_attn_func, stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = _batched(
    "stripe_flash_attn", "striped", "striped"
)
ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = _varlen(
    "ring_flash_attn_varlen", "ring", folded=False
)
(
    zigzag_ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_varlen_kvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
) = _varlen("zigzag_ring_flash_attn_varlen", "zigzag", folded=True)


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What a rank must know of documents that lie end to end over all ranks, cumulative lengths ``cu_seqlens``.

    Returns (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice): the pieces of documents among this
    rank's queries, the keys each of them may see, and where these keys lie in the whole.
    Raises ValueError where the tokens do not divide by the ranks.
    """
    edges = cu_seqlens.tolist()
    if edges[-1] % world_size:
        raise ValueError(
            f"llama3 functions give every rank equally many tokens, got {edges[-1]} tokens on {world_size} ranks; pad "
            "the last document, or use longspan.context.attention, which takes any length"
        )
    per_rank = edges[-1] // world_size
    start, stop = rank * per_rank, (rank + 1) * per_rank
    own = [(a, b) for a, b in pairwise(edges) if a < stop and b > start and a < b]
    first, last = own[0][0], stop if causal else own[-1][1]
    q_edges = [0, *(min(b, stop) - start for _, b in own)]
    k_edges = [0, *(b - first for _, b in own[:-1]), last - first]
    longest_q, longest_k = (max(b - a for a, b in pairwise(found)) for found in (q_edges, k_edges))
    return cu_seqlens.new_tensor(q_edges), cu_seqlens.new_tensor(k_edges), longest_q, longest_k, slice(first, last)


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = _EVERYWHERE,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Output:
    """Attention of documents that ranks cut anywhere; the cumulative lengths are this rank's, as prepared above.

    A rank is told its own documents only, so every call gathers where documents start: one small collective more.
    """
    group = group_in_force(group)
    world, rank = world_and_rank(group)
    # What is wrong on one rank alone is said by all of them: the others would wait for it.
    mine: tuple[list[int], str] = [], ""
    window = _EVERYWHERE
    try:
        window = _refuse(dropout_p, window_size, alibi_slopes, deterministic, q.device)
        _ndim(q, 3)
        if heads_k_stride < 1 or k.shape[1] % heads_k_stride:
            raise ValueError(f"heads_k_stride must divide the {k.shape[1]} KV heads, got {heads_k_stride}")
        _lengths("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q.shape[0])
        keys = local_k_slice.stop - local_k_slice.start
        _lengths("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, keys)
        if causal and local_k_slice.stop != (rank + 1) * q.shape[0]:
            raise ValueError(
                f"the keys of a causal rank must end with its queries, at {(rank + 1) * q.shape[0]}, got "
                f"{local_k_slice}; prepare the lengths with the same causal as the call"
            )
        mine = [local_k_slice.start + edge for edge in cu_seqlens_k.tolist()[:-1]], ""
    except ValueError as error:
        mine = [], str(error)
    everyone: list[tuple[list[int], str]] = [mine] * world
    if group is not None and world > 1:
        dist.all_gather_object(everyone, mine, group=group)
    for _, wrong in everyone:
        if wrong:
            raise ValueError(wrong)
    num_tokens = q.shape[0] * world
    edges = sorted({0, num_tokens, *(start for starts, _ in everyone for start in starts)})
    lengths = tuple(b - a for a, b in pairwise(edges))
    layout = make_layout("contiguous", num_tokens, world)
    mask = _mask(lengths, causal, window)
    return _attend(q, k, v, mask, layout, "all_gather", softmax_scale, group, return_attn_probs)


_, llama3_flash_attn_varlen_kvpacked_func, llama3_flash_attn_varlen_qkvpacked_func = _forms(
    "llama3_flash_attn_varlen", llama3_flash_attn_varlen_func
)
