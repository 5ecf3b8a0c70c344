"""A schedule as a timeline, for people to look at: what each rank computes and sends, round by round.

Not a simulation: a round lasts as long as its busiest rank's block, blocks are drawn in proportion to their allowed
pairs and sends to their bytes. (The simulator, with topologies and measured kernels, is a later part.)
"""

from __future__ import annotations

from typing import Any

from longspan.context.geometry import Geometry
from longspan.context.schedule import Phase, Sizes


def timeline(phase: Phase, geometry: Geometry, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows {rank, step, kind "compute" | "send", label, start, duration, area | bytes, peer, lane} in rounds of 1.

    The busiest block of the phase has duration 1; the largest total of bytes one rank sends in a round is drawn as 1.
    """
    areas = [geometry.area(b.q, b.k) * (b.heads[1] - b.heads[0]) for b in phase.blocks]
    work: dict[tuple[int, int], int] = {}
    for block, area in zip(phase.blocks, areas, strict=True):
        work[block.step, block.rank] = work.get((block.step, block.rank), 0) + area
    sent: dict[tuple[int, int], int] = {}
    for move in phase.moves:
        sent[move.step, move.src] = sent.get((move.step, move.src), 0) + sizes.of_move(move)
    most_work, most_sent = max(work.values(), default=1), max(sent.values(), default=1)
    starts, now = [], 0.0
    for step in range(phase.num_steps):
        starts.append(now)
        busiest = max((n / most_work for (s, _), n in work.items() if s == step), default=0.0)
        slowest = max((n / most_sent for (s, _), n in sent.items() if s == step), default=0.0)
        now += max(busiest, slowest)
    rows, ends = [], {}
    for block, area in zip(phase.blocks, areas, strict=True):
        start = ends.get((block.step, block.rank), starts[block.step])
        rows.append(
            {
                "rank": block.rank,
                "step": block.step,
                "kind": "compute",
                "label": "block",
                "start": start,
                "duration": area / most_work,
                "area": area,
            }
        )
        ends[block.step, block.rank] = start + area / most_work
    ends = {}
    for move in phase.moves:
        start = ends.get((move.step, move.src), starts[move.step])
        size = sizes.of_move(move)
        rows.append(
            {
                "rank": move.src,
                "step": move.step,
                "kind": "send",
                "label": move.piece.kind,
                "start": start,
                "duration": size / most_sent,
                "bytes": size,
                "peer": move.dst,
            }
        )
        ends[move.step, move.src] = start + size / most_sent
    return rows
