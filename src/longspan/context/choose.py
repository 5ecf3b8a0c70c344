"""Which layout and which method.

Defaults are pure functions of (mask, ranks, method). What runs on known wires and devices chooses better:
``choose_method`` estimates every method's time there, ``choose_layout`` the layout's with it. What is known of this
machine (``here``) may differ from that of the next one; ``attend.where_of`` has all ranks of a group use rank 0's.

Published methods bring their layout. ``auto`` takes the first of contiguous, zigzag and balanced whose busiest rank has
hardly more work than the best of the three: the earlier ones have larger blocks, and the same form for every mask.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from longspan.attention.masks import Mask
from longspan.context.balance import balanced, bytes_fraction, imbalance
from longspan.context.bounds import Both, Bounds
from longspan.context.estimate import Known, Table, estimate_all, least_s, tabulate
from longspan.context.geometry import Geometry
from longspan.context.methods import builder, layout_name, method, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Sizes
from longspan.context.tables import World
from longspan.hardware.devices import device_name
from longspan.hardware.profile import DeviceProfile, make_profile
from longspan.hardware.saved import profile_path, saved_profile
from longspan.hardware.topology import Topology, make_topology
from longspan.layout.tokens import LAYOUTS, Layout, make_layout

_log = logging.getLogger(__name__)
_BALANCE_MARGIN = 1.02  # a layout must be better by this factor to be preferred over an earlier one


def check_layout_name(name: str) -> None:
    """Raises ValueError for what is no layout."""
    if name != "balanced" and name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}, balanced")


def layout_of(name: str, mask: Mask, world: int) -> Layout:
    """The layout of that name for a mask. Raises ValueError for an unknown name."""
    check_layout_name(name)
    if name == "balanced":
        return balanced(mask, world)
    return make_layout(name, mask.num_tokens, world)


@lru_cache(maxsize=256)
def default_layout(mask: Mask, world: int, method: str = "auto") -> Layout:
    """The layout of a mask on ``world`` ranks for a method or ``auto``. Raises ValueError for an unknown method."""
    if method != "auto":
        return layout_of(layout_name(method), mask, world)
    candidates = [layout_of(name, mask, world) for name in ("contiguous", "zigzag", "balanced")]
    work = [imbalance(mask, layout) for layout in candidates]
    return next(layout for layout, load in zip(candidates, work, strict=True) if load <= min(work) * _BALANCE_MARGIN)


def default_method(layout: Layout) -> str:
    """The method for ``auto`` on a layout."""
    return {"zigzag": "descending", "balanced": "mask_aware"}.get(layout.name, "ring")


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """What a schedule runs on: the wires, the device, and the sizes of what is computed."""

    topology: Topology
    device: DeviceProfile
    sizes: Sizes


# What a card is called, and the preset that stands for it.
_CARDS = {"H200": "h200", "H100": "h100", "H800": "h100", "A100": "a100", "A10": "a10"}
_WIRES = {"h200": "h200", "h100": "h100", "a100": "a100", "a10": "a10_pcie"}


def preset_of(device: torch.device) -> str:
    """The preset profile that stands for a device: an unknown card is taken for an H100."""
    if device.type != "cuda":
        return "cpu"
    name = device_name(device)
    return next((preset for words, preset in _CARDS.items() if words in name), "h100")


def here(world: int, device: torch.device, *, dtype: torch.dtype, head_dim: int, batch: int = 1) -> Where:
    """What this job runs on, as far as this rank can tell: ranks on the CPU are taken to share this machine.

    The device is as a profile saved for it says, else as its preset; which of the two is logged once, at level INFO.
    Raises ValueError where the saved profile cannot be read.
    """
    preset = preset_of(device)
    saved = saved_profile(device)
    _say_once(f"as measured in {profile_path(device)}" if saved else f"as the preset {preset!r}", device_name(device))
    # Ranks that share a card talk through host memory.
    alone = device.type == "cuda" and torch.cuda.device_count() >= min(world, _gpus_of_a_node())
    return Where(
        topology=make_topology(_WIRES[preset] if alone else "gloo", world),
        device=saved or make_profile(preset),
        sizes=sizes_of(dtype, head_dim, batch),
    )


def sizes_of(dtype: torch.dtype, head_dim: int, batch: int) -> Sizes:
    """Sizes of inputs of ``dtype`` and of the sums made of them."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return Sizes(batch=batch, head_dim=head_dim, inputs=dtype.itemsize, sums=wide)


@cache
def _say_once(how: str, name: str) -> None:
    _log.info("estimates of methods take %s %s", name, how)


def _gpus_of_a_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Candidate(NamedTuple):
    """A method and its estimated seconds."""

    method: str
    forward_s: float
    backward_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


_NEVER = Candidate("", math.inf, math.inf)
_forward_s, _backward_s, _both_s = (attrgetter(name) for name in ("forward_s", "backward_s", "both_s"))


@dataclass(frozen=True, slots=True)
class Choice:
    """The method that ``auto`` takes, and all whose lower bound did not rule them out, best first."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        rows = [f"{c.method} {1e3 * c.forward_s:.3g} + {1e3 * c.backward_s:.3g} ms" for c in self.candidates]
        return f"{self.chosen.method}: {1e3 * self.chosen.both_s:.3g} ms estimated, of {', '.join(rows)}"


# Of equally fast ones the earlier is chosen: those that join shards in one call come first.
CANDIDATES = (
    "all_gather", "mask_aware:2", "mask_aware", "kept_keys", "ulysses", "staged_ulysses", "usp", "ring", "descending",
    "opposing", "double_ring", "token_ring", "light_seq", "burst",
)  # fmt: skip
_MIXING_MARGIN = 1.03  # two methods must promise this much over one
STAGING_MARGIN = 1.05  # and Ulysses in stages over Ulysses: what a stage hides costs more than is estimated
_LISTED_RANKS = 16  # up to so many, a method without tables in closed form is priced by its schedule
_FIRST = "usp"  # often the best, and its tables are small: what it takes rules out most of the others
_AT_ONCE = 3  # of the others, methods that are priced together; after each time, bounds rule some of the rest out
_chosen: dict[tuple[object, ...], Choice] = {}


def choose_method(mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int, where: Where) -> Choice:
    """The method, or forward and backward methods, with the least estimated time on a layout.

    Cached by what masks of a run have in common (length, area, balance, keys to send, each to a few per cent), so that
    packed documents, whose mask is new in every step, are chosen for once. A pure function of its arguments and of what
    was asked before: ask in one order on all ranks.
    """
    key = (*_statistics(mask, layout), layout.name, layout.world, num_heads, num_kv_heads, where)
    if key not in _chosen:
        choice = _chosen[key] = _choose(mask, layout, num_heads, num_kv_heads, where)
        _say_choice(choice, layout, where)
    return _chosen[key]


def in_words(choice: Choice, layout: Layout, where: Where) -> str:
    """What was chosen and why, in one line for people."""
    best = choice.chosen
    others = [c for c in choice.candidates if c.method not in best.method.split("+")]
    than = f", {others[0].method} {1e3 * others[0].both_s:.3g} ms" if others else ""
    return (
        f"attention over {layout.world} ranks: method {best.method}, layout {layout.name}; estimated on "
        f"{where.topology.name} at {1e3 * best.both_s:.3g} ms a layer{than} (longspan plan --explain tells why)"
    )


_said: set[tuple[str, str, str]] = set()


def _say_choice(choice: Choice, layout: Layout, where: Where) -> None:
    """Log a choice once, on rank 0 alone."""
    what = (where.topology.name, layout.name, choice.chosen.method)
    if what not in _said and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        _log.info(in_words(choice, layout, where))
    _said.add(what)


def _statistics(mask: Mask, layout: Layout) -> tuple[float, ...]:
    s = mask.num_tokens
    return (
        round(8 * math.log2(s)),
        round(8 * math.log2((mask.area + 1) / (s * s))),
        round(20 * imbalance(mask, layout)),
        round(40 * bytes_fraction(mask, layout)[1]),
    )


class _Search:
    """Prices candidates, leaving out those whose lower bounds say that they cannot be chosen."""

    def __init__(self, mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int, where: Where) -> None:
        self.geometry, self.heads = Geometry(mask, layout), (num_heads, num_kv_heads)
        self.world = World(self.geometry, *self.heads)
        self.where, self.known = (where.topology, where.device, where.sizes), Known()
        self.least: dict[str, Both] = {}  # lower bounds of each method's phases
        self.todo: list[str] = []  # methods that are neither priced nor ruled out
        self.found: dict[str, Candidate] = {}
        self.bound: set[str] = set()  # methods whose backward phase needs what their forward phase keeps
        self.barred: set[str] = set()  # priced, and not to be taken

    def best(self) -> tuple[Candidate, Candidate, Candidate]:
        """Of what is priced so far: the best for both phases, for the forward and for the backward phase."""
        found = [self.found[name] for name in CANDIDATES if name in self.found and name not in self.barred]
        paired = [c for c in found if method(c.method).paired]
        free = (c for c in paired if c.method not in self.bound)
        return (
            min(found, key=_both_s, default=_NEVER),
            min(paired, key=_forward_s, default=_NEVER),
            min(free, key=_backward_s, default=_NEVER),
        )

    def able(self) -> list[str]:
        """The candidates that can compute the mask on the layout and do not keep much."""
        world, (num_heads, num_kv_heads) = self.world, self.heads
        able = [name for name in CANDIDATES if reason_against(name, self.geometry.mask, world.layout) is None]
        if num_heads <= world.world:
            able.remove("staged_ulysses")  # no rank has two heads: it is Ulysses
        kept = (world.keys.tokens * (world.i != world.j)).sum(1) * 2 * num_kv_heads
        if (kept > np.array(world.layout.local_sizes) * 2 * (num_heads + num_kv_heads)).any():
            able.remove("kept_keys")  # more than q, k, v and out, which every layer keeps anyway
        return able

    def weigh_stages(self) -> None:
        """Rule Ulysses in stages out where it would be taken for less than it must promise."""
        if all(c.method != "staged_ulysses" for c in self.best()):
            return
        if "ulysses" not in self.found:
            self.estimate(self.tables(["ulysses"]))
        if self.found["ulysses"].both_s < self.found["staged_ulysses"].both_s * STAGING_MARGIN:
            self.barred.add("staged_ulysses")
            # What it had ruled out may be the best now.
            self.price([name for name in self.able() if name not in self.found])

    def in_order(self) -> tuple[Candidate, ...]:
        """What is priced, best first."""
        return tuple(sorted(self.found.values(), key=_both_s))

    def hopes(self, name: str) -> bool:
        """Whether a method could be chosen, for both phases or for one beside the best that the other may have."""
        (forward_s, backward_s), (both, forward, backward) = self.least[name], self.best()
        best_forward_s, best_backward_s = (
            min([best_s, *(self.least[other][phase] for other in self.todo)])
            for phase, best_s in enumerate((forward.forward_s, backward.backward_s))
        )
        enough_s = both.both_s / _MIXING_MARGIN
        return (
            forward_s + backward_s < both.both_s
            or (forward_s < forward.forward_s and forward_s + best_backward_s < enough_s)
            or (backward_s < backward.backward_s and best_forward_s + backward_s < enough_s)
        )

    def tables(self, names: list[str]) -> dict[str, tuple[Table, Table]]:
        """In closed form, or on few ranks from the schedule; without those that have neither."""
        found, layout = {name: self.world.table(name) for name in names}, self.geometry.layout
        for name in [name for name, both in found.items() if both is None and layout.world <= _LISTED_RANKS]:
            schedule = prune_schedule(builder(name, layout.world)(layout, *self.heads), self.geometry)
            found[name] = tabulate(schedule, self.geometry), tabulate(schedule, self.geometry, backward=True)
        return {name: both for name, both in found.items() if both is not None}

    def price(self, names: list[str]) -> None:
        """Estimate those of the methods that could be chosen, the most hopeful first."""
        bounds = Bounds(self.world, *self.where, self.known)
        self.least = {name: bounds.least_s(name) for name in names}
        self.todo = sorted(names, key=lambda name: (name != _FIRST, sum(self.least[name])))
        num = 1
        while now := [name for name in self.todo if self.hopes(name)][:num]:
            for name in now if self.found else ():  # nothing is ruled out before something is priced
                self._raise(name, bounds.kernels_s(name))
            tables = self.tables([name for name in now if self.hopes(name)])
            for name, both in tables.items():
                forward_s, backward_s = (least_s(table, *self.where, self.known) for table in both)
                self._raise(name, (forward_s, backward_s))
            self.estimate({name: both for name, both in tables.items() if self.hopes(name)})
            self.todo = [name for name in self.todo if name not in now]
            num = _AT_ONCE

    def _raise(self, name: str, bounds: Both) -> None:
        forward_s, backward_s = map(max, self.least[name], bounds)
        self.least[name] = forward_s, backward_s

    def estimate(self, tables: dict[str, tuple[Table, Table]]) -> None:
        """Estimate methods by their tables."""
        if tables:
            self.bound |= {name for name, (forward, _) in tables.items() if forward.keeps}
            seconds = estimate_all([table for both in tables.values() for table in both], *self.where, self.known)
            rows = zip(tables, seconds[::2], seconds[1::2], strict=True)
            self.found |= {name: Candidate(name, *both_s) for name, *both_s in rows}


def price_all(mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int, where: Where) -> tuple[Candidate, ...]:
    """The estimates of all candidates on a layout, best first, also of those that bounds would rule out.

    Without those that have no tables in closed form where ranks are many.
    """
    search = _Search(mask, layout, num_heads, num_kv_heads, where)
    search.estimate(search.tables(search.able()))
    return search.in_order()


def _choose(mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int, where: Where) -> Choice:
    search = _Search(mask, layout, num_heads, num_kv_heads, where)
    search.price(search.able())
    search.weigh_stages()
    best, forward, backward = search.best()
    if (forward.forward_s + backward.backward_s) * _MIXING_MARGIN < best.both_s:
        name = forward.method if forward is backward else f"{forward.method}+{backward.method}"
        best = Candidate(name, forward.forward_s, backward.backward_s)
    return Choice(best, search.in_order())


def layout_options(mask: Mask, world: int) -> list[Layout]:
    """The layouts that ``choose_layout`` chooses from by default, each once."""
    options = [layout_of(name, mask, world) for name in ("contiguous", "zigzag")]
    options += [balanced(mask, world, tolerance=tolerance) for tolerance in (0.02, 0.3)]
    return list(dict.fromkeys(options))


def choose_layout(
    mask: Mask,
    world: int,
    num_heads: int,
    num_kv_heads: int,
    where: Where,
    *,
    layouts: Sequence[Layout] | None = None,
) -> tuple[Layout, Choice]:
    """The layout, and the method on it, with the least estimated time: balance against bytes, at the wires' price.

    ``layouts`` are those to choose from, by default ``layout_options``: contiguous, zigzag, and two that are balanced,
    one closely and one loosely. A pure function of its arguments, unlike ``choose_method``; nothing is cached.
    """
    options = layout_options(mask, world) if layouts is None else layouts
    chosen = [(layout, _choose(mask, layout, num_heads, num_kv_heads, where)) for layout in options]
    return min(chosen, key=lambda pair: pair[1].chosen.both_s)
