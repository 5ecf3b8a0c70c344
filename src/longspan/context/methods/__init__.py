"""The context-parallel methods: one visible table from name to function.

A method that has a degree (the size of USP's head groups, of the double ring's windows) takes it after a colon, as in
``"usp:4"``, and one that works in stages their number; without one it takes its default. ``"ulysses+burst"`` is the
forward phase of one method with the backward phase of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from longspan.attention.masks import Mask
from longspan.context.local import Carry, Direct, Exchange, Ring
from longspan.context.methods.all_gather import all_gather, mask_aware
from longspan.context.methods.burst import burst
from longspan.context.methods.double_ring import double_ring
from longspan.context.methods.light_seq import light_seq, looks_ahead
from longspan.context.methods.ring import descending_ring, opposing_rings, ring, striped_ring, zigzag_ring
from longspan.context.methods.token_ring import token_ring
from longspan.context.methods.ulysses import staged_ulysses, ulysses, usp
from longspan.context.passes import combined
from longspan.context.schedule import Schedule
from longspan.layout.tokens import Layout

Build = Callable[[Layout, int, int], Schedule]


def _no_reason(mask: Mask, layout: Layout) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method: its schedule and the layout it was published with.

    ``build`` takes (layout, query heads, KV heads), and a degree where ``has_degree`` or a number of stages where
    ``stages``, the default, is not 0. ``reason_against`` says why a mask on a layout cannot be computed, or None.
    ``carry`` says how keys travel, where that is simple enough that one rank's part is made without the whole
    (``context.local``); its degree or number of stages is the method's.
    """

    title: str
    paper: str
    layout: str
    build: Callable[..., Schedule]
    has_degree: bool = False
    stages: int = 0
    carry: Carry | None = None
    reason_against: Callable[[Mask, Layout], str | None] = _no_reason


_RING = "Liu, Zaharia, Abbeel 2023, arXiv:2310.01889"
_UNIFIED = "Li et al. 2023, arXiv:2302.06218 (abstract only; this is USP)"
METHODS: dict[str, Method] = {
    "ring": Method(title="Ring Attention", paper=_RING, layout="contiguous", build=ring, carry=Ring(1)),
    "zigzag": Method(
        title="Zigzag ring (balanced for causal masks)",
        paper="zhuzilin/ring-flash-attention; Ring Attention, arXiv:2310.01889",
        layout="zigzag",
        build=zigzag_ring,
        carry=Ring(1),
    ),
    "striped": Method(
        title="Striped Attention", paper="Brandon et al. 2023, arXiv:2311.09431", layout="striped", build=striped_ring,
        carry=Ring(1),
    ),
    "descending": Method(
        title="Ring towards lower ranks, which drops keys nobody needs", paper="ours", layout="zigzag",
        build=descending_ring, carry=Ring(-1),
    ),
    "opposing": Method(
        title="KV heads split over two opposing rings", paper="ours", layout="zigzag", build=opposing_rings
    ),
    "double_ring": Method(
        title="Double ring (windows of ranks)",
        paper="Gu et al. 2024 (LoongTrain), arXiv:2406.18485",
        layout="zigzag",
        build=double_ring,
        has_degree=True,
    ),
    "all_gather": Method(
        title="All-gather of keys and values",
        paper="Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783",
        layout="zigzag",
        build=all_gather,
        carry=Direct(0),
    ),
    "mask_aware": Method(
        title="Keys only to ranks whose mask needs them, on a balanced layout",
        paper="ours, after SandAI/MagiAttention",
        layout="balanced",
        build=mask_aware,
        stages=4,
        carry=Direct(4),
    ),
    "ulysses": Method(
        title="DeepSpeed-Ulysses (heads exchanged for tokens)",
        paper="Jacobs et al. 2023, arXiv:2309.14509",
        layout="contiguous",
        build=ulysses,
        carry=Exchange(0),
    ),
    "staged_ulysses": Method(
        title="Ulysses in stages of heads, each under way during the one before",
        paper="ours",
        layout="contiguous",
        build=staged_ulysses,
        stages=2,
    ),
    "usp": Method(
        title="USP (Ulysses inside groups, a ring between them)",
        paper="Fang, Zhao 2024, arXiv:2405.07719",
        layout="zigzag",
        build=usp,
        has_degree=True,
        carry=Exchange(0),
    ),
    "distributed_mha": Method(
        title="Distributed multi-head attention (heads and sequence split)", paper=_UNIFIED, layout="zigzag",
        build=usp, has_degree=True, carry=Exchange(0),
    ),
    "token_ring": Method(
        title="TokenRing (queries hop, outputs go home)",
        paper="Wang et al. 2024, arXiv:2412.20501",
        layout="zigzag",
        build=token_ring,
    ),
    "light_seq": Method(
        title="LightSeq / DistFlashAttn (balanced causal schedule)",
        paper="Li et al. 2023, arXiv:2310.03294",
        layout="contiguous",
        build=light_seq,
        reason_against=looks_ahead,
    ),
    "burst": Method(
        title="BurstAttention (queries hop in the backward)",
        paper="Sun et al. 2024, arXiv:2403.09347",
        layout="zigzag",
        build=burst,
    ),
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name, with or without a degree. Raises ValueError for an unknown one."""
    base = name.partition(":")[0]
    if base not in METHODS:
        raise ValueError(f"unknown context-parallel method {name!r}; known: auto, {', '.join(METHODS)}")
    return METHODS[base]


def check_name(name: str) -> None:
    """Raises ValueError for what is no method on any number of ranks, as ``builder`` does for one number of them."""
    for part in name.split("+"):
        degree = part.partition(":")[2]
        builder(part, int(degree) if degree.isdecimal() and int(degree) else 1)


def layout_name(name: str) -> str:
    """The layout of a method; of two, that of the forward phase's. Raises ValueError for an unknown method."""
    return method(name.partition("+")[0]).layout


def reason_against(name: str, mask: Mask, layout: Layout) -> str | None:
    """Why a method cannot compute a mask on a layout, or None. Raises ValueError for an unknown method."""
    reasons = (method(part).reason_against(mask, layout) for part in name.split("+"))
    return next((reason for reason in reasons if reason is not None), None)


def carries(name: str, world: int) -> tuple[Carry, ...]:
    """How the keys of a method travel, or those of both phases of ``forward+backward``; empty where one does not say.

    Empty also for a pair with exchanged heads, of which nothing is kept for the backward phase, unlike alone.
    Raises ValueError for an unknown method, and for a degree or number of stages that cannot be.
    """
    parts = name.split("+")
    found: list[Carry] = []
    for part in parts:
        carry = method(part).carry
        if carry is None or (isinstance(carry, Exchange) and len(parts) > 1):
            return ()
        if isinstance(carry, Exchange):
            carry = Exchange(number_of(part, world) or world)
        elif isinstance(carry, Direct) and method(part).stages:
            carry = Direct(number_of(part, world))
        found.append(carry)
    return tuple(found)


def number_of(name: str, world: int) -> int:
    """The degree or the number of stages of a method by its name, or its default; 0 for a method that has neither.

    Raises ValueError for an unknown method, and for a degree or number of stages that cannot be or has no place.
    """
    found = method(name)
    _, colon, text = name.partition(":")
    if not found.has_degree and not found.stages:
        if colon:
            takers = ", ".join(other for other, m in METHODS.items() if m.has_degree or m.stages)
            raise ValueError(f"method {name!r} takes no degree; those that do: {takers}")
        return 0
    number = int(text) if text.isdecimal() else 0 if colon else found.stages or default_degree(world)
    if found.stages and number < 1:
        raise ValueError(f"the stages of {name!r} are a number of at least 1, got {text!r}; name one, or none")
    if found.has_degree and (number < 1 or world % number):
        raise ValueError(f"the degree of {name!r} must divide the {world} ranks, got {text!r}; name a divisor")
    return number


def builder(name: str, world: int) -> Build:
    """The schedule function of a method, with its degree filled in. Raises ValueError as ``number_of``."""
    first, plus, second = name.partition("+")
    if plus:
        forward, backward = builder(first, world), builder(second, world)
        return lambda layout, num_heads, num_kv_heads: combined(
            forward(layout, num_heads, num_kv_heads), backward(layout, num_heads, num_kv_heads)
        )
    found, number = method(name), number_of(name, world)
    if not number:
        return found.build
    return lambda layout, num_heads, num_kv_heads: found.build(layout, num_heads, num_kv_heads, number)


def default_degree(world: int) -> int:
    """The largest divisor of the ranks up to their square root: as many groups as ranks in a group, or more."""
    return max(d for d in range(1, math.isqrt(world) + 1) if world % d == 0)
