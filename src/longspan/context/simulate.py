"""Simulate: the time of a schedule on a topology, event by event in virtual time. The third interpreter.

Every rank goes through its steps as ``schedule`` says. It posts the moves of a step (packing them first), computes the
step's blocks one after another, and waits for what lands in the step. Sends run in the background. A message starts
when both ends have posted it, and when the earlier messages from its sender to its receiver on its lane are through;
its latency passes first. Messages under way share the wires max-min fairly (a fluid, as if cut into small packets): the
scarcest wire is split evenly between those that cross it, and what they cannot use elsewhere goes to others.

What a block costs comes from ``costs``. Left out: kernels that slow down while the network takes memory bandwidth and
cores, host time that a queue of launches would not hide, and computation outside the attention.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from longspan.context.costs import Costs, phase_costs
from longspan.context.geometry import Geometry
from longspan.context.lower import lower_all
from longspan.context.schedule import Move, Phase, Schedule, Sizes
from longspan.hardware.profile import DeviceProfile
from longspan.hardware.topology import Topology

_NOTHING_S = 1e-15  # events closer than this are one


class Event(NamedTuple):
    """Something that took time. ``peer`` is the receiver of a send, else -1."""

    rank: int
    kind: Literal["pack", "compute", "wait", "merge", "send"]
    step: int
    start_s: float
    stop_s: float
    label: str = ""
    num_bytes: int = 0
    peer: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """How one phase of a schedule ran.

    Attributes:
        time_s: until the last rank is done.
        compute_s: per rank, kernels, merges and copies.
        exposed_s: per rank, waiting for messages with nothing to compute.
        link_bytes: bytes over every wire of the topology.
        peak_bytes: per rank, the most that inputs, sums and arrivals take at once; empty where it was not asked for.
        events: what happened, in no order.
    """

    name: str
    topology: str
    time_s: float
    compute_s: tuple[float, ...]
    exposed_s: tuple[float, ...]
    link_bytes: dict[str, int]
    peak_bytes: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def max_exposed_s(self) -> float:
        return max(self.exposed_s)

    @property
    def mean_exposed_s(self) -> float:
        return sum(self.exposed_s) / len(self.exposed_s)

    @property
    def peak_memory_bytes(self) -> int:
        """Of the rank that needs most. Raises ValueError where memory was not asked for."""
        if not self.peak_bytes:
            raise ValueError("this simulation did not count memory; simulate with memory=True")
        return max(self.peak_bytes)


def simulate(
    schedule: Schedule,
    geometry: Geometry,
    topology: Topology,
    device: DeviceProfile,
    sizes: Sizes,
    *,
    backward: bool = False,
    memory: bool = False,
) -> Simulation:
    """Run one phase of a pruned schedule in virtual time.

    Args:
        schedule, geometry: a schedule pruned for the geometry's mask.
        topology: with one rank per rank of the schedule.
        device: the same for all ranks.
        sizes: batch, head dim and bytes per element; ``inputs`` says the dtype.
        backward: the backward phase in place of the forward one.
        memory: whether to lower the phase to count peak memory, which takes longer than the rest.

    Raises:
        ValueError: the topology has another number of ranks, or the profile does not know the dtype.
    """
    world = schedule.layout.world
    if topology.num_ranks != world:
        raise ValueError(
            f"topology {topology.name!r} has {topology.num_ranks} ranks, the schedule {world}; make one for {world}"
        )
    phase = schedule.backward if backward else schedule.forward
    costs = phase_costs(phase, schedule, geometry, device, sizes, backward=backward)
    run = _Run(phase, world, topology, costs)
    time_s = run.run()
    programs = lower_all(phase, schedule, geometry, backward=backward) if memory else []
    link_bytes = dict.fromkeys((wire.name for wire in topology.resources), 0)
    for index, move in enumerate(phase.moves):
        for wire in topology.route(move.src, move.dst):
            link_bytes[topology.resources[wire].name] += int(costs.num_bytes[index])
    return Simulation(
        name=schedule.name,
        topology=topology.name,
        time_s=time_s,
        compute_s=tuple(run.compute_s),
        exposed_s=tuple(run.exposed_s),
        link_bytes=link_bytes,
        peak_bytes=tuple(program.peak_bytes(sizes) for program in programs),
        events=tuple(run.events),
    )


def fair_rates(routes: np.ndarray, caps: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Max-min fair rates (f,) of messages by progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2).

    Args:
        routes: (f, r) wires of each message; the last wire of ``capacity``, without limit, fills the rows up.
        caps: (f,) what each message alone can reach.
        capacity: (w,) bytes/s of the wires.
    """
    rates, left = np.zeros(len(routes)), capacity.astype(np.float64)
    live = np.arange(len(routes))
    while len(live):
        load = np.bincount(routes[live].ravel(), minlength=len(capacity))
        share = np.where(load > 0, left / np.maximum(load, 1), math.inf)
        reach = np.minimum(share[routes[live]].min(axis=1), caps[live])
        fixed = reach <= reach.min() * (1 + 1e-9)
        now = live[fixed]
        rates[now] = reach[fixed]
        used = np.bincount(routes[now].ravel(), np.repeat(rates[now], routes.shape[1]), len(capacity))
        left = np.maximum(left - np.where(np.isinf(left), 0, used), 0)
        live = live[~fixed]
    return rates


class _Network:
    """Messages under way."""

    def __init__(self, topology: Topology, moves: tuple[Move, ...]) -> None:
        self.paths = [topology.path(move.src, move.dst) for move in moves]
        wires = topology.resources
        self.capacity = np.array([wire.bytes_per_s for wire in wires] + [math.inf])
        width = max((len(path.resources) for path in self.paths), default=1)
        self.routes = np.full((len(moves), width), len(wires))
        for index, path in enumerate(self.paths):
            self.routes[index, : len(path.resources)] = path.resources
        self.caps = np.array([path.flow_bytes_per_s for path in self.paths])
        self.live = np.zeros(0, np.int64)
        self.left = np.zeros(0)
        self.rates = np.zeros(0)

    def start(self, indices: list[int], num_bytes: np.ndarray) -> None:
        self.live = np.append(self.live, indices).astype(np.int64)
        self.left = np.append(self.left, num_bytes[indices])
        self._share()

    def next_s(self) -> float:
        """Seconds until the next message is through."""
        return float((self.left / self.rates).min()) if len(self.live) else math.inf

    def advance(self, seconds: float) -> list[int]:
        """Let time pass; returns the messages that are through."""
        if not len(self.live):
            return []
        self.left = self.left - self.rates * seconds
        through = self.left <= self.rates * _NOTHING_S + 1e-6  # a millionth of a byte
        done = self.live[through].tolist()
        if done:
            self.live, self.left = self.live[~through], self.left[~through]
            self._share()
        return done

    def _share(self) -> None:
        self.rates = fair_rates(self.routes[self.live], self.caps[self.live], self.capacity)


class _Run:
    """One phase in virtual time."""

    def __init__(self, phase: Phase, world: int, topology: Topology, costs: Costs) -> None:
        self.phase, self.world, self.topology, self.costs = phase, world, topology, costs
        self.network = _Network(topology, phase.moves)
        self.num_steps = phase.num_steps
        self.sends, self.receives, self.landings, self.blocks = (defaultdict(list) for _ in range(4))
        for index, move in enumerate(phase.moves):
            self.sends[move.src, move.step].append(index)
            self.receives[move.dst, move.step].append(index)
            self.landings[move.dst, move.lands].append(index)
        for index, block in enumerate(phase.blocks):
            self.blocks[block.rank, block.step].append(index)
        self.missing = {key: len(indices) for key, indices in self.landings.items()}
        self.step = [-1] * world
        self.waiting_since: list[float | None] = [None] * world
        self.done_s = [0.0] * world
        self.compute_s, self.exposed_s = [0.0] * world, [0.0] * world
        self.events: list[Event] = []
        self.agenda: list[tuple[float, int, str, int]] = []
        self.half: dict[int, float] = {}  # messages that one end has posted, and when it let them go
        self.pairs: dict[tuple[int, int, int], deque[tuple[int, float]]] = defaultdict(deque)
        self.begun: dict[int, float] = {}
        self.counter = 0

    def _later(self, time_s: float, what: str, which: int) -> None:
        self.counter += 1
        heapq.heappush(self.agenda, (time_s, self.counter, what, which))

    def _spend(self, rank: int, kind: Literal["pack", "compute", "merge"], start: float, seconds: float) -> float:
        if seconds > 0:
            self.compute_s[rank] += seconds
            self.events.append(Event(rank, kind, self.step[rank], start, start + seconds))
        return start + seconds

    def run(self) -> float:
        now = 0.0
        for rank in range(self.world):
            self._enter(rank, 0.0)
        while self.agenda or len(self.network.live):
            first = self.agenda[0][0] if self.agenda else math.inf
            then = min(first, now + self.network.next_s())
            through = self.network.advance(then - now)
            now = then
            for index in through:
                self._through(index, now)
            starting: list[int] = []
            while self.agenda and self.agenda[0][0] <= now + _NOTHING_S:
                _, _, what, which = heapq.heappop(self.agenda)
                if what == "start":
                    starting.append(which)
                elif what == "computed":
                    self._computed(which, now)
                else:
                    self._enter(which, now)
            if starting:
                self.network.start(starting, self.costs.num_bytes)
        assert all(step == self.num_steps for step in self.step), "a rank waits for a message that nobody sends"
        return max(self.done_s)

    def _enter(self, rank: int, now: float) -> None:
        """Go to the rank's next step that has something to do, post its moves and compute its blocks."""
        step = self.step[rank] + 1
        tables = (self.sends, self.receives, self.landings, self.blocks)
        while step < self.num_steps and not any((rank, step) in table for table in tables):
            step += 1
        self.step[rank] = step
        if step == self.num_steps:
            self.done_s[rank] = self._spend(rank, "merge", now, float(self.costs.final_s[rank]))
            return
        sends, receives = self.sends.get((rank, step), []), self.receives.get((rank, step), [])
        for index in receives:
            self._post(index, now)
        packed = self._spend(rank, "pack", now, float(self.costs.pack_s[sends].sum()))
        for number, index in enumerate(sends, 1):
            self._post(index, packed + number * self.topology.message_s)
        start = packed + (len(sends) * self.topology.message_s if self.topology.blocking else 0)
        start += float(self.costs.num_bytes[[*sends, *receives]].sum()) * self.topology.byte_s
        if start > packed:
            self._spend(rank, "pack", packed, start - packed)
        for index in self.blocks.get((rank, step), []):
            start = self._spend(rank, "compute", start, float(self.costs.block_s[index]))
        self._later(start, "computed", rank)

    def _post(self, index: int, time_s: float) -> None:
        """One end has posted a message; the second end to do so lets it go, in the order of its pair and lane."""
        if index not in self.half:
            self.half[index] = time_s
            return
        move = self.phase.moves[index]
        pair = self.pairs[move.src, move.dst, move.lane]
        pair.append((index, max(time_s, self.half.pop(index))))
        if len(pair) == 1:
            self._go(pair, 0.0)

    def _go(self, pair: deque[tuple[int, float]], now: float) -> None:
        index, ready = pair[0]
        start = max(ready, now)
        self.begun[index] = start
        self._later(start + self.network.paths[index].latency_s, "start", index)

    def _through(self, index: int, now: float) -> None:
        move = self.phase.moves[index]
        num_bytes = int(self.costs.num_bytes[index])
        began = self.begun.pop(index)
        self.events.append(Event(move.src, "send", move.step, began, now, move.piece.kind, num_bytes, move.dst))
        pair = self.pairs[move.src, move.dst, move.lane]
        pair.popleft()
        if pair:
            self._go(pair, now)
        self.missing[move.dst, move.lands] -= 1
        since = self.waiting_since[move.dst]
        if since is not None and self.step[move.dst] == move.lands and not self.missing[move.dst, move.lands]:
            self.waiting_since[move.dst] = None
            if now > since:
                self.exposed_s[move.dst] += now - since
                self.events.append(Event(move.dst, "wait", move.lands, since, now))
            self._land(move.dst, now)

    def _computed(self, rank: int, now: float) -> None:
        if self.missing.get((rank, self.step[rank]), 0):
            self.waiting_since[rank] = now
        else:
            self._land(rank, now)

    def _land(self, rank: int, now: float) -> None:
        landing = self.landings.get((rank, self.step[rank]), [])
        self._later(self._spend(rank, "merge", now, float(self.costs.land_s[landing].sum())), "landed", rank)
