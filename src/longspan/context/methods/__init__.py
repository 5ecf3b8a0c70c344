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
from longspan.context.carry import Burst, Carry, Direct, Exchange, LightSeq, Opposing, Ring, TokenRing, Windows
from longspan.context.methods.all_gather import all_gather, kept_keys, mask_aware
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
    ``carry`` says how its data travel, by which one rank's part is made without the whole (``context.local``), of the
    number of ranks and the degree or number of stages. ``paired``: whether its phases go with another method's.
    """

    title: str
    paper: str
    layout: str
    build: Callable[..., Schedule]
    has_degree: bool = False
    stages: int = 0
    carry: Callable[[int, int], Carry]
    reason_against: Callable[[Mask, Layout], str | None] = _no_reason
    paired: bool = True


def _always(carry: Carry) -> Callable[[int, int], Carry]:
    return lambda world, number: carry


_RING = "Liu, Zaharia, Abbeel 2023, arXiv:2310.01889"
_UNIFIED = "Li et al. 2023, arXiv:2302.06218 (abstract only; this is USP)"
METHODS: dict[str, Method] = {
    "ring": Method(title="Ring Attention", paper=_RING, layout="contiguous", build=ring, carry=_always(Ring(1))),
    "zigzag": Method(
        title="Zigzag ring (balanced for causal masks)",
        paper="zhuzilin/ring-flash-attention; Ring Attention, arXiv:2310.01889",
        layout="zigzag",
        build=zigzag_ring,
        carry=_always(Ring(1)),
    ),
    "striped": Method(
        title="Striped Attention", paper="Brandon et al. 2023, arXiv:2311.09431", layout="striped", build=striped_ring,
        carry=_always(Ring(1)),
    ),
    "descending": Method(
        title="Ring towards lower ranks, which drops keys nobody needs", paper="ours", layout="zigzag",
        build=descending_ring, carry=_always(Ring(-1)),
    ),
    "opposing": Method(
        title="KV heads split over two opposing rings", paper="ours", layout="zigzag", build=opposing_rings,
        carry=_always(Opposing()),
    ),
    "double_ring": Method(
        title="Double ring (windows of ranks)",
        paper="Gu et al. 2024 (LoongTrain), arXiv:2406.18485",
        layout="zigzag",
        build=double_ring,
        has_degree=True,
        carry=lambda world, inner: Windows(inner),
    ),
    "all_gather": Method(
        title="All-gather of keys and values",
        paper="Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783",
        layout="zigzag",
        build=all_gather,
        carry=_always(Direct(0)),
    ),
    "mask_aware": Method(
        title="Keys only to ranks whose mask needs them, on a balanced layout",
        paper="ours, after SandAI/MagiAttention",
        layout="balanced",
        build=mask_aware,
        stages=4,
        carry=lambda world, stages: Direct(stages),
    ),
    "kept_keys": Method(
        title="Keys sent once and kept for the backward phase, which begins with them",
        paper="ours",
        layout="zigzag",
        build=kept_keys,
        stages=3,
        carry=lambda world, stages: Direct(stages, keep=True),
        paired=False,
    ),
    "ulysses": Method(
        title="DeepSpeed-Ulysses (heads exchanged for tokens)",
        paper="Jacobs et al. 2023, arXiv:2309.14509",
        layout="contiguous",
        build=ulysses,
        carry=lambda world, _: Exchange(world),
    ),
    "staged_ulysses": Method(
        title="Ulysses in stages of heads, each under way during the one before",
        paper="ours",
        layout="contiguous",
        build=staged_ulysses,
        stages=2,
        carry=lambda world, stages: Exchange(world, stages),
    ),
    "usp": Method(
        title="USP (Ulysses inside groups, a ring between them)",
        paper="Fang, Zhao 2024, arXiv:2405.07719",
        layout="zigzag",
        build=usp,
        has_degree=True,
        carry=lambda world, degree: Exchange(degree),
    ),
    "distributed_mha": Method(
        title="Distributed multi-head attention (heads and sequence split)", paper=_UNIFIED, layout="zigzag",
        build=usp, has_degree=True, carry=lambda world, degree: Exchange(degree),
    ),
    "token_ring": Method(
        title="TokenRing (queries hop, outputs go home)",
        paper="Wang et al. 2024, arXiv:2412.20501",
        layout="zigzag",
        build=token_ring,
        carry=_always(TokenRing()),
    ),
    "light_seq": Method(
        title="LightSeq / DistFlashAttn (balanced causal schedule)",
        paper="Li et al. 2023, arXiv:2310.03294",
        layout="contiguous",
        build=light_seq,
        carry=_always(LightSeq()),
        reason_against=looks_ahead,
    ),
    "burst": Method(
        title="BurstAttention (queries hop in the backward)",
        paper="Sun et al. 2024, arXiv:2403.09347",
        layout="zigzag",
        build=burst,
        carry=_always(Burst()),
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
    """How the data of a method travel, or of both phases' methods of ``forward+backward``.

    Raises ValueError for an unknown method, and for a degree or number of stages that cannot be.
    """
    return tuple(method(part).carry(world, number_of(part, world)) for part in name.split("+"))


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
        alone = next((part for part in (first, second) if not method(part).paired), None)
        if alone is not None:
            raise ValueError(
                f"{alone!r} keeps keys from phase to phase and goes with no other method; name it alone, not {name!r}"
            )
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
