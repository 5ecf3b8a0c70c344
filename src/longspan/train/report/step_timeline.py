"""The timeline of one profiled step: for each rank what its host did when, from the profile's named ranges."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from longspan.train.markup import Child, Raw, tag
from longspan.train.report.data import ReportData, Row
from longspan.train.report.figures import figures_of, legend, nothing
from longspan.train.report.tables import folded, table
from longspan.train.svg import svg, text_width, ticks

MOST_RANKS = 16
_MOST_BOXES = 400  # of one rank
_ROW, _GAP = 26.0, 6.0
_STYLES = {
    "data": "s4",
    "forward": "s0",
    "backward": "s1",
    "gradient sums": "s7",
    "gradient norm": "s7",
    "optimizer": "s2",
    "agreement": "s5",
    "checkpoint": "s6",
    "evaluation": "s3",
}


def step(data: ReportData) -> Child:
    """The section: a typical profiled step drawn, and the mean of all profiled steps as a table."""
    if not data.ranges:
        return nothing("no step was profiled; with --profile, some are")
    steps = [row for row in data.ranges if row["name"] == "step"]
    if not steps:
        return nothing("the profile has ranges and no step around them")
    ranks = sorted({row["rank"] for row in steps})
    number = _typical([row for row in steps if row["rank"] == ranks[0]])
    several = sorted({row["step"] for row in steps})
    words = f"Step {number}"
    words += f", of the profiled steps {', '.join(map(str, several))} the one of median length" if several[1:] else ""
    words += (
        ", as the host of each rank saw it: from its own beginning of the step, gaps being what has no name. A range "
        "has the time spent waiting for other ranks in it. "
    )
    words += "On a GPU kernels run on behind the host; the trace in profile/ has both."
    if len(ranks) > MOST_RANKS:
        words += f" The first {MOST_RANKS} of {len(ranks)} ranks are drawn."
    shown = [row for row in data.ranges if row["step"] == number and row["rank"] in ranks[:MOST_RANKS]]
    names = [name for name in _STYLES if any(row["name"] == name for row in shown)]
    styles = dict.fromkeys(_STYLES[name] for name in names)
    return [
        tag("p", words, class_="caption"),
        figures_of(lambda width, uid: _draw(shown, number, width, uid), "step-time"),
        legend([(style, ", ".join(name for name in names if _STYLES[name] == style), "") for style in styles]),
        table(f"Mean time of a profiled step, in ms ({len(several)} steps).", *_means(data.ranges, ranks)),
        folded("Ranges as a table", table("Named ranges, in ms.", data.ranges, _COLUMNS, most=600)),
    ]


_COLUMNS = ("rank", "step", "name", "start_ms", "duration_ms")


def _typical(steps: Sequence[Row]) -> int:
    middle = statistics.median_low([row["duration_ms"] for row in steps])
    return next(row["step"] for row in steps if row["duration_ms"] == middle)


def _means(ranges: Sequence[Row], ranks: Sequence[int]) -> tuple[list[Row], list[str]]:
    names = [name for name in _STYLES if any(row["name"] == name for row in ranges)]
    rows: list[Row] = []
    for rank in ranks:
        own = [row for row in ranges if row["rank"] == rank]
        whole = [row["duration_ms"] for row in own if row["name"] == "step"]
        sums = {name: sum(row["duration_ms"] for row in own if row["name"] == name) for name in names}
        means = {name: round(total / len(whole), 2) for name, total in sums.items()}
        rest = round((sum(whole) - sum(sums.values())) / len(whole), 2)
        rows.append({"rank": rank, "whole step": round(sum(whole) / len(whole), 2), **means, "without a name": rest})
    return rows, ["rank", "whole step", *names, "without a name"]


def _draw(shown: Sequence[Row], number: int, width: float, uid: str) -> Raw:
    begins = {row["rank"]: row["start_ms"] for row in shown if row["name"] == "step"}
    longest = max(row["duration_ms"] for row in shown if row["name"] == "step") or 1.0
    left = max(text_width(f"rank {rank}") for rank in begins) + 8
    scale = (width - left - 8) / longest
    parts: list[Raw] = []
    y = 2.0
    for rank in sorted(begins):
        whole = next(row for row in shown if row["rank"] == rank and row["name"] == "step")
        parts.append(tag("text", f"rank {rank}", x=left - 8, y=y + 17, class_="soft", text_anchor="end"))
        long = whole["duration_ms"] * scale
        parts.append(tag("rect", x=left, y=y, width=max(long, 1.0), height=_ROW, class_="track"))
        own = [row for row in shown if row["rank"] == rank and row["name"] in _STYLES]
        parts += [_box(row, left + (row["start_ms"] - begins[rank]) * scale, y, scale) for row in own[:_MOST_BOXES]]
        y += _ROW + _GAP
    for mark in ticks(0.0, longest, max(3, int((width - left) // 90))):
        x, label = left + mark * scale, f"{mark:g}"
        anchor = "end" if x + text_width(label) / 2 > width else "middle"
        parts.append(tag("line", x1=x, x2=x, y1=y, y2=y + 5, class_="axis"))
        parts.append(tag("text", label, x=x, y=y + 19, class_="soft", text_anchor=anchor))
    parts.append(tag("line", x1=left, x2=width - 8, y1=y, y2=y, class_="axis"))
    parts.append(tag("text", "time, ms", x=left, y=y + 36, class_="soft"))
    title = f"Timeline of step {number} by rank"
    described = f"{len(begins)} ranks, {len(shown)} named ranges over {longest:.4g} ms; means are in the table."
    return svg(width, y + 42, title, described, uid, parts)


def _box(row: Row, x: float, y: float, scale: float) -> Raw:
    width = row["duration_ms"] * scale
    tip = tag("title", f"rank {row['rank']}, {row['name']}: {row['duration_ms']:.4g} ms")
    parts = [tag("rect", tip, x=x, y=y, width=max(width - 0.5, 0.5), height=_ROW, rx=2, class_="held")]
    if text_width(row["name"], 11) + 6 <= width:
        parts.append(tag("text", row["name"], x=x + width / 2, y=y + 17, class_="owner", text_anchor="middle"))
    return tag("g", parts, class_=_STYLES[row["name"]])
