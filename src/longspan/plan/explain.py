"""Why ``method="auto"`` chooses what it does: every method on the chosen layout, simulated, and the reason in words.

The choice is by ``context.estimate``; what is told of it comes from ``context.simulate``, which also counts bytes,
memory and the time that ranks wait. Simulating is dear on many ranks, so that there only the best few are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longspan.attention.masks import Mask
from longspan.context.balance import bytes_fraction, imbalance
from longspan.context.choose import STAGING_MARGIN, Candidate, Choice, Where, choose_layout, layout_options, price_all
from longspan.context.geometry import Geometry
from longspan.context.methods import METHODS, builder, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.schedule import bytes_sent
from longspan.context.simulate import Simulation, simulate
from longspan.layout.tokens import Layout

ALL_RANKS = 16  # up to so many, all methods are simulated
BEST = 3  # methods that are simulated on more
# Those that send to all ranks at once are simulated on up to so many: thousands of messages under way take a minute.
DIRECT_RANKS = 32
_DIRECT = ("all_gather", "mask_aware", "kept_keys")
MEMORY_RANKS = 32  # up to so many, peak memory is counted, which takes longer than all else
_BUSY = 0.75  # of the time that the busiest rank computes, from which computation is what bounds

_HOW = {
    "ring": "keys travel round all ranks",
    "zigzag": "keys travel round all ranks",
    "striped": "keys travel round all ranks",
    "descending": "keys travel round the ranks, and those that nobody will read are left out",
    "opposing": "half of the KV heads travel each way round",
    "double_ring": "keys travel in windows of ranks",
    "all_gather": "all keys are sent at once and computed on in one call",
    "mask_aware": "keys go straight to the ranks whose mask reads them",
    "ulysses": "heads are exchanged for tokens, so keys and queries travel once and ranks compute equally much",
    "kept_keys": "keys go straight to the ranks that read them, which keep them for the backward phase",
    "staged_ulysses": "heads are exchanged for tokens in stages, the next under way while one is computed",
    "usp": "heads are exchanged within groups of ranks, keys travel between the groups",
    "distributed_mha": "heads are exchanged within groups of ranks, keys travel between the groups",
    "token_ring": "queries travel and outputs go home, keys stay",
    "light_seq": "ranks with little to do under a causal mask help the others",
    "burst": "in the backward queries travel, not keys with their gradients",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRow:
    """A layout that was considered, with the best method on it.

    Attributes:
        name: "balanced" may be there twice: once closely, once loosely balanced.
        imbalance: work of the busiest rank over the mean.
        keys: keys that the busiest receiver's mask needs from others, over what a ring sends.
        estimated_s: of ``method``, forward and backward.
    """

    name: str
    imbalance: float
    keys: float
    method: str
    estimated_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """A method on the chosen layout, forward and backward together where not said.

    Attributes:
        estimated_s: as the choice sees it; None for what has no quick estimate.
        forward_s, backward_s: simulated, as all below; None where it was not.
        busiest_s: the longest that a rank computes, merges or copies.
        exposed_s: the longest that a rank waits with nothing to compute.
        mean_sent_bytes, max_sent_bytes: over the ranks.
        peak_bytes: memory of the fullest rank: inputs, sums and arrivals; None where it was not counted.
    """

    method: str
    estimated_s: float | None
    forward_s: float | None = None
    backward_s: float | None = None
    busiest_s: float | None = None
    exposed_s: float | None = None
    mean_sent_bytes: float | None = None
    max_sent_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def simulated_s(self) -> float | None:
        return None if self.forward_s is None or self.backward_s is None else self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What "auto" chooses for a mask and why.

    Attributes:
        layout: the chosen one; ``layouts`` are those it was chosen from, best first.
        chosen: the method, maybe one for each phase, with its estimated times.
        methods: on the chosen layout, the chosen one first, then by time.
        refused: methods that are not in ``methods``, with the reason.
        reasons: sentences.
        timelines: the chosen one's phases, forward and backward.
    """

    layout: Layout
    chosen: Candidate
    layouts: tuple[LayoutRow, ...]
    methods: tuple[MethodRow, ...]
    refused: dict[str, str]
    reasons: tuple[str, ...]
    timelines: tuple[Simulation, Simulation] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the timelines."""
        forward, _, backward = self.chosen.method.partition("+")
        return {
            "forward_method": forward,
            "backward_method": backward or forward,
            "method": self.chosen.method,
            "layout": self.layout.name,
            "estimated_forward_s": self.chosen.forward_s,
            "estimated_backward_s": self.chosen.backward_s,
            "layouts": [asdict(row) for row in self.layouts],
            "methods": [asdict(row) for row in self.methods],
            "refused": self.refused,
            "reasons": list(self.reasons),
        }


def explain(
    mask: Mask, num_heads: int, num_kv_heads: int, where: Where, *, simulated: bool = True, timelines: bool = False
) -> Explanation:
    """Choose as ``choose_layout`` does, and tell why.

    Args:
        where: wires, device and sizes; its topology says the number of ranks.
        simulated: whether to simulate methods, which the reasons need.
        timelines: whether to keep the chosen one's timelines, which simulates it in any case.

    Raises:
        ValueError: heads, dtype and device do not fit.
    """
    world = where.topology.num_ranks
    options = [
        choose_layout(mask, world, num_heads, num_kv_heads, where, layouts=(layout,))
        for layout in layout_options(mask, world)
    ]
    options.sort(key=lambda pair: pair[1].chosen.both_s)
    layout, choice = options[0]
    choice = Choice(choice.chosen, price_all(mask, layout, num_heads, num_kv_heads, where))
    bench = _Bench(mask, layout, num_heads, num_kv_heads, where)
    rows = {name: bench.row(name, choice) for name in _to_simulate(choice, bench)} if simulated else {}
    priced = dict.fromkeys((choice.chosen, *choice.candidates))
    # The chosen one first, whether or not it was simulated.
    rows = {c.method: rows.get(c.method, MethodRow(method=c.method, estimated_s=c.both_s)) for c in priced} | rows
    simulated_first = sorted(rows.values(), key=lambda row: (row.method != choice.chosen.method, row.forward_s is None))
    refused = {name: bench.reason(name) for name in METHODS if name not in rows}
    return Explanation(
        layout=layout,
        chosen=choice.chosen,
        layouts=tuple(
            LayoutRow(
                name=layout.name,
                imbalance=imbalance(mask, layout),
                keys=bytes_fraction(mask, layout)[1],
                method=choice.chosen.method,
                estimated_s=choice.chosen.both_s,
            )
            for layout, choice in options
        ),
        methods=tuple(simulated_first),
        refused=refused,
        reasons=tuple(_reasons(simulated_first, options, bench)) if simulated else (),
        timelines=bench.phases(choice.chosen.method) if timelines else None,
    )


def _to_simulate(choice: Choice, bench: _Bench) -> list[str]:
    """The chosen method first, then the candidates by time, then what was not priced; few of them on many ranks."""
    names = dict.fromkeys([choice.chosen.method, *(c.method for c in choice.candidates)])
    if bench.world > ALL_RANKS:
        return [name for name in names if bench.quick(name)][:BEST]
    return [*names, *(name for name in METHODS if name not in names and not bench.twin(name) and bench.able(name))]


class _Bench:
    """Simulates methods on one layout."""

    def __init__(self, mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int, where: Where) -> None:
        self.mask, self.layout, self.heads, self.where = mask, layout, (num_heads, num_kv_heads), where
        self.world, self.geometry = layout.world, Geometry(mask, layout)
        self._done: dict[str, tuple[Simulation, Simulation, list[int]]] = {}

    def able(self, name: str) -> bool:
        return reason_against(name, self.mask, self.layout) is None

    def quick(self, name: str) -> bool:
        """Whether simulating it takes seconds at most."""
        return self.world <= DIRECT_RANKS or not any(part.partition(":")[0] in _DIRECT for part in name.split("+"))

    def twin(self, name: str) -> str:
        """Why a method is the same schedule as an earlier one, or ""."""
        if name == "staged_ulysses" and self.heads[0] <= self.world:
            return "is ulysses where no rank has two heads"
        earlier = {"zigzag": "ring", "striped": "ring", "distributed_mha": "usp"}.get(name)
        return f"is {earlier} once the layout is given" if earlier else ""

    def reason(self, name: str) -> str:
        """Why a method is not in the table."""
        if against := reason_against(name, self.mask, self.layout):
            return f"cannot compute this mask: {against}"
        return self.twin(name) or f"has no quick estimate on {self.world} ranks"

    def phases(self, name: str) -> tuple[Simulation, Simulation]:
        return self._simulate(name)[:2]

    def _simulate(self, name: str) -> tuple[Simulation, Simulation, list[int]]:
        if name not in self._done:
            where = self.where
            schedule = prune_schedule(builder(name, self.world)(self.layout, *self.heads), self.geometry)
            memory = self.world <= MEMORY_RANKS
            forward, backward = (
                simulate(
                    schedule, self.geometry, where.topology, where.device, where.sizes, backward=phase, memory=memory
                )
                for phase in (False, True)
            )
            sent = [bytes_sent(phase, self.world, where.sizes) for phase in (schedule.forward, schedule.backward)]
            self._done[name] = forward, backward, [sum(both) for both in zip(*sent, strict=True)]
        return self._done[name]

    def row(self, name: str, choice: Choice) -> MethodRow:
        forward, backward, sent = self._simulate(name)
        priced = {c.method: c.both_s for c in (*choice.candidates, choice.chosen)}
        return MethodRow(
            method=name,
            estimated_s=priced.get(name),
            forward_s=forward.time_s,
            backward_s=backward.time_s,
            busiest_s=max(a + b for a, b in zip(forward.compute_s, backward.compute_s, strict=True)),
            exposed_s=max(a + b for a, b in zip(forward.exposed_s, backward.exposed_s, strict=True)),
            mean_sent_bytes=sum(sent) / len(sent),
            max_sent_bytes=max(sent),
            peak_bytes=max(forward.peak_memory_bytes, backward.peak_memory_bytes) if forward.peak_bytes else None,
        )

    def ring_bytes(self) -> float:
        """What a ring that leaves nothing out sends, mean over the ranks: the measure of the others."""
        n, sizes = self.layout.num_tokens / self.world, self.where.sizes
        kv = 2 * sizes.batch * n * self.heads[1] * sizes.head_dim
        return (self.world - 1) * kv * (2 * sizes.inputs + sizes.sums)


def _reasons(rows: list[MethodRow], options: list[tuple[Layout, Choice]], bench: _Bench) -> list[str]:
    """In words: what bounds the chosen method, what it sends, what the layout gains."""
    best, where = rows[0], bench.where
    forward, _, backward = best.method.partition("+")
    total_s, busiest_s, sent = best.simulated_s or 0.0, best.busiest_s or 0.0, best.max_sent_bytes or 0
    words = [how for name in dict.fromkeys((forward, backward or forward)) if (how := _HOW.get(name.partition(":")[0]))]
    said = []
    if best.simulated_s is None:
        return [f"{best.method} sends to all ranks at once, which is not simulated on more than {DIRECT_RANKS} ranks."]
    if bench.world > 1:
        by = "computation" if busiest_s > _BUSY * total_s else "the wires"
        said.append(
            f"Bound by {by}: the busiest rank computes {busiest_s / total_s:.0%} of the time, while a rank sends up to "
            f"{megabytes(sent)} over {where.topology.name}."
        )
        share = (best.mean_sent_bytes or 0.0) / bench.ring_bytes()
        said.append(f"{best.method} sends {share:.2g} of a whole ring's bytes: {'; '.join(words)}.")
    others = [row for row in rows[1:] if row.simulated_s is not None]
    if others:
        second = min(others, key=lambda row: row.simulated_s or 0.0)
        ratio = (second.simulated_s or 0.0) / total_s
        than = f"{ratio - 1:.0%} longer"
        if ratio < 1:
            than = f"{1 - ratio:.0%} less by simulation; the estimate, by which auto chooses, is coarser"
            if (best.method, second.method) == ("ulysses", "staged_ulysses"):
                than += f", and stages must promise {STAGING_MARGIN - 1:.0%}"
        said.append(f"Of the others simulated, {second.method} comes next: it takes {than}.")
    (layout, _), *rest = options
    plain = next((other for other, _ in options if other.name == "contiguous"), layout)
    load, plain_load = imbalance(bench.mask, layout), imbalance(bench.mask, plain)
    if rest and layout is not plain:
        said.append(
            f"Layout {layout.name}: queries of the busiest rank have {load:.3g} times the mean work, contiguous "
            f"{plain_load:.3g} times."
        )
    return said


def megabytes(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
