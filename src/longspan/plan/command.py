"""``longspan plan``: which context-parallel method and token layout "auto" would take for a job, and why.

Nothing is run: masks, wires and devices are described, so that a job can be planned on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from longspan.attention.masks import Mask
from longspan.attention.patterns import check_pattern, make_pattern
from longspan.context.build import WHOLE_RANKS
from longspan.context.choose import Where
from longspan.context.schedule import Sizes
from longspan.context.trace import chrome_trace, timeline_svg
from longspan.hardware.profile import make_profile
from longspan.hardware.rates import parse_rate
from longspan.hardware.topology import TOPOLOGIES, lab, make_topology
from longspan.plan.explain import ALL_RANKS, BEST, DIRECT_RANKS, Explanation, MethodRow, explain, megabytes

Dtype = Literal["bf16", "fp32", "fp64"]
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_LAB = ("port", "mesh")
# Presets whose devices have another name than their wires.
_DEVICES = {"a10_pcie": "a10", "a10_mesh": "a10", "h800": "h100", "gloo": "cpu", "port": "cpu", "mesh": "cpu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Which context-parallel method and token layout "auto" would take, by estimate; nothing is run.

    Args:
        mask: name of a mask pattern.
        length: tokens of the global sequence.
        ranks: ranks that share it.
        heads: query heads.
        batch: rows that are computed at once.
        topology: wires: a preset (h100, h200, h800, a100, a10_pcie, a10_mesh, gloo), or "port" (one cable per rank to a
            switch) or "mesh" (one per pair of ranks) with --rate.
        rate: of each direction of each cable of a port or mesh, as 100mbit or 1.5gbit.
        device: preset of a device's profile, or its JSON file; by default the one that goes with the wires.
        histogram: JSON of document lengths; by default uniform from 1/32 to 1/4 of the length.
        seed: of the documents.
        explain: every method's time, waiting, bytes and memory by simulation, and the reason.
        trace: folder for the timelines of what was chosen, as SVG and for ui.perfetto.dev.
        json: file for all figures.
    """

    mask: str = "causal"
    length: int = 65536
    ranks: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: Dtype = "bf16"
    batch: int = 1
    topology: str = "h100"
    rate: str = "none"
    device: str | None = None
    histogram: Path | None = None
    seed: int = 0
    explain: bool = False
    trace: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        counts = (self.length, self.ranks, self.heads, self.kv_heads, self.head_dim, self.batch)
        if min(counts) < 1 or self.seed < 0:
            raise ValueError(f"sizes must be at least 1 and the seed at least 0, got {counts} and {self.seed}")
        if self.heads % self.kv_heads:
            raise ValueError(f"query heads must be a multiple of KV heads, got {self.heads} and {self.kv_heads}")
        if self.length < self.ranks:
            raise ValueError(f"every rank needs a token, got {self.length} tokens for {self.ranks} ranks")
        if self.ranks > WHOLE_RANKS:
            raise ValueError(
                f"auto estimates times on up to {WHOLE_RANKS} ranks and takes a default of the layout on more, got "
                f"{self.ranks}; plan fewer"
            )
        check_pattern(self.mask)
        if self.topology not in (*TOPOLOGIES, *_LAB):
            known = ", ".join((*TOPOLOGIES, *_LAB))
            raise ValueError(f"unknown topology {self.topology!r}; known: {known}")
        if (parse_rate(self.rate) is None) == (self.topology in _LAB):
            raise ValueError(
                f"port and mesh need a rate, presets have their own, got topology {self.topology} and rate "
                f"{self.rate}; name both as in --topology port --rate 100mbit"
            )

    def make_mask(self) -> Mask:
        """The mask. Raises ValueError for a file that holds no histogram."""
        try:
            return make_pattern(self.mask, self.length, histogram=self.histogram, seed=self.seed)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"no histogram can be read from {str(self.histogram)!r}: {error}; see the docs") from None

    def where(self) -> Where:
        """Wires, device and sizes. Raises ValueError for an unknown device, or one without the dtype."""
        rate_bit_per_s = parse_rate(self.rate)
        if rate_bit_per_s is None:
            topology = make_topology(self.topology, self.ranks)
        else:
            topology = lab("port" if self.topology == "port" else "mesh", self.ranks, rate_bit_per_s)
        device = make_profile(self.device or _DEVICES.get(self.topology, self.topology))
        size = _BYTES[self.dtype]
        sizes = Sizes(batch=self.batch, head_dim=self.head_dim, inputs=size, sums=max(4, size))
        return Where(topology=topology, device=device, sizes=sizes)


assert set(get_args(Dtype)) == set(_BYTES)


def run_plan(config: PlanConfig) -> int:
    """Prints the choice, writes what was asked for; the exit code. Raises ValueError for what does not fit."""
    where = config.where()
    found = explain(
        config.make_mask(),
        config.heads,
        config.kv_heads,
        where,
        simulated=config.explain or config.json is not None,
        timelines=config.trace is not None,
    )
    print(in_text(config, where, found))
    if config.trace is not None and found.timelines is not None:
        config.trace.mkdir(parents=True, exist_ok=True)
        for name, timeline in zip(("forward", "backward"), found.timelines, strict=True):
            (config.trace / f"{name}.svg").write_text(timeline_svg(timeline))
            (config.trace / f"{name}.json").write_text(chrome_trace(timeline) + "\n")
        print(f"\ntimelines: {config.trace}/forward.svg, backward.svg; the .json open in ui.perfetto.dev")
    if config.json is not None:
        given = {"mask": config.mask, "length": config.length, "ranks": config.ranks, "heads": config.heads}
        given |= {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "dtype": config.dtype}
        given |= {"batch": config.batch, "topology": where.topology.name, "device": where.device.name}
        given |= {"seed": config.seed, "histogram": None if config.histogram is None else str(config.histogram)}
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"problem": given, **found.to_dict()}, indent=2) + "\n")
    return 0


def in_text(config: PlanConfig, where: Where, found: Explanation) -> str:
    """What ``longspan plan`` prints."""
    forward, _, backward = found.chosen.method.partition("+")
    lines = [
        f"{config.mask} mask, {config.length:,} tokens over {config.ranks} ranks on {where.topology.name} "
        f"({where.device.name}), {config.heads}:{config.kv_heads} heads of {config.head_dim}, {config.dtype}",
        "",
        f"method   {forward} forward, {backward or forward} backward",
        f"layout   {found.layout.name}",
        f"estimate {_ms(found.chosen.forward_s)} forward, {_ms(found.chosen.backward_s)} backward, a layer",
    ]
    if not config.explain:
        return "\n".join(lines)
    lines += ["", *found.reasons, "", f"Methods on layout {found.layout.name}, simulated, forward and backward:", ""]
    heads = ("method", "estimated", "forward", "backward", "waiting", "sent, mean", "sent, max", "peak memory")
    lines += table(heads, [_cells(row) for row in found.methods])
    if config.ranks > ALL_RANKS:
        lines += ["", f"On more than {ALL_RANKS} ranks only the best {BEST} are simulated"]
        if config.ranks > DIRECT_RANKS:
            lines[-1] += f", and on more than {DIRECT_RANKS} none that sends to all ranks at once"
        lines[-1] += "."
    lines += ["", "Not in the table:"]
    lines += [f"  {name}: {reason}" for name, reason in found.refused.items()]
    lines += ["", "Layouts considered, each with its best method by estimate:", ""]
    rows = [
        (row.name, row.method, _ms(row.estimated_s), f"{row.imbalance:.3f}", f"{row.keys:.2f}") for row in found.layouts
    ]
    return "\n".join(lines + table(("layout", "method", "estimated", "imbalance", "keys to receive / ring"), rows))


def _cells(row: MethodRow) -> tuple[str, ...]:
    sent = (row.mean_sent_bytes, row.max_sent_bytes, row.peak_bytes)
    times = (row.estimated_s, row.forward_s, row.backward_s, row.exposed_s)
    return (
        row.method,
        *("-" if x is None else _ms(x) for x in times),
        *("-" if x is None else megabytes(x) for x in sent),
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
