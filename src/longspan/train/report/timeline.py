"""The timeline of one attention schedule: compute and send rows for each rank, boxes for blocks, arrows for moves.

The row names are a drawing of their own, so that they stay in sight while a long schedule scrolls sideways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.train.markup import Raw, join, tag
from longspan.train.report.data import Row
from longspan.train.svg import svg, text_width, ticks
from longspan.train.units import bytes_text, count

_COMPUTE, _SEND, _GROUP_GAP, _TOP, _BOTTOM = 38.0, 20.0, 14.0, 24.0, 40.0
_LABELS = 116.0  # px of the row names
_LEAST_BOX = 46.0  # px the shortest block is given, so that its area can be read
_MOST_WIDTH = 3600.0
MOST_RANKS = 16  # further ranks are not drawn; the caption and the tables say so
_MOST_ARROWS = 400

_Lane = tuple[int, str, str]


def lanes(timeline: Sequence[Row]) -> list[_Lane]:
    """The rows (rank, kind, lane name), compute before send."""
    found = {(int(row["rank"]), str(row["kind"]), str(row.get("lane") or "")) for row in timeline}
    return sorted(found, key=lambda lane: (lane[0], lane[1] != "compute", lane[2]))


def draw_timeline(timeline: Sequence[Row], time_unit: str, schedule: str, width: float, uid: str) -> Raw:
    """The row names and the scrolling chart beside them.

    Args:
        timeline: as in `ReportData.timeline`, not empty.
        width: px for both together; the chart grows beyond it where boxes would be too narrow to read.
        uid: unique on the page.
    """
    shown = set(sorted({row["rank"] for row in timeline})[:MOST_RANKS])
    drawn = [row for row in timeline if row["rank"] in shown]
    rows, tops, y = lanes(drawn), {}, _TOP
    for index, lane in enumerate(rows):
        if index and rows[index - 1][0] != lane[0]:
            y += _GROUP_GAP
        tops[lane] = y
        y += _height(lane) + 4
    height = y + _BOTTOM
    begin = min(row["start"] for row in drawn)
    end = max(row["start"] + row["duration"] for row in drawn)
    length = (end - begin) or 1.0
    blocks = [row["duration"] for row in drawn if row["kind"] == "compute" and row["duration"] > 0]
    wanted = _LEAST_BOX * length / _typical_shortest(blocks) if blocks else 0.0
    plot = min(max(width - _LABELS, wanted + 24), _MOST_WIDTH) - 24

    def at(time: float) -> float:
        return 10 + (time - begin) / length * plot

    parts = _rounds(drawn, at, begin, end, y) + _bands(rows, tops, plot)
    sends = [row for row in drawn if row["kind"] == "send" and row.get("peer") is not None]
    parts += [_arrow(row, at, tops, rows) for row in sends[:_MOST_ARROWS] if _landing(row, rows) is not None]
    parts += [_box(row, at, tops[_lane(row)]) for row in drawn]  # over the arrows, or these would cross the texts
    parts += _time_axis(begin, end, at, y, time_unit, plot)
    title = f"Timeline of one attention schedule: {schedule or 'unnamed'}"
    words = f"{len(rows)} rows, {len(blocks)} blocks and {len(sends)} moves over {length:g} {time_unit}; listed below."
    chart = svg(plot + 24, height, title, words, uid, parts)
    scroll = tag(
        "div",
        chart,
        class_="scroll",
        style=f"--w:{plot + 24:.0f}",  # the print style shares the paper's width in this proportion
        tabindex=0,
        role="region",
        aria_label="timeline, scrolls sideways",
    )
    return join([_names(rows, tops, height, uid), scroll])


def _lane(row: Row) -> _Lane:
    return int(row["rank"]), str(row["kind"]), str(row.get("lane") or "")


def _height(lane: _Lane) -> float:
    return _COMPUTE if lane[1] == "compute" else _SEND


def _typical_shortest(durations: list[float]) -> float:
    """A low quartile: one tiny block should not stretch the whole drawing."""
    return sorted(durations)[len(durations) // 4]


def _names(rows: list[_Lane], tops: dict[_Lane, float], height: float, uid: str) -> Raw:
    parts = []
    for index, lane in enumerate(rows):
        middle = tops[lane] + _height(lane) / 2 + 4
        if not index or rows[index - 1][0] != lane[0]:
            parts.append(tag("text", f"rank {lane[0]}", x=0, y=middle, class_="strong"))
        name = lane[2] or lane[1]
        parts.append(tag("text", name, x=_LABELS - 8, y=middle, class_="soft", text_anchor="end"))
    return tag(
        "svg",
        parts,
        viewBox=f"0 0 {_LABELS:g} {height:g}",
        width=_LABELS,
        height=height,
        aria_hidden="true",
        style=f"--w:{_LABELS:g}",
        id=f"{uid}-names",
    )


def _bands(rows: list[_Lane], tops: dict[_Lane, float], plot: float) -> list[Raw]:
    return [tag("rect", x=10, y=tops[lane], width=plot, height=_height(lane), class_="track") for lane in rows]


def _rounds(drawn: Sequence[Row], at: Any, begin: float, end: float, bottom: float) -> list[Raw]:
    """A hairline and a name where each round begins on its first rank."""
    starts: dict[int, float] = {}
    for row in drawn:
        if row["kind"] == "compute":
            starts[row["step"]] = min(starts.get(row["step"], end), row["start"])
    parts, last = [], -1e9
    for step, start in sorted(starts.items(), key=lambda item: item[1]):
        x, label = at(start), f"round {step}"
        parts.append(tag("line", x1=x, x2=x, y1=_TOP - 6, y2=bottom, class_="change"))
        if x >= last + text_width(label, 11):
            parts.append(tag("text", label, x=x + 4, y=_TOP - 10, class_="small soft"))
            last = x
    return parts


def _box(row: Row, at: Any, top: float) -> Raw:
    x, width = at(row["start"]), max(at(row["start"] + row["duration"]) - at(row["start"]), 1.0)
    compute = row["kind"] == "compute"
    height = _COMPUTE if compute else _SEND
    area, num_bytes = row.get("area"), row.get("bytes")
    lines = [str(row["label"])]
    if compute and area is not None:
        lines.append(f"{count(area)} pairs")
    elif not compute and num_bytes is not None:
        to = f" to {row['peer']}" if row.get("peer") is not None else ""
        lines = [bytes_text(num_bytes) + to]
        if text_width(lines[0], 11) + 6 > width:
            lines = [bytes_text(num_bytes)]
    fitting = [line for line in lines if text_width(line, 11) + 6 <= width]
    tip = f"rank {row['rank']}, round {row['step']}: {row['label']}; from {row['start']:g} for {row['duration']:g}"
    if area is not None:
        tip += f"; {area:,} pairs"
    if num_bytes is not None:
        tip += f"; {bytes_text(num_bytes)}"
    if row.get("peer") is not None:
        tip += f" to rank {row['peer']}"
    first = top + height / 2 + 4 - 7 * (len(fitting) - 1)
    texts = [
        tag("text", line, x=x + width / 2, y=first + 14 * index, class_="small", text_anchor="middle")
        for index, line in enumerate(fitting)
    ]
    box = tag("rect", tag("title", tip), x=x + 0.5, y=top, width=max(width - 1, 0.5), height=height, rx=3, class_="box")
    return tag("g", box, texts, class_=f"r{int(row['rank']) % 8} {row['kind']}")


def _landing(row: Row, rows: list[_Lane]) -> _Lane | None:
    """The row where a move arrives: the receiver's first one."""
    return next((lane for lane in rows if lane[0] == row["peer"]), None)


def _arrow(row: Row, at: Any, tops: dict[_Lane, float], rows: list[_Lane]) -> Raw:
    """An elbow from the send's end to the receiver's row; the head is drawn by hand: markers take no colour."""
    target = _landing(row, rows)
    assert target is not None
    own, down = _lane(row), row["peer"] > row["rank"]
    far = abs(row["peer"] - row["rank"]) > 1
    x0 = at(row["start"] + row["duration"])
    x1 = x0 + (15 if not down else 11 if far else 7)  # beside each other, or one would hide the others
    y0 = tops[own] + _height(own) / 2
    y1 = tops[target] + (-1 if down else _height(target) + 1)
    way = 1 if down else -1
    return tag(
        "g",
        tag("path", d=f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1 - way * 6:.1f}", class_="arrow"),
        tag("path", d=f"M{x1:.1f} {y1:.1f}l-4 {-7 * way}h8z", class_="head"),
        class_=f"r{int(row['rank']) % 8}{' far' if far else ''}",
    )


def _time_axis(begin: float, end: float, at: Any, y: float, unit: str, plot: float) -> list[Raw]:
    parts = [tag("line", x1=10, x2=10 + plot, y1=y + 2, y2=y + 2, class_="axis")]
    marks = ticks(begin, end, max(3, int(plot // 80))) if end > begin else []
    for mark in marks:
        x, label = at(mark), f"{mark:g}"
        anchor = "end" if x + text_width(label) / 2 > plot + 20 else "start" if x <= 10.5 else "middle"
        parts.append(tag("line", x1=x, x2=x, y1=y + 2, y2=y + 7, class_="axis"))
        parts.append(tag("text", label, x=x, y=y + 20, class_="soft", text_anchor=anchor))
    parts.append(tag("text", f"time, {unit}", x=10, y=y + 37, class_="soft"))
    return parts
