"""The worker that executes one rank's lowered program; ``run``, ``emulate`` and ``withhold`` differ in how bytes come.

Messages are one flat uint8 tensor each, so that a record of several tensors costs one send. Token by token they hold
all tensors of the record: arrivals that are read together lie end to end in one buffer, and are one tensor without a
copy. Sums of several parts are accumulated, and travel, in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.kernels import Kernel
from longspan.attention.kernels.contract import stand_in
from longspan.attention.merge import Placed, accumulator, merge_into
from longspan.context.arena import Places, Span, place
from longspan.context.geometry import count
from longspan.context.program import Compute, Fill, Part, Program, Receive, Region, Send, Step, Write
from longspan.context.records import COMPONENTS, DATA, Axes, Form, Record, copy, narrow
from longspan.context.schedule import INPUTS, Kind


class Arrival(NamedTuple):
    """A message under way: its receive, where its bytes go (flat, uint8), and what waits until they are there."""

    receive: Receive
    flat: Tensor
    wait: Callable[[], object]


_ALIGN = 16
_MERGED_AT_ONCE = 3  # beside what is there: they take memory until then


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True)
class Settings:
    """How blocks are computed, the same on all ranks."""

    kernel: Kernel
    scale: float
    softcap: float | None


class Worker:
    """State of one rank during one phase.

    ``inputs`` are the own records in the order of ``program.own`` (q, kv and, in backward, do). ``saved`` is the
    memory of the arrivals that are kept: made in the forward phase, given to the worker of the backward phase. ``out``,
    in backward: the own output, where delta is its row sums with dout and nothing else; None: made from delta.
    """

    def __init__(
        self,
        program: Program,
        inputs: list[Record],
        settings: Settings,
        saved: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        self.program, self.settings = program, settings
        query = inputs[0][0]
        self.batch, self.head_dim, self.device = query.shape[0], query.shape[3], query.device
        self.input_dtype = query.dtype
        self.sum_dtype = accumulator(query.dtype)
        self.records: dict[int, Record] = dict(enumerate(inputs))
        self.flats: dict[int, Tensor] = {}
        self._own_out = out
        self._own_dout_and_out: tuple[Tensor, Tensor] | None = None
        self._unmerged: dict[int, list[Placed]] = {}  # outputs to be merged, by buffer
        self._messages = {r.buffer for step in program.steps for r in step.receives} | {*program.saved, *program.packed}
        self._forms: dict[tuple[Kind, int, int, bool], Form] = {}
        sizes = [_aligned(self._buffer_form(buffer).num_bytes) for buffer in program.saved]
        self.saved = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device) if saved is None else saved
        for buffer, flat in zip(program.saved, self.saved.split(sizes), strict=True):
            self.hold(buffer, flat)
        for buffer in program.packed:
            form = self._buffer_form(buffer)
            if self.batch == form.num_data == 1:
                self.flats[buffer] = inputs[buffer][0].contiguous().view(-1).view(torch.uint8)
            else:
                self.flats[buffer] = self._empty(form.num_bytes)
                for view, own in zip(self._views(self.flats[buffer], form), inputs[buffer], strict=True):
                    copy(view, own)

        self._places = self._find_places()
        self._arena = self._empty(self._places.num_bytes)

    # Messages

    def _find_places(self) -> Places:
        """Where the phase's messages lie in its arena: found once for a program and sizes."""
        program, key = self.program, (self.batch, self.head_dim, self.input_dtype)
        if key in program.places:
            return program.places[key]
        landed = {landing.receive: (n, landing) for n, step in enumerate(program.steps) for landing in step.landings}
        spans: dict[tuple[str, int], Span] = {}
        for number, step in enumerate(program.steps):
            for send in step.sends:
                form = self._region_form(send)
                if self._in_place(send, form):  # what it lies in is read by the wire a little longer
                    part = "buffers", send.region.parts[0].buffer
                    if part in spans:
                        spans[part] = spans[part]._replace(last=max(spans[part].last, number + send.span))
                else:
                    spans["sends", send.number] = Span(form.num_bytes, number, number + send.span)
            for receive in step.receives:
                step_landed, landing = landed[receive.number]
                if receive.buffer is None:
                    adopted = landing.write.adopt if landing.write else None
                    last = step_landed if adopted is None else program.buffers[adopted].dies
                    spans["receives", receive.number] = Span(self._received_form(receive).num_bytes, number, last)
                elif receive.buffer not in program.saved and ("buffers", receive.buffer) not in spans:
                    size = self._buffer_form(receive.buffer).num_bytes
                    spans["buffers", receive.buffer] = Span(size, number, program.buffers[receive.buffer].dies)
        total, offsets = place(list(spans.values()))
        found = Places(total, {}, {}, {})
        for (kind, index), offset in zip(spans, offsets, strict=True):
            getattr(found, kind)[index] = offset
        program.places[key] = found
        return found

    def _region_form(self, send: Send) -> Form:
        return self._form(send.region.kind, send.region.num_tokens, send.region.num_heads, send.complete)

    def _received_form(self, receive: Receive) -> Form:
        return self._form(receive.kind, receive.num_tokens, receive.num_heads, receive.complete)

    def _in_place(self, send: Send, form: Form) -> bool:
        """Whether what is sent lies as a message already: whole rows of one buffer."""
        parts = send.region.parts
        if len(parts) != 1 or form.stats or parts[0].buffer not in self._messages:
            return False
        return parts[0].num_heads == self._buffer_form(parts[0].buffer).num_heads

    def _at(self, offset: int, num_bytes: int) -> Tensor:
        return self._arena[offset : offset + num_bytes]

    def _form(self, kind: Kind, num_tokens: int, num_heads: int, complete: bool) -> Form:
        key = kind, num_tokens, num_heads, complete
        if key not in self._forms:
            components = COMPONENTS[kind]
            num_data = components.count(DATA)
            dtype = self.input_dtype if complete or kind in INPUTS else self.sum_dtype
            row_bytes = self.batch * num_data * num_heads * self.head_dim * dtype.itemsize
            stat_bytes = self.batch * num_heads * num_tokens * self.sum_dtype.itemsize
            end, stats = num_tokens * row_bytes, []
            for _ in components[num_data:]:
                start = _aligned(end)
                end = start + stat_bytes
                stats.append((start, end))
            self._forms[key] = Form(num_tokens, num_heads, num_data, dtype, row_bytes, tuple(stats), end)
        return self._forms[key]

    def _buffer_form(self, buffer: int) -> Form:
        """The form of an arrival's buffer."""
        piece = self.program.buffers[buffer].piece
        return self._form(piece.kind, count(piece.tokens), piece.heads[1] - piece.heads[0], False)

    def _views(self, flat: Tensor, form: Form) -> Record:
        """The tensors of a record in its message, none of them a copy."""
        rows = flat[: form.num_tokens * form.row_bytes].view(form.dtype)
        rows = rows.view(form.num_tokens, self.batch, form.num_data, form.num_heads, self.head_dim)
        data = (rows[:, :, index].transpose(0, 1) for index in range(form.num_data))
        shape = self.batch, form.num_heads, form.num_tokens
        return *data, *(flat[start:stop].view(self.sum_dtype).view(shape) for start, stop in form.stats)

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def hold(self, buffer: int, flat: Tensor) -> None:
        """Let a buffer of arrivals lie in this memory."""
        self.flats[buffer] = flat
        self.records[buffer] = self._views(flat, self._buffer_form(buffer))

    def _arrivals(self, buffer: int) -> Tensor:
        """The memory of a buffer of arrivals."""
        if buffer not in self.flats:
            self.hold(buffer, self._at(self._places.buffers[buffer], self._buffer_form(buffer).num_bytes))
        return self.flats[buffer]

    def outgoing(self, send: Send) -> Tensor:
        """The send's region as one flat uint8 tensor; whole rows of what lies as messages do are not copied."""
        region, form = send.region, self._region_form(send)
        if self._in_place(send, form):
            part = region.parts[0]
            first = part.token * form.row_bytes
            return self.flats[part.buffer][first : first + part.num_tokens * form.row_bytes]
        flat = self._at(self._places.sends[send.number], form.num_bytes)
        for index, view in enumerate(self._views(flat, form)):
            self._assemble(view, region.parts, COMPONENTS[region.kind][index], index)
        return flat

    def incoming(self, receive: Receive) -> Tensor:
        """Where the message of a receive goes (flat, uint8): for inputs, where they are read from then on."""
        form = self._received_form(receive)
        if receive.buffer is None:
            return self._at(self._places.receives[receive.number], form.num_bytes)
        flat = self._arrivals(receive.buffer)
        if form.stats:  # such a message has its buffer for itself
            return flat
        first = receive.token * form.row_bytes
        return flat[first : first + form.num_tokens * form.row_bytes]

    def fill(self, fill: Fill) -> None:
        """Copy own tokens to their place between arrivals."""
        self._arrivals(fill.buffer)
        for index, (target, axes) in enumerate(zip(self.records[fill.buffer], COMPONENTS[fill.kind], strict=True)):
            self._assemble(target, fill.parts, axes, index)

    # Reading

    def _assemble(self, target: Tensor, parts: Iterable[Part], axes: Axes, index: int) -> None:
        for part in parts:
            view = narrow(target, axes, part.to_token, part.num_tokens, part.to_head, part.num_heads)
            copy(view, self._part(part, axes, index))

    def _part(self, part: Part, axes: Axes, index: int) -> Tensor:
        if part.buffer in self._unmerged:
            self._merge(part.buffer, self.sum_dtype)
        source = self.records[part.buffer][index]
        return narrow(source, axes, part.token, part.num_tokens, part.head, part.num_heads)

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
            self._assemble(target, region.parts, axes, index)
            record.append(target)
        return tuple(record)

    # Writing

    def _accumulator(self, buffer: int, dtype: torch.dtype) -> Record:
        """The record of an accumulator whose data are of ``dtype`` or wider, allocated on first use.

        Its cells are copied into before they are merged. Sums that came whole, from one call or in one message, stay
        in the dtype they came in: the result is rounded to it anyway.
        """
        if buffer not in self.records:
            piece = self.program.buffers[buffer].piece
            n, heads = count(piece.tokens), piece.heads[1] - piece.heads[0]
            self.records[buffer] = tuple(
                torch.empty((self.batch, n, heads, self.head_dim), dtype=dtype, device=self.device)
                if axes is DATA
                else torch.empty((self.batch, heads, n), dtype=self.sum_dtype, device=self.device)
                for axes in COMPONENTS[piece.kind]
            )
        record = self.records[buffer]
        if torch.promote_types(record[0].dtype, dtype) != record[0].dtype:
            record = self.records[buffer] = tuple(x.to(torch.promote_types(x.dtype, dtype)) for x in record)
        return record

    def write(self, write: Write, record: Record) -> None:
        """Copy, merge or take over a record of sums. Outputs to be merged wait until some are there, or one is read."""
        if write.adopt is not None:
            self.records[write.adopt] = record
            return
        axes = COMPONENTS[write.kind]
        for merging, parts in ((False, write.copies), (True, write.merges)):
            for part in parts:
                new = tuple(
                    narrow(t, a, part.to_token, part.num_tokens, part.to_head, part.num_heads)
                    for t, a in zip(record, axes, strict=True)
                )
                if merging and write.kind == "o":
                    waiting = self._unmerged.setdefault(part.buffer, [])
                    waiting.append(Placed(new[0], new[1], part.token, part.head))
                    if len(waiting) == _MERGED_AT_ONCE:
                        self._merge(part.buffer, self.sum_dtype)
                    continue
                targets = self._accumulator(part.buffer, self.sum_dtype if merging else record[0].dtype)
                for target, a, n in zip(targets, axes, new, strict=True):
                    old = narrow(target, a, part.token, part.num_tokens, part.head, part.num_heads)
                    if merging:
                        old.add_(n)
                    else:
                        copy(old, n)

    def _merge(self, buffer: int, dtype: torch.dtype) -> None:
        """Merge outputs that wait into their buffer, whose data are of ``dtype`` then."""
        out, lse = self.records[buffer]
        parts = [Placed(out, lse, 0, 0), *self._unmerged.pop(buffer)]
        if out.dtype != dtype:
            out, lse = torch.empty_like(out, dtype=dtype), torch.empty_like(lse)
        merge_into(out, lse, parts)
        self.records[buffer] = out, lse

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
        dout, out = self._with_out(compute.do, dout)
        dq, dk, dv = kernel.backward(dout, q, k, v, lse, delta, compute.bands, scale=scale, softcap=softcap, out=out)
        if spread is not None:
            shape = (*dk.shape[:2], num_kv_heads, dk.shape[3])
            dk = dk.new_zeros(shape).index_add_(2, spread, dk)
            dv = dv.new_zeros(shape).index_add_(2, spread, dv)
        self.write(compute.writes[0], (dq,))
        self.write(compute.writes[1], (dk, dv))

    def _with_out(self, region: Region, dout: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dout, out) of a region as the kernel wants them; those of own queries, which many blocks read, made once."""
        part, dtype = region.parts[0], self.settings.kernel.out_dtype(self.input_dtype)
        if dtype is None or len(region.parts) > 1 or part.buffer >= len(self.program.own):
            return dout, None
        if self._own_dout_and_out is None:
            whole, _, delta = self.records[part.buffer]
            own = None if self._own_out is None else (whole.to(dtype), self._own_out.to(dtype))
            self._own_dout_and_out = own or stand_in(whole, delta, dtype)
        place = part.token, part.num_tokens, part.head, part.num_heads
        dout, out = (narrow(x, DATA, *place) for x in self._own_dout_and_out)
        return dout, out

    def arrive(self, receive: Receive, flat: Tensor, write: Write | None) -> None:
        """Take in a message whose bytes are complete; those of inputs lie where they are read."""
        if write is not None:
            self.write(write, self._views(flat, self._received_form(receive)))
            for part in write.merges:  # the message's memory is used again
                if part.buffer in self._unmerged:
                    self._merge(part.buffer, self.sum_dtype)

    def advance(self, step: Step, arrivals: list[Arrival | None]) -> None:
        """The rest of a step once its messages are posted: compute, and take in what lands, in the program's order.

        ``arrivals`` are those of the program's receives so far; what has landed is let go.
        """
        for fill in step.fills:
            self.fill(fill)
        for compute in step.computes:
            self.compute(compute)
        for landing in step.landings:
            arrival, arrivals[landing.receive] = arrivals[landing.receive], None
            assert arrival is not None, "a message lands once"
            arrival.wait()
            self.arrive(arrival.receive, arrival.flat, landing.write)
        self.free(step.frees)

    def free(self, buffers: list[int]) -> None:
        for buffer in buffers:
            self.records.pop(buffer, None)
            self.flats.pop(buffer, None)

    def results(self) -> list[Record]:
        """All own sums, by kind."""
        return [self.result(index) for index in range(len(self.program.unwritten))]

    def result(self, index: int = 0) -> Record:
        """The own sums of the ``index``-th sum kind; rows that nothing wrote are empty (0, and lse -inf)."""
        num_inputs = len(self.program.own) - len(self.program.unwritten)
        buffer = num_inputs + index
        kind = self.program.own[buffer]
        if buffer in self._unmerged:
            self._merge(buffer, self.input_dtype)
        record = self._accumulator(buffer, self.input_dtype)
        for part in self.program.unwritten[index]:
            for component, (tensor, axes) in enumerate(zip(record, COMPONENTS[kind], strict=True)):
                empty = float("-inf") if kind == "o" and component == 1 else 0.0
                narrow(tensor, axes, part.token, part.num_tokens, part.head, part.num_heads).fill_(empty)
        return record
