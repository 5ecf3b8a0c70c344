"""What a simulation looks like: valid SVG and trace JSON that hold every event once."""

from __future__ import annotations

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from longspan.attention import masks
from longspan.context.simulate import simulate
from longspan.context.trace import chrome_trace, timeline_svg
from tests.context.simulated import SIZES, UNIT, port, pruned

SCHEDULE, GEOMETRY = pruned("token_ring", masks.causal(23), 3, 2, 1)
SIMULATION = simulate(SCHEDULE, GEOMETRY, port(3, 5.0), UNIT, SIZES)


def test_the_svg_draws_every_event_within_the_picture() -> None:
    root = ElementTree.fromstring(timeline_svg(SIMULATION, width=640))
    boxes = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if len(r)]
    assert len(boxes) == len(SIMULATION.events) > 0
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in boxes:
        x, y = float(box.attrib["x"]), float(box.attrib["y"])
        assert x >= 0 and x + float(box.attrib["width"]) <= width + 0.5
        assert y >= 0 and y + float(box.attrib["height"]) <= height
    text = "".join(root.itertext())
    assert all(f"rank {rank}" in text for rank in range(3)) and "token_ring on port" in text


def test_the_trace_holds_every_event_and_threads_do_not_overlap() -> None:
    rows = [row for row in json.loads(chrome_trace(SIMULATION))["traceEvents"] if row["ph"] == "X"]
    assert len(rows) == len(SIMULATION.events)
    assert max(row["ts"] + row["dur"] for row in rows) == pytest.approx(SIMULATION.time_s * 1e6)
    sends = [row for row in rows if row["cat"] == "send"]
    assert sum(row["args"]["bytes"] for row in sends) == sum(e.num_bytes for e in SIMULATION.events)
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows:
        by_thread.setdefault((row["pid"], row["tid"]), []).append((row["ts"], row["ts"] + row["dur"]))
    for spans in by_thread.values():
        spans.sort()
        assert all(before[1] <= after[0] + 1e-3 for before, after in pairwise(spans))


def test_a_picture_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="wider than 128 pixels, got 100"):
        timeline_svg(SIMULATION, width=100)
