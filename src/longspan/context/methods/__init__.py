"""The context-parallel methods: one visible table from name to function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longspan.context.methods.ring import ring, zigzag_ring
from longspan.context.schedule import Schedule
from longspan.layout.tokens import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published method: its schedule and the layout it was published with."""

    title: str
    paper: str
    layout: str
    build: Callable[[Layout, int, int], Schedule]


METHODS: dict[str, Method] = {
    "ring": Method(
        title="Ring Attention",
        paper="Liu, Zaharia, Abbeel 2023, arXiv:2310.01889",
        layout="contiguous",
        build=ring,
    ),
    "zigzag": Method(
        title="Zigzag ring (balanced for causal masks)",
        paper="zhuzilin/ring-flash-attention; Ring Attention, arXiv:2310.01889",
        layout="zigzag",
        build=zigzag_ring,
    ),
}


def method(name: str) -> Method:
    """The method of that name. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown context-parallel method {name!r}; known: auto, {', '.join(METHODS)}")
    return METHODS[name]
