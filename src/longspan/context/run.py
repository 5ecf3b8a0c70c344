"""Run: a schedule on torch.distributed, as one custom op with its gradient.

``torch.ops.longspan.attention(q, k, v, handle) -> (out, lse, saved)`` is what torch.compile and selective checkpointing
see; ``saved`` are arrivals that the schedule keeps for its backward phase (bytes, none for most methods).
The handle is an index into a table of bound schedules, the one process-level state of the package: a handle is bound
once and may be bound anew between steps (packed documents bring a new mask every step), so compiled code stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longspan.attention.kernels import pick
from longspan.attention.kernels.contract import row_sums
from longspan.attention.merge import accumulator
from longspan.context.build import Built
from longspan.context.engine import Arrival, Settings, Worker
from longspan.context.exchange import Exchange
from longspan.context.program import Program
from longspan.context.records import Record


@dataclass(frozen=True, slots=True)
class Bound:
    """A schedule bound to a process group: what a handle stands for."""

    built: Built
    group: dist.ProcessGroup | None
    scale: float | None
    softcap: float | None
    kernel: str


_TABLE: dict[int, Bound] = {}
_NEXT = count(1)


def bind(bound: Bound, handle: int | None = None) -> int:
    """Put a bound schedule into the table, under a new handle or in place of an old one."""
    if handle is None:
        handle = next(_NEXT)
    elif handle not in _TABLE:
        raise ValueError(f"handle {handle} is not bound; bind it without a number first")
    _TABLE[handle] = bound
    return handle


def release(*handles: int) -> None:
    """Forget handles."""
    for handle in handles:
        _TABLE.pop(handle, None)


def is_bound(handle: int) -> bool:
    """Whether a handle stands for something."""
    return handle in _TABLE


def bound(handle: int) -> Bound:
    """What a handle stands for. Raises ValueError for an unknown one."""
    if handle not in _TABLE:
        raise ValueError(f"attention handle {handle} is not bound; make one with longspan.context.prepare")
    return _TABLE[handle]


def rebind(handle: int, built: Built) -> None:
    """Give a handle new programs, keeping its group, scale, soft-cap and kernel."""
    bind(replace(bound(handle), built=built), handle)


def _validate(q: Tensor, k: Tensor, v: Tensor, built: Built) -> None:
    if not q.is_floating_point():
        raise ValueError(f"q, k and v must be floating-point tensors, got {q.dtype}; convert them")
    expected = built.layout.local_sizes[built.rank]
    for name, x, heads in (("q", q, built.num_heads), ("k", k, built.num_kv_heads), ("v", v, built.num_kv_heads)):
        if x.ndim != 4 or x.shape[1] != expected or x.shape[2] != heads:
            raise ValueError(
                f"{name} must be (batch, {expected} local tokens, {heads} heads, head_dim) for this mask and layout, "
                f"got {tuple(x.shape)}"
            )
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share batch, head dim, dtype and device, got q {tuple(q.shape)} {q.dtype} {q.device} "
                f"and {name} {tuple(x.shape)} {x.dtype} {x.device}"
            )


def _execute(
    program: Program,
    inputs: list[Record],
    at: Bound,
    settings: Settings,
    saved: Tensor | None = None,
    out: Tensor | None = None,
) -> Worker:
    worker = Worker(program, inputs, settings, saved, out)
    exchange = None if at.group is None else Exchange(at.group, inputs[0][0].device)
    arrivals: list[Arrival | None] = []
    for step in program.steps:
        if exchange is not None:
            outgoing = [(send.peer, send.lane, worker.outgoing(send)) for send in step.sends]
            incoming = [(receive.peer, receive.lane, worker.incoming(receive)) for receive in step.receives]
            waits = exchange.post(outgoing, incoming, [send.span for send in step.sends])
            arrivals += [
                Arrival(receive, flat, wait)
                for receive, (_, _, flat), wait in zip(step.receives, incoming, waits, strict=True)
            ]
        worker.advance(step, arrivals)
    if exchange is not None:
        exchange.finish()
    return worker


def _settings(q: Tensor, at: Bound) -> Settings:
    scale = q.shape[-1] ** -0.5 if at.scale is None else at.scale
    return Settings(pick(q, softcap=at.softcap, name=at.kernel), scale, at.softcap)


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor with a storage of its own: results that arrived in one message are views of it."""
    x = x.to(dtype).contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.itemsize else x.clone()


@torch.library.custom_op("longspan::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, handle: int) -> tuple[Tensor, Tensor, Tensor]:
    """Local (out, lse, saved): q (b, l, h, d), k and v (b, l, g, d) -> (b, l, h, d), (b, h, l) and uint8 (bytes,)."""
    at = bound(handle)
    _validate(q, k, v, at.built)
    worker = _execute(at.built.forward, [(q,), (k, v)], at, _settings(q, at))
    out, lse = worker.result()
    return _own(out, q.dtype), _own(lse, lse.dtype), worker.saved


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: int) -> tuple[Tensor, Tensor, Tensor]:
    del k, v, handle
    b, length, h, _ = q.shape
    # The handle may be bound to another mask later, and then keeps another number of bytes.
    num_bytes = torch.library.get_ctx().new_dynamic_size()
    lse = q.new_empty((b, h, length), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse, q.new_empty((num_bytes,), dtype=torch.uint8)


@torch.library.custom_op("longspan::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    saved: Tensor,
    handle: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Local (dq, dk, dv) of a bound schedule, given the global lse and delta (b, h, l); ``out`` as ``engine.Worker``
    takes it."""
    at = bound(handle)
    worker = _execute(at.built.backward, [(q,), (k, v), (dout, lse, delta)], at, _settings(q, at), saved, out)
    (dq,), (dk, dv) = worker.result(0), worker.result(1)
    return _own(dq, q.dtype), _own(dk, q.dtype), _own(dv, q.dtype)


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    saved: Tensor,
    handle: int,
) -> tuple[Tensor, Tensor, Tensor]:
    del dout, out, lse, delta, saved, handle
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.handle = inputs
    ctx.set_materialize_grads(False)  # no gradient of lse is not one of zeros: see _backward
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None, dsaved: None):
    q, k, v, out, lse, saved = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    delta = row_sums(dout, out.to(lse.dtype))
    if dlse is not None:
        delta, out = delta - dlse, None  # d lse adds P·dlse to dS = P·(dP - delta)
    grads = torch.ops.longspan.attention_backward(dout, q, k, v, out, lse, delta.contiguous(), saved, ctx.handle)
    return (*grads, None)


def _no_second_derivative(ctx, *grads):
    raise ValueError("second derivatives of longspan attention are not supported; use create_graph=False")


attention_op.register_autograd(_backward, setup_context=_setup)
attention_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


@register_flop_formula(torch.ops.longspan.attention)
def _forward_flops(q_shape, k_shape, v_shape, handle, *args, out_shape=None, **kwargs) -> int:
    """Two matmuls over the allowed pairs of this rank."""
    return 4 * bound(handle).built.forward.area * q_shape[0] * q_shape[3]


@register_flop_formula(torch.ops.longspan.attention_backward)
def _backward_flops(
    dout_shape, q_shape, k_shape, v_shape, own_shape, lse_shape, delta_shape, saved_shape, handle, *args, **kwargs
) -> int:
    """Five matmuls over the allowed pairs of this rank."""
    return 10 * bound(handle).built.backward.area * q_shape[0] * q_shape[3]


def attend(
    q: Float[Tensor, "b l h d"], k: Float[Tensor, "b l g d"], v: Float[Tensor, "b l g d"], handle: int
) -> Float[Tensor, "b l h d"]:
    """The attention of a prepared handle; what compiled code and models call."""
    return torch.ops.longspan.attention(q, k, v, handle)[0]
