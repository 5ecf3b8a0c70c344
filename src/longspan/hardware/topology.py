"""Topologies: which wires a message between two ranks crosses, and what each wire can carry.

A topology is a list of named directed *resources* with capacities and a pure function from (src, dst) to the resources
that such a message crosses; a simulator needs to know nothing else. Inside a node the ranks share one of four shapes:

* ``port``: one duplex port per rank into a switch that never blocks (NVSwitch, one network card per host);
* ``mesh``: a duplex link of its own for every pair of ranks;
* ``tree``: PCIe, a duplex lane per rank into a switch, and one duplex uplink per switch that its ranks share;
* ``shared``: one memory that all messages pass through (loopback).

Messages between nodes cross the network cards, one per rank or one per node, and in a tree the ranks' lanes. Numbers of
the presets are nominal rates times the share that common benchmarks reach; measure your own where it matters.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

Shape = Literal["port", "mesh", "tree", "shared"]
Cards = Literal["rank", "node"]


class Resource(NamedTuple):
    """A directed wire, or a group of wires that act as one."""

    name: str
    bytes_per_s: float


class Path(NamedTuple):
    """What a message from one rank to another meets."""

    resources: tuple[int, ...]
    flow_bytes_per_s: float  # what one message alone can reach
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Ranks and the wires between them.

    Args:
        name: for people.
        num_ranks: ranks, numbered node by node.
        shape: how the ranks of a node are joined, see the module.
        link_bytes_per_s: of a port, link or lane, in each direction; for ``shared`` of the memory in all.
        flow_bytes_per_s: what one message alone can reach inside a node; 0 for no limit but the wires'.
        latency_s: from the start of a message to its first byte, inside a node.
        message_s: what posting one message costs; messages that a rank posts together start one after another.
        byte_s: what a byte costs the sender's and the receiver's processor each, where these move it (TCP); counted in
            the step in which the message is posted.
        blocking: whether the posting rank is held up meanwhile (gloo) or not (NCCL on a stream of its own).
        switch_size: ranks below one PCIe switch (``tree`` only).
        uplink_bytes_per_s: of a switch's uplink in each direction (``tree`` only); 0 stands for ``link_bytes_per_s``.
        node_size: ranks of a node; 0 for one node.
        cards: network cards: one per "rank" or one per "node".
        card_bytes_per_s: of a network card in each direction.
        card_flow_bytes_per_s: what one message alone can reach between nodes; 0 for no limit but the wires'.
        card_latency_s: latency between nodes.

    Raises:
        ValueError: a number is out of range, or several nodes have no network cards.
    """

    name: str
    num_ranks: int
    shape: Shape
    link_bytes_per_s: float
    flow_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    message_s: float = 0.0
    byte_s: float = 0.0
    blocking: bool = False
    switch_size: int = 0
    uplink_bytes_per_s: float = 0.0
    node_size: int = 0
    cards: Cards = "rank"
    card_bytes_per_s: float = 0.0
    card_flow_bytes_per_s: float = 0.0
    card_latency_s: float = 0.0

    def __post_init__(self) -> None:
        for field, kind in (("shape", Shape), ("cards", Cards)):
            if getattr(self, field) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"a topology's {field} must be one of {known}, got {getattr(self, field)!r}")
        if self.num_ranks < 1:
            raise ValueError(f"a topology must have at least one rank, got {self.num_ranks}; leave none out")
        if not 0 < self.link_bytes_per_s < math.inf:
            raise ValueError(f"link_bytes_per_s must be positive and finite, got {self.link_bytes_per_s}; give a rate")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(
                    f"a topology's {field.name} must be at least 0 and finite, got {value}; use 0 for none"
                )
        if self.shape == "tree" and self.switch_size < 1:
            raise ValueError(f"a tree needs the ranks below one switch, got switch_size {self.switch_size}; say 2")
        if self.num_nodes > 1 and self.card_bytes_per_s <= 0:
            raise ValueError(
                f"{self.num_nodes} nodes need network cards, got card_bytes_per_s {self.card_bytes_per_s}; give a rate"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.node_size or self.num_ranks

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    @property
    def resources(self) -> tuple[Resource, ...]:
        """All wires; a route names them by their index here."""
        return _wires(self)[0]

    def route(self, src: int, dst: int) -> tuple[int, ...]:
        """The resources that a message crosses. Raises ValueError for equal or unknown ranks."""
        return self.path(src, dst).resources

    def path(self, src: int, dst: int) -> Path:
        """Route, rate limit of one message, and latency. Raises ValueError for equal or unknown ranks."""
        return _path(self, src, dst)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Topology:
        """Inverse of ``to_json``. Raises ValueError on text that is not such JSON."""
        return from_json(Topology, text, "a topology")


def from_json(kind: type, text: str, what: str) -> Any:
    """A flat dataclass from a JSON object of its fields. Raises ValueError on anything else, with the known keys."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON, got an error at character {error.pos}: {error.msg}") from None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if not isinstance(values, dict) or not required <= set(values) <= set(fields):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{what} must be a JSON object with keys {', '.join(fields)}, got {got}; write it with to_json"
        )
    for name, value in values.items():
        expected = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(str(fields[name].type))
        if expected and (not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)):
            raise ValueError(f"{name} of {what} must be {fields[name].type}, got {value!r}; write it with to_json")
    return kind(**values)


@lru_cache(maxsize=64)
def _wires(topology: Topology) -> tuple[tuple[Resource, ...], dict[str, int]]:
    """All resources, and their index by name."""
    t = topology
    found: list[Resource] = []

    def duplex(name: str, bytes_per_s: float) -> None:
        found.extend((Resource(f"{name} out", bytes_per_s), Resource(f"{name} in", bytes_per_s)))

    nodes = [
        range(first, min(first + t.ranks_per_node, t.num_ranks)) for first in range(0, t.num_ranks, t.ranks_per_node)
    ]
    for node, ranks in enumerate(nodes):
        if t.shape == "mesh":
            found.extend(Resource(f"{a}->{b}", t.link_bytes_per_s) for a in ranks for b in ranks if a != b)
        elif t.shape == "shared":
            found.append(Resource(f"node {node} memory", t.link_bytes_per_s))
        else:
            for rank in ranks:
                duplex(f"rank {rank}", t.link_bytes_per_s)
        if t.shape == "tree":
            for switch in dict.fromkeys(_switch(t, rank) for rank in ranks):
                duplex(switch, t.uplink_bytes_per_s or t.link_bytes_per_s)
        if t.num_nodes > 1:
            for card in dict.fromkeys(_card(t, rank) for rank in ranks):
                duplex(card, t.card_bytes_per_s)
    return tuple(found), {resource.name: index for index, resource in enumerate(found)}


def _switch(t: Topology, rank: int) -> str:
    node, place = divmod(rank, t.ranks_per_node)
    return f"node {node} switch {place // t.switch_size}"


def _card(t: Topology, rank: int) -> str:
    return f"card {rank}" if t.cards == "rank" else f"node {rank // t.ranks_per_node} card"


@lru_cache(maxsize=1 << 16)
def _path(t: Topology, src: int, dst: int) -> Path:
    if src == dst or not (0 <= src < t.num_ranks and 0 <= dst < t.num_ranks):
        raise ValueError(f"a message needs two ranks of 0..{t.num_ranks - 1}, got {src} -> {dst}; check the schedule")
    index = _wires(t)[1]
    near = src // t.ranks_per_node == dst // t.ranks_per_node
    if near and t.shape == "mesh":
        names = [f"{src}->{dst}"]
    elif near and t.shape == "shared":
        names = [f"node {src // t.ranks_per_node} memory"]
    elif near:
        names = [f"rank {src} out", f"rank {dst} in"]
        if t.shape == "tree" and _switch(t, src) != _switch(t, dst):
            names[1:1] = [f"{_switch(t, src)} out", f"{_switch(t, dst)} in"]
    else:
        names = [f"{_card(t, src)} out", f"{_card(t, dst)} in"]
        if t.shape == "tree":  # cards hang below the same PCIe lanes; NVLink and meshes are bypassed
            names = [f"rank {src} out", *names, f"rank {dst} in"]
    cap = t.flow_bytes_per_s if near else t.card_flow_bytes_per_s
    return Path(tuple(index[name] for name in names), cap or math.inf, t.latency_s if near else t.card_latency_s)


_TCP_BYTE_S = 1e-9  # of a core, at either end of a virtual cable
_GLOO_MESSAGE_S = 2e-4  # of a core, to send one message and receive another, of 16 KB to 256 KB (measured on loopback)


def lab(kind: Literal["port", "mesh"], num_ranks: int, rate_bit_per_s: float, cores: float = 1.0) -> Topology:
    """Network namespaces on one machine, each port or pair link with a token bucket (``longspan bench``'s lab).

    ``cores`` is what each rank has for moving its bytes and for what a message costs beside them.
    """
    return Topology(
        name=f"lab {kind} {rate_bit_per_s / 1e6:g} Mbit/s",
        num_ranks=num_ranks,
        shape=kind,
        link_bytes_per_s=rate_bit_per_s / 8,
        latency_s=1e-4,
        message_s=_GLOO_MESSAGE_S / cores,
        byte_s=_TCP_BYTE_S / cores,
        blocking=True,
    )


def a10_pcie(num_ranks: int = 4) -> Topology:
    """A10 cards in pairs below PCIe 4.0 switches.

    A lane and an uplink reach 22 of nominally 31.5 GB/s each way, as peer-to-peer tests on PCIe 4.0 x16 commonly show.
    One message alone reaches 13 GB/s: the 98 MB of a ring's step in 7.6 ms (TokenRing, arXiv:2412.20501, 4 x A10).
    """
    return Topology(
        name="a10_pcie",
        num_ranks=num_ranks,
        shape="tree",
        link_bytes_per_s=22e9,
        flow_bytes_per_s=13e9,
        switch_size=2,
        latency_s=1e-5,
        message_s=5e-6,
    )


def a10_mesh(num_ranks: int = 4) -> Topology:
    """What TokenRing supposes: A10 cards with a link for every pair, each as fast as one PCIe message."""
    return Topology(
        name="a10_mesh", num_ranks=num_ranks, shape="mesh", link_bytes_per_s=13e9, latency_s=1e-5, message_s=5e-6
    )


def _nvlink(name: str, num_ranks: int, port_bytes_per_s: float, card_bytes_per_s: float) -> Topology:
    return Topology(
        name=name,
        num_ranks=num_ranks,
        shape="port",
        link_bytes_per_s=port_bytes_per_s,
        latency_s=8e-6,
        message_s=2e-6,
        node_size=8,
        card_bytes_per_s=card_bytes_per_s,
        card_latency_s=2e-5,
    )


def gloo(num_ranks: int) -> Topology:
    """gloo ranks of one machine over loopback: every byte is copied by the processors, in the posting rank's time."""
    return Topology(
        name="gloo",
        num_ranks=num_ranks,
        shape="shared",
        link_bytes_per_s=3e9,
        flow_bytes_per_s=1.5e9,
        latency_s=5e-5,
        message_s=1e-4,
        blocking=True,
    )


# Rates each way: NVLink and InfiniBand at 80 and 90 % of nominal, as nccl-tests usually reach.
TOPOLOGIES: dict[str, Callable[[int], Topology]] = {
    "a10_pcie": a10_pcie,
    "a10_mesh": a10_mesh,
    "a100": lambda num_ranks: _nvlink("a100", num_ranks, 0.8 * 300e9, 0.9 * 25e9),
    "h100": lambda num_ranks: _nvlink("h100", num_ranks, 0.8 * 450e9, 0.9 * 50e9),
    "h200": lambda num_ranks: _nvlink("h200", num_ranks, 0.8 * 450e9, 0.9 * 50e9),
    "h800": lambda num_ranks: _nvlink("h800", num_ranks, 0.8 * 200e9, 0.9 * 50e9),
    "gloo": gloo,
}


def make_topology(name: str, num_ranks: int) -> Topology:
    """The preset of that name. Raises ValueError for an unknown one."""
    if name not in TOPOLOGIES:
        raise ValueError(f"unknown topology {name!r}; known: {', '.join(TOPOLOGIES)}; or make a Topology of your own")
    return TOPOLOGIES[name](num_ranks)
