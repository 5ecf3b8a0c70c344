"""The worker that executes one rank's lowered program; ``emulate`` and ``run`` differ only in how bytes travel.

A record is the tuple of tensors of one kind of data on some tokens and heads: q (b, n, h, d); kv two of these; do the
output gradient with lse and delta (b, h, n); o the output with its lse; dq; dkv. Messages are one flat uint8 tensor
each, so that a record of several tensors costs one send. Sums are accumulated and sent in the accumulation dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.kernels import Kernel
from longspan.attention.merge import accumulator, merge_
from longspan.context.geometry import count
from longspan.context.lower import Compute, Part, Program, Receive, Region, Send, Write
from longspan.context.schedule import INPUTS, Kind


class Axes(NamedTuple):
    tokens: int
    heads: int


_DATA, _STAT = Axes(1, 2), Axes(2, 1)
COMPONENTS: dict[Kind, tuple[Axes, ...]] = {
    "q": (_DATA,),
    "kv": (_DATA, _DATA),
    "do": (_DATA, _STAT, _STAT),
    "o": (_DATA, _STAT),
    "dq": (_DATA,),
    "dkv": (_DATA, _DATA),
}
Record = tuple[Tensor, ...]


class _Spec(NamedTuple):
    """One tensor of a record, and its bytes ``start`` to ``stop`` in the message."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """How blocks are computed, the same on all ranks."""

    kernel: Kernel
    scale: float
    softcap: float | None


class Worker:
    """State of one rank during one phase.

    ``inputs`` are the own records in the order of ``program.own`` (q, kv and, in backward, do); ``saved`` is what the
    worker of the forward phase ``saved()``.
    """

    def __init__(self, program: Program, inputs: list[Record], settings: Settings, saved: Tensor | None = None) -> None:
        self.program, self.settings = program, settings
        query = inputs[0][0]
        self.batch, self.head_dim, self.device = query.shape[0], query.shape[3], query.device
        self.input_dtype = query.dtype
        self.sum_dtype = accumulator(query.dtype)
        self.records: dict[int, Record] = dict(enumerate(inputs))
        self.flats: dict[int, Tensor] = {}
        self._known_specs: dict[tuple[Kind, int, int, bool], tuple[list[_Spec], int]] = {}
        if saved is not None:
            self._load(saved)

    # Messages

    def _specs(self, kind: Kind, num_tokens: int, num_heads: int, complete: bool = False) -> tuple[list[_Spec], int]:
        """The tensors of a record in its message, and the bytes of the message."""
        found = self._known_specs.get((kind, num_tokens, num_heads, complete))
        if found is not None:
            return found
        specs, offset = [], 0
        for axes in COMPONENTS[kind]:
            if axes is _DATA:
                shape = (self.batch, num_tokens, num_heads, self.head_dim)
                dtype = self.input_dtype if complete or kind in INPUTS else self.sum_dtype
            else:
                shape, dtype = (self.batch, num_heads, num_tokens), self.sum_dtype
            num_bytes = math.prod(shape) * dtype.itemsize
            specs.append(_Spec(shape, dtype, offset, offset + num_bytes))
            offset += -(-num_bytes // _ALIGN) * _ALIGN
        self._known_specs[kind, num_tokens, num_heads, complete] = specs, offset
        return specs, offset

    def _views(self, flat: Tensor, kind: Kind, num_tokens: int, num_heads: int, complete: bool = False) -> Record:
        specs, _ = self._specs(kind, num_tokens, num_heads, complete)
        return tuple(flat[s.start : s.stop].view(s.dtype).view(s.shape) for s in specs)

    def message(self, region: Region, complete: bool) -> Tensor:
        """The region packed into one flat uint8 tensor; an arrival that is passed on whole is not copied."""
        if len(region.parts) == 1:
            part = region.parts[0]
            if part.buffer in self.flats and (part.num_tokens, part.num_heads) == self._extent(part.buffer):
                return self.flats[part.buffer]
        shape = region.num_tokens, region.num_heads
        flat = self.empty_message(region.kind, *shape, complete)
        for index, view in enumerate(self._views(flat, region.kind, *shape, complete)):
            self._assemble(view, region, index)
        return flat

    def empty_message(self, kind: Kind, num_tokens: int, num_heads: int, complete: bool) -> Tensor:
        """A flat uint8 tensor with room for a record."""
        return torch.empty(self._specs(kind, num_tokens, num_heads, complete)[1], dtype=torch.uint8, device=self.device)

    def outgoing(self, send: Send) -> Tensor:
        return self.message(send.region, send.complete)

    def incoming(self, receive: Receive) -> Tensor:
        return self.empty_message(receive.kind, receive.num_tokens, receive.num_heads, receive.complete)

    def _extent(self, buffer: int) -> tuple[int, int]:
        """Tokens and heads of a buffer."""
        piece = self.program.buffers[buffer].piece
        return count(piece.tokens), piece.heads[1] - piece.heads[0]

    def saved(self) -> Tensor:
        """The messages that the backward phase needs again, end to end."""
        flats = [self.flats[buffer] for buffer in self.program.saved]
        return torch.cat(flats) if flats else torch.empty(0, dtype=torch.uint8, device=self.device)

    def _load(self, saved: Tensor) -> None:
        start = 0
        for buffer in self.program.saved:
            kind, extent = self.program.buffers[buffer].piece.kind, self._extent(buffer)
            stop = start + self._specs(kind, *extent)[1]
            self.records[buffer] = self._views(saved[start:stop], kind, *extent)
            start = stop

    # Reading

    def _assemble(self, target: Tensor, region: Region, index: int) -> None:
        axes = COMPONENTS[region.kind][index]
        for part in region.parts:
            view = _narrow(target, axes, part.to_token, part.num_tokens, part.to_head, part.num_heads)
            view.copy_(self._part(part, axes, index))

    def _part(self, part: Part, axes: Axes, index: int) -> Tensor:
        source = self.records[part.buffer][index]
        return _narrow(source, axes, part.token, part.num_tokens, part.head, part.num_heads)

    def read(self, region: Region) -> Record:
        """The record of a region: a view where it lies in one buffer, else assembled."""
        if len(region.parts) == 1:
            return tuple(self._part(region.parts[0], axes, i) for i, axes in enumerate(COMPONENTS[region.kind]))
        record = []
        for index, axes in enumerate(COMPONENTS[region.kind]):
            like = self.records[region.parts[0].buffer][index]
            shape = list(like.shape)
            shape[axes.tokens], shape[axes.heads] = region.num_tokens, region.num_heads
            target = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._assemble(target, region, index)
            record.append(target)
        return tuple(record)

    # Writing

    def _accumulator(self, buffer: int) -> Record:
        """The record of an accumulator, allocated on first use (its cells are copied into before they are merged)."""
        if buffer not in self.records:
            specs, _ = self._specs(self.program.buffers[buffer].piece.kind, *self._extent(buffer))
            self.records[buffer] = tuple(torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in specs)
        return self.records[buffer]

    def write(self, write: Write, record: Record) -> None:
        """Copy, merge or take over a record of sums."""
        if write.adopt is not None:
            self.records[write.adopt] = record
            return
        axes = COMPONENTS[write.kind]
        for merging, parts in ((False, write.copies), (True, write.merges)):
            for part in parts:
                targets = self._accumulator(part.buffer)
                old = [
                    _narrow(t, a, part.token, part.num_tokens, part.head, part.num_heads)
                    for t, a in zip(targets, axes, strict=True)
                ]
                new = [
                    _narrow(t, a, part.to_token, part.num_tokens, part.to_head, part.num_heads)
                    for t, a in zip(record, axes, strict=True)
                ]
                if not merging:
                    for o, n in zip(old, new, strict=True):
                        o.copy_(n)
                elif write.kind == "o":
                    merge_(old[0], old[1], new[0], new[1])
                else:
                    for o, n in zip(old, new, strict=True):
                        o.add_(n)

    # Steps

    def compute(self, compute: Compute) -> None:
        """Run one block and write its results."""
        (q,) = self.read(compute.q)
        k, v = self.read(compute.kv)
        num_heads, num_kv_heads = q.shape[2], k.shape[2]
        spread = None
        if num_kv_heads > 1 and num_heads != num_kv_heads * self.program.group_size:
            # The block's query heads use its KV heads unevenly: give each query head its own copy.
            heads = torch.arange(*compute.heads, device=self.device)
            spread = heads // self.program.group_size - compute.kv_heads[0]
            k, v = k.index_select(2, spread), v.index_select(2, spread)
        kernel, scale, softcap = self.settings.kernel, self.settings.scale, self.settings.softcap
        if compute.do is None:
            self.write(compute.writes[0], kernel.forward(q, k, v, compute.bands, scale=scale, softcap=softcap))
            return
        dout, lse, delta = self.read(compute.do)
        dq, dk, dv = kernel.backward(dout, q, k, v, lse, delta, compute.bands, scale=scale, softcap=softcap)
        if spread is not None:
            shape = (*dk.shape[:2], num_kv_heads, dk.shape[3])
            dk = dk.new_zeros(shape).index_add_(2, spread, dk)
            dv = dv.new_zeros(shape).index_add_(2, spread, dv)
        self.write(compute.writes[0], (dq,))
        self.write(compute.writes[1], (dk, dv))

    def arrive(self, receive: Receive, flat: Tensor, write: Write | None) -> None:
        """Take in a message whose bytes are complete."""
        record = self._views(flat, receive.kind, receive.num_tokens, receive.num_heads, receive.complete)
        if write is not None:
            self.write(write, record)
        else:
            assert receive.buffer is not None
            self.records[receive.buffer] = record
            self.flats[receive.buffer] = flat

    def free(self, buffers: list[int]) -> None:
        for buffer in buffers:
            self.records.pop(buffer, None)
            self.flats.pop(buffer, None)

    def result(self, index: int = 0) -> Record:
        """The own sums of the ``index``-th sum kind; rows that nothing wrote are empty (0, and lse -inf)."""
        num_inputs = len(self.program.own) - len(self.program.unwritten)
        buffer = num_inputs + index
        kind = self.program.own[buffer]
        record = self._accumulator(buffer)
        for part in self.program.unwritten[index]:
            for component, (tensor, axes) in enumerate(zip(record, COMPONENTS[kind], strict=True)):
                empty = float("-inf") if kind == "o" and component == 1 else 0.0
                _narrow(tensor, axes, part.token, part.num_tokens, part.head, part.num_heads).fill_(empty)
        return record


def _narrow(tensor: Tensor, axes: Axes, token: int, num_tokens: int, head: int, num_heads: int) -> Tensor:
    if tensor.shape[axes.tokens] != num_tokens:
        tensor = tensor.narrow(axes.tokens, token, num_tokens)
    if tensor.shape[axes.heads] != num_heads:
        tensor = tensor.narrow(axes.heads, head, num_heads)
    return tensor
