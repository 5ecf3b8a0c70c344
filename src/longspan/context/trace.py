"""A simulation drawn: a timeline as SVG for documents, and a trace for Perfetto or Chrome (``ui.perfetto.dev``).

Both show, for every rank, a line of what it does (computing, packing, merging, waiting) and a line of what it sends.
"""

from __future__ import annotations

import json
from xml.sax.saxutils import escape

from longspan.context.simulate import Event, Simulation

COLOURS = {"compute": "#4477aa", "pack": "#ccbb44", "merge": "#228833", "wait": "#ee6677", "send": "#66ccee"}
_MARGIN, _AXIS = 64, 28  # pixels left of the lines, and below them
_LINE, _GAP = 14, 6


def _text(event: Event) -> str:
    """What an event is, in words."""
    times = f"{event.start_s * 1e3:.3f}-{event.stop_s * 1e3:.3f} ms"
    if event.kind == "send":
        return f"step {event.step}: {event.label} to rank {event.peer}, {event.num_bytes:,} bytes, {times}"
    return f"step {event.step}: {event.kind}, {times}"


def _rows(events: list[Event]) -> list[tuple[Event, int]]:
    """Events with the first row that is free when they start, so that sends at one time do not cover each other."""
    ends: list[float] = []
    placed = []
    for event in sorted(events, key=lambda e: (e.start_s, e.stop_s, e.peer)):
        row = next((i for i, end in enumerate(ends) if end <= event.start_s + 1e-12), len(ends))
        ends[row : row + 1] = [event.stop_s]
        placed.append((event, row))
    return placed


def timeline_svg(simulation: Simulation, *, width: int = 960, max_send_rows: int = 4) -> str:
    """The timeline as a standalone SVG document; hover for details.

    Args:
        simulation: any.
        width: of the picture, in pixels.
        max_send_rows: rows for the sends of a rank that are under way at once; further ones share the last row.

    Raises:
        ValueError: the width leaves no room beside the margin.
    """
    if width <= 2 * _MARGIN:
        raise ValueError(f"a timeline must be wider than {2 * _MARGIN} pixels, got {width}; 960 is usual")
    scale = (width - _MARGIN - 8) / max(simulation.time_s, 1e-12)
    shapes: list[str] = []
    top = 24.0
    for rank in range(len(simulation.compute_s)):
        own = [event for event in simulation.events if event.rank == rank]
        lines = [(event, 0) for event in own if event.kind != "send"]
        sends = _rows([event for event in own if event.kind == "send"])
        num_rows = min(max((row for _, row in sends), default=-1) + 1, max_send_rows)
        shapes.append(f'<text x="4" y="{top + 11:.0f}">rank {rank}</text>')
        for event, row in lines + [(event, 1 + min(row, max_send_rows - 1)) for event, row in sends]:
            height = _LINE if row == 0 else _LINE / 2
            y = top if row == 0 else top + _LINE + 1 + (row - 1) * (_LINE / 2 + 1)
            x, size = _MARGIN + event.start_s * scale, max((event.stop_s - event.start_s) * scale, 0.3)
            shapes.append(
                f'<rect x="{x:.2f}" y="{y:.1f}" width="{size:.2f}" height="{height:.1f}" '
                f'fill="{COLOURS[event.kind]}"><title>{escape(_text(event))}</title></rect>'
            )
        top += _LINE + 1 + num_rows * (_LINE / 2 + 1) + _GAP
    for tick in range(5):
        x = _MARGIN + tick / 4 * simulation.time_s * scale
        shapes.append(f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{top:.0f}" stroke="#ddd"/>')
        shapes.append(f'<text x="{x:.1f}" y="{top + 12:.0f}">{tick / 4 * simulation.time_s * 1e3:.3g} ms</text>')
    legend = "".join(
        f'<rect x="{_MARGIN + 90 * i}" y="4" width="10" height="10" fill="{colour}"/>'
        f'<text x="{_MARGIN + 90 * i + 14}" y="13">{kind}</text>'
        for i, (kind, colour) in enumerate(COLOURS.items())
    )
    title = escape(f"{simulation.name} on {simulation.topology}: {simulation.time_s * 1e3:.3g} ms")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + _AXIS:.0f}" '
        f'font-family="sans-serif" font-size="10"><title>{title}</title>{legend}{"".join(shapes)}</svg>\n'
    )


def chrome_trace(simulation: Simulation) -> str:
    """The trace event format (JSON) that Perfetto and Chrome open: a process per rank, times in microseconds."""
    rows: list[dict[str, object]] = []
    for rank in range(len(simulation.compute_s)):
        rows.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        rows.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "device"}})
        own = [event for event in simulation.events if event.rank == rank]
        sends = _rows([event for event in own if event.kind == "send"])
        for row in sorted({row for _, row in sends}):
            rows.append(
                {"ph": "M", "name": "thread_name", "pid": rank, "tid": 1 + row, "args": {"name": f"sends {row}"}}
            )
        for event, thread in [(e, 0) for e in own if e.kind != "send"] + [(event, 1 + row) for event, row in sends]:
            args: dict[str, object] = {"step": event.step}
            name = event.kind
            if event.kind == "send":
                name = f"{event.label} to {event.peer}"
                args |= {"bytes": event.num_bytes, "peer": event.peer}
            rows.append(
                {
                    "ph": "X",
                    "name": name,
                    "cat": event.kind,
                    "pid": rank,
                    "tid": thread,
                    "ts": event.start_s * 1e6,
                    "dur": (event.stop_s - event.start_s) * 1e6,
                    "args": args,
                }
            )
    head = {"schedule": simulation.name, "topology": simulation.topology}
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms", "otherData": head})
