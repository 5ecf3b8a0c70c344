"""What ``auto`` sends of packed documents, against a ring that sends everything: counted from tables, not timed. Run:

    python -m longspan.bench.auto_bytes --histogram prolong64k.json --out OUT

For each number of ranks, seed and link: documents drawn from the histogram, layout and method as ``choose_layout`` has
them for bf16 and heads of 128, what each rank sends forward by what a ring's rank sends, and the imbalance: the pairs
times heads of the busiest rank by the mean. Beside it ``balanced``: keys sent to where they are needed on the layout
that is balanced to 2 %, whatever the link.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.attention.masks import Mask, documents
from longspan.attention.patterns import sample_lengths
from longspan.bench.record import head, now
from longspan.context.balance import balanced
from longspan.context.build import checked_schedule
from longspan.context.choose import Where, choose_layout, sizes_of
from longspan.context.estimate import Table, sent_bytes, tabulate
from longspan.context.geometry import Geometry
from longspan.context.tables import World
from longspan.hardware.profile import make_profile
from longspan.hardware.topology import make_topology
from longspan.layout.tokens import Layout

_LOCAL_TOKENS = 8192
# The second is a network card of 10 Gbit/s for each GPU, and nothing else between any two.
_SLOW_BYTES_PER_S = 1.25e9
LINKS = ("NVSwitch", "10 Gbit/s")


def _where(link: str, world: int, head_dim: int) -> Where:
    topology = make_topology("h200", world)
    if link != "NVSwitch":
        topology = replace(topology, name=link, link_bytes_per_s=_SLOW_BYTES_PER_S, node_size=0)
    return Where(topology=topology, device=make_profile("h200"), sizes=sizes_of(torch.bfloat16, head_dim, 1))


def _forward(method: str, mask: Mask, layout: Layout, heads: int, kv_heads: int) -> Table:
    """The forward phase of a method or of a pair of methods."""
    name, geometry = method.partition("+")[0], Geometry(mask, layout)
    tables = World(geometry, heads, kv_heads).table(name)
    return tabulate(checked_schedule(mask, layout, name, heads, kv_heads), geometry) if tables is None else tables[0]


def _imbalance(phase: Table) -> float:
    """Work of the busiest rank by the mean, in pairs times heads."""
    pairs = np.bincount(phase.pieces[:, 0], phase.pieces[:, 3], phase.num_shapes)[phase.shapes]
    work = np.bincount(phase.blocks[:, 1], pairs * phase.blocks[:, 4], phase.world)
    return float(work.max() / work.mean())


def measure(histogram: Path, world: int, seed: int, link: str, heads: int, kv_heads: int) -> dict[str, Any]:
    """One row: shares of a ring's bytes (mean and maximum over ranks), imbalance, and what was chosen."""
    mask = documents(sample_lengths(histogram, world * _LOCAL_TOKENS, seed))
    where = _where(link, world, head_dim := 128)
    ring = (world - 1) * _LOCAL_TOKENS * 2 * kv_heads * head_dim * where.sizes.inputs
    layout, choice = choose_layout(mask, world, heads, kv_heads, where)
    even = balanced(mask, world)
    row: dict[str, Any] = {"ranks": world, "seed": seed, "link": link, "heads": heads, "kv_heads": kv_heads}
    for name, method, held in (("auto", choice.chosen.method, layout), ("balanced", "mask_aware", even)):
        phase = _forward(method, mask, held, heads, kv_heads)
        share = sent_bytes(phase, where.sizes) / ring
        row[name] = {
            "method": method,
            "layout": held.name,
            "mean": float(share.mean()),
            "max": float(share.max()),
            "imbalance": _imbalance(phase),
        }
    return row


def table(record: dict[str, Any]) -> str:
    """Markdown: over the seeds, the mean, median and worst share of a ring's bytes (mean over ranks)."""
    lines = [
        "| ranks | H:G | link | layout and method | share of a ring: mean | median | worst | fullest rank, mean | "
        "imbalance, worst |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    places = dict.fromkeys((r["ranks"], r["heads"], r["kv_heads"], r["link"]) for r in record["rows"])
    for place in places:
        rows = [r for r in record["rows"] if (r["ranks"], r["heads"], r["kv_heads"], r["link"]) == place]
        for name in ("auto", "balanced"):
            if name == "balanced" and place[3] != LINKS[0]:
                continue  # the same on every link
            parts = [r[name] for r in rows]
            means = [part["mean"] for part in parts]
            taken = Counter(f"`{p['method']}` on {p['layout']}" for p in parts)
            words = f"`auto`: {_most(taken)}" if name == "auto" else "`mask_aware` on balanced"
            lines.append(
                f"| {place[0]} | {place[1]}:{place[2]} | {place[3] if name == 'auto' else 'any'} | {words} | "
                f"{statistics.mean(means):.3f} | {statistics.median(means):.3f} | {max(means):.3f} | "
                f"{statistics.mean(p['max'] for p in parts):.3f} | {max(p['imbalance'] for p in parts):.2f} |"
            )
    return "\n".join(lines) + "\n"


def _most(taken: Counter[str]) -> str:
    """What was chosen most often, and how often."""
    (name, times), *_ = taken.most_common(1)
    return f"{name} in {times} of {taken.total()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and writes ``auto_bytes.json`` and ``auto_bytes.md``."""
    parser = argparse.ArgumentParser(prog="longspan.bench.auto_bytes")
    parser.add_argument("--histogram", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows = [
        measure(options.histogram, world, seed, link, options.heads, kv_heads)
        for world in options.ranks
        for kv_heads in options.kv_heads
        for link in LINKS
        for seed in range(options.seeds)
    ]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    record = {**head("auto_bytes", now()), "config": config | {"histogram": options.histogram.name}, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "auto_bytes.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "auto_bytes.md").write_text(table(record))
    print(table(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
