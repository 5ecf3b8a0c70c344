"""Time one rank of a schedule on one GPU, with every arrival withheld for as long as its wire would take.

``emulate`` shows what many ranks compute, not how long each would take: they share the device. Here each rank runs
alone, on the same lowered program and worker, its arrivals recorded from an emulation. What is posted and lands
together is ready ``bytes / bytes_per_s`` later: a copy from pinned host memory takes as long as the wire would, less
the copy to the place. The copy engine is the port, one batch after another, and takes no multiprocessor from the
kernels. Packing, merging and the traffic of what lands are real. Left out: senders later than the receiver (ranks are
taken to enter a step together).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.context.emulate import Emulation, Played, emulate
from longspan.context.engine import Arrival, Settings, Worker
from longspan.context.geometry import Geometry
from longspan.context.program import Program
from longspan.context.records import Record
from longspan.context.schedule import Schedule

_PROBE_BYTES = 64 << 20
_WARM_UP = 2  # repetitions that do not count
_HEAD_START = 50_000_000  # clock cycles, some 25 ms: the host is ahead of the device, as between the layers of a model


@dataclass(frozen=True, slots=True)
class RankTime:
    """Medians of one rank, in seconds: what it took, what the host took to launch it, and the wire alone, as it was and
    as it should have been."""

    time_s: float
    host_s: float
    wire_s: float
    wanted_wire_s: float


class _Wire:
    """A port that delivers one message after another, at a rate."""

    def __init__(self, device: torch.device, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.stream = torch.cuda.Stream(device)
        self._source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
        self._place = torch.empty_like(self._target)
        self._delay, self._land = self._fit(self._wait), self._fit(self._put)

    def _fit(self, copy: Callable[[int], None]) -> tuple[float, float]:
        """Seconds of a copy, and per byte."""
        few, many = _PROBE_BYTES // 256, _PROBE_BYTES
        medians = []
        for num_bytes in (few, many):
            seconds = []
            for _ in range(7):
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                with torch.cuda.stream(self.stream):
                    torch.cuda._sleep(_HEAD_START // 10)
                    marks[0].record()
                    for _ in range(8):
                        copy(num_bytes)
                    marks[1].record()
                self.stream.synchronize()
                seconds.append(marks[0].elapsed_time(marks[1]) / 8e3)
            medians.append(statistics.median(seconds))
        byte_s = (medians[1] - medians[0]) / (many - few)
        return max(0.0, medians[0] - few * byte_s), byte_s

    def _wait(self, num_bytes: int) -> None:
        self._target[:num_bytes].copy_(self._source[:num_bytes], non_blocking=True)

    def _put(self, num_bytes: int) -> None:
        _copy_all([self._place[:num_bytes]], [self._target[:num_bytes]])

    def deliver(self, messages: Sequence[Tensor], places: Sequence[Tensor]) -> torch.cuda.Event:
        """Start to deliver messages to their places, after what was posted before; returns when they have come."""
        num_bytes = sum(message.numel() for message in messages)
        left_s = num_bytes / self.bytes_per_s - self._land[0] - num_bytes * self._land[1]
        with torch.cuda.stream(self.stream):
            while left_s > self._delay[0]:
                part = min(_PROBE_BYTES, 1 + int((left_s - self._delay[0]) / self._delay[1]))
                self._wait(part)
                left_s -= self._delay[0] + part * self._delay[1]
            _copy_all(list(places), list(messages))
        ready = torch.cuda.Event()
        ready.record(self.stream)
        return ready

    def alone_s(self, batches: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
        """Seconds for batches end to end: the median as measured, and as they should be."""
        places = [[torch.empty_like(message) for message in batch] for batch in batches]
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(_HEAD_START)
            marks[0].record(self.stream)
            for batch, targets in zip(batches, places, strict=True):
                self.deliver(batch, targets)
            marks[1].record(self.stream)
            self.stream.synchronize()
            seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
        wanted_s = sum(message.numel() for batch in batches for message in batch) / self.bytes_per_s
        return statistics.median(seconds), wanted_s


def _copy_all(places: list[Tensor], messages: list[Tensor]) -> None:
    torch._foreach_copy_(places, messages)  # pyright: ignore[reportPrivateImportUsage]


def _batches(program: Program) -> list[list[int]]:
    """The receives that are posted and land together, by number: they travel as one batch."""
    lands = {landing.receive: number for number, step in enumerate(program.steps) for landing in step.landings}
    groups: dict[tuple[int, int, int], list[int]] = {}
    index = 0
    for number, step in enumerate(program.steps):
        for receive in step.receives:
            groups.setdefault((number, lands[index], receive.lane), []).append(index)
            index += 1
    return list(groups.values())


def _run(
    program: Program,
    inputs: list[Record],
    settings: Settings,
    saved: Tensor | None,
    out: Tensor | None,
    recorded: list[Tensor],
    wire: _Wire,
) -> Worker:
    """One rank alone: as ``run``, with a wire in place of the others."""
    worker = Worker(program, inputs, settings, saved, out)
    batches = iter(_batches(program))
    arrivals: list[Arrival | None] = []
    for step in program.steps:
        for send in step.sends:
            worker.outgoing(send)
        if step.receives:
            wire.stream.wait_stream(torch.cuda.current_stream())
        posted, places = len(arrivals), [worker.incoming(receive) for receive in step.receives]
        ready: dict[int, torch.cuda.Event] = {}
        while len(ready) < len(places):
            batch = next(batches)
            come = wire.deliver([recorded[index] for index in batch], [places[index - posted] for index in batch])
            ready |= dict.fromkeys(batch, come)
        arrivals += [
            Arrival(receive, place, ready[posted + index].wait)
            for index, (receive, place) in enumerate(zip(step.receives, places, strict=True))
        ]
        worker.advance(step, arrivals)
    worker.results()
    return worker


def rank_times(
    schedule: Schedule,
    geometry: Geometry,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: Settings,
    *,
    bytes_per_s: float,
    repetitions: int = 5,
) -> tuple[list[RankTime], list[RankTime], Emulation]:
    """Every rank's forward and backward time on this GPU, and what the ranks computed.

    Args:
        schedule: pruned for the geometry's mask.
        inputs: global q, k, v and dout (b s heads d), on a CUDA device.
        bytes_per_s: what each rank's port takes in.
        repetitions: of which the median counts, after two that do not.

    Raises:
        ValueError: the inputs are not on a CUDA device.
    """
    if inputs[0].device.type != "cuda":
        raise ValueError(f"ranks are timed alone on a CUDA device, got tensors on {inputs[0].device}; use emulate")
    wire = _Wire(inputs[0].device, bytes_per_s)
    played: list[Played] = []
    result = emulate(schedule, geometry, *inputs[:3], settings, inputs[3], played)
    forward, backward = (
        [
            _timed(program, own, settings, saved, out, arrivals, wire, repetitions)
            for program, own, saved, out, arrivals in zip(
                p.programs, p.inputs, p.saved, p.outs, p.arrivals, strict=True
            )
        ]
        for p in played
    )
    return forward, backward, result


def _timed(
    program: Program,
    inputs: list[Record],
    settings: Settings,
    saved: Tensor | None,
    out: Tensor | None,
    arrivals: list[Tensor],
    wire: _Wire,
    repetitions: int,
) -> RankTime:
    seconds, host = [], []
    for _ in range(repetitions + _WARM_UP):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START)
        marks[0].record()
        start_s = time.perf_counter()
        _run(program, inputs, settings, saved, out, arrivals, wire)
        host.append(time.perf_counter() - start_s)
        marks[1].record()
        torch.cuda.synchronize()
        seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
    batches = [[arrivals[index] for index in batch] for batch in _batches(program)]
    time_s, host_s = (statistics.median(values[_WARM_UP:]) for values in (seconds, host))
    return RankTime(time_s, host_s, *wire.alone_s(batches))
