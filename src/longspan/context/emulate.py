"""Emulate: every rank of a schedule in one process, exactly, in lockstep. One CPU or one GPU is enough.

The same lowered programs and the same worker as ``run``, with queues in place of a network: the way to test a method,
to test many ranks on one GPU, and to look at a schedule's numerics without a cluster.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.attention.kernels.contract import row_sums
from longspan.attention.merge import accumulator
from longspan.context.engine import Arrival, Settings, Worker
from longspan.context.geometry import Geometry
from longspan.context.lower import lower_all
from longspan.context.program import Program
from longspan.context.records import Record
from longspan.context.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Emulation:
    """Global results of an emulated attention, in global token order."""

    out: Float[Tensor, "b s h d"]
    lse: Float[Tensor, "b h s"]
    grads: tuple[Tensor, Tensor, Tensor] | None  # dq, dk, dv


@dataclass(frozen=True, slots=True)
class Played:
    """One phase as it was emulated, by rank: what ``withhold`` needs to play one rank alone."""

    programs: list[Program]
    inputs: list[list[Record]]
    saved: list[Tensor | None]
    outs: list[Tensor | None]
    arrivals: list[list[Tensor]]  # in the order of the program's receives


def _no_wait() -> None:
    """What came by a copy is there."""


def exchange_in_lockstep(
    programs: list[Program], workers: list[Worker], seen: list[list[Tensor]] | None = None
) -> None:
    """Run all ranks' programs of one phase step by step; copies of each rank's arrivals are added to ``seen``."""
    waiting: list[list[Arrival | None]] = [[] for _ in workers]
    queues: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
    num_steps = max((len(program.steps) for program in programs), default=0)
    for number in range(num_steps):
        for program, worker in zip(programs, workers, strict=True):
            for send in program.steps[number].sends:
                queues[program.rank, send.peer, send.lane].append(worker.outgoing(send))
        for program, worker, arrivals in zip(programs, workers, waiting, strict=True):
            step = program.steps[number]
            for receive in step.receives:
                flat = worker.incoming(receive).copy_(queues[receive.peer, program.rank, receive.lane].popleft())
                arrivals.append(Arrival(receive, flat, _no_wait))
                if seen is not None:
                    seen[program.rank].append(flat.clone())
            worker.advance(step, arrivals)
    assert not any(queues.values()), "messages left over"


def emulate(
    schedule: Schedule,
    geometry: Geometry,
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    settings: Settings,
    dout: Float[Tensor, "b s h d"] | None = None,
    played: list[Played] | None = None,
) -> Emulation:
    """Attention (and, given ``dout``, its gradients) by the schedule, of global tensors in global token order.

    The schedule must have been pruned for the geometry's mask (``passes.prune_schedule``). Phases are added to
    ``played`` with copies of all that was sent.
    """
    layout = schedule.layout
    order = [torch.from_numpy(layout.positions(rank)).to(q.device) for rank in range(layout.world)]

    def split(x: Tensor, dim: int = 1) -> list[Tensor]:
        return [x.index_select(dim, positions) for positions in order]

    def joined(parts: list[Tensor], dim: int = 1) -> Tensor:
        return torch.cat(parts, dim).index_select(dim, torch.from_numpy(layout.slots).to(q.device))

    def phase(
        inputs: list[list[Record]], saved: list[Tensor | None], outs: list[Tensor | None], *, backward: bool
    ) -> list[Worker]:
        source = schedule.backward if backward else schedule.forward
        programs = lower_all(source, schedule, geometry, backward=backward)
        workers = [Worker(p, i, settings, s, o) for p, i, s, o in zip(programs, inputs, saved, outs, strict=True)]
        seen = None if played is None else [[] for _ in workers]
        exchange_in_lockstep(programs, workers, seen)
        if played is not None and seen is not None:
            played.append(Played(programs, [list(records) for records in inputs], saved, outs, seen))
        return workers

    qs, ks, vs = split(q), split(k), split(v)
    own: list[list[Record]] = [[(qr,), (kr, vr)] for qr, kr, vr in zip(qs, ks, vs, strict=True)]
    nothing: list[Tensor | None] = [None] * layout.world
    workers = phase(own, nothing, nothing, backward=False)
    results = [worker.result() for worker in workers]
    out, lse = joined([r[0] for r in results]), joined([r[1] for r in results], 2)
    if dout is None:
        return Emulation(out.to(q.dtype), lse, None)
    outs = [r[0].to(q.dtype) for r in results]
    for inputs, local, out_r, (_, lse_r) in zip(own, split(dout), outs, results, strict=True):
        delta = row_sums(local, out_r.to(accumulator(q.dtype)))
        inputs.append((local, lse_r, delta.contiguous()))
    workers = phase(own, [worker.saved for worker in workers], [*outs], backward=True)
    dq = joined([worker.result(0)[0] for worker in workers])
    dk, dv = (joined([worker.result(1)[i] for worker in workers]) for i in (0, 1))
    return Emulation(out.to(q.dtype), lse, (dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)))
