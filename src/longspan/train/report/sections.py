"""The sections of the report, one function each: `ReportData` in, markup of the section's body out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TypeGuard

from longspan.train.markup import Child, Raw, tag
from longspan.train.report.data import ReportData, Row
from longspan.train.report.figures import WIDE, figures_of, nothing
from longspan.train.report.ownership import magnified, num_held, ownership_strips
from longspan.train.report.plan_picture import MOST_RANKS as MOST_BOXES
from longspan.train.report.plan_picture import SHARED, plan_picture
from longspan.train.report.tables import folded, table
from longspan.train.report.tables import value as cell
from longspan.train.report.timeline import MOST_RANKS, draw_timeline


def headline(data: ReportData) -> Child:
    if not data.headline:
        return nothing("no held-out evaluation was made")
    groups = []
    top = max((v for row in data.headline for v in _figures(row).values() if _finite(v)), default=1.0) or 1.0
    for row in data.headline:
        bars = []
        for name, figure in _figures(row).items():
            share = f"width:{100 * figure / top:.1f}%" if _finite(figure) else "width:0"
            track = tag("div", tag("i", style=share), aria_hidden="true")
            label, number = tag("span", name), tag("span", cell(figure, lambda v: f"{v:.3f}"))
            bars.append(tag("div", label, track, number, class_="bar model" if name == "model" else "bar"))
        model = row["model"]
        big = f"{model:.2f}" if _finite(model) else "–"
        unit = f"bits per byte at {row['context']:,} context"
        groups.append(tag("div", tag("h3", tag("b", big), tag("span", unit)), bars))
    sentences = [tag("p", verdict(row)) for row in data.headline]
    rows = [{"context": row["context"], **_figures(row)} for row in data.headline]
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbers = folded("The same as a table", table("Held-out bits per byte; lower is better.", rows, names))
    return [tag("div", groups, class_="bars"), sentences, numbers]


def verdict(row: Row) -> str:
    """Who needs the fewest bits, in one sentence that does not flatter the model."""
    opening = f"At {row['context']:,} tokens of context the model "
    model = row["model"]
    if model is None:
        return opening + "was not measured."
    if not _finite(model):
        return opening + "has no finite figure: it has not learned, or the evaluation failed."
    better, worse, level = [], [], []
    for name, other in _figures(row).items():
        if name == "model" or not _finite(other):
            continue
        gap = round(other, 3) - round(model, 3)
        text = f"{name} by {abs(gap):.3f}"
        (level if abs(gap) < 5e-4 else better if gap > 0 else worse).append(name if abs(gap) < 5e-4 else text)
    clauses = []
    if better:
        clauses.append("beats " + " and ".join(better))
    if level:
        clauses.append("is level with " + " and ".join(level))
    if worse:
        clauses.append("loses to " + " and ".join(worse))
    absent = [name for name, other in _figures(row).items() if name != "model" and not _finite(other)]
    if not clauses:
        clauses.append(f"needs {model:.3f} bits per byte; there is no baseline to compare it with")
    tail = f" ({' and '.join(absent)} not measured)" if absent else ""
    unit = " bits per byte" if better or worse else ""
    return opening + ", and ".join(clauses) + unit + tail + "."


def plan(data: ReportData) -> Child:
    """What each rank holds, drawn where ranks and axes are given; and the plan as it was resolved."""
    raw = settings(data.plan, "Show the plan as JSON", "no plan was given")
    if not data.axes or not data.ranks:
        return [nothing("no axes and ranks were given"), raw if data.plan else None]
    sizes = " × ".join(f"{name} {size}" for name, size in data.axes.items())
    several = [SHARED[name] for name, size in data.axes.items() if size > 1 and name in SHARED]
    words = f"{sizes}: " + (", ".join(several) + "." if several else "one rank has everything.")
    words += " Ranks in one frame work on the same rows. Parameters are those that a rank keeps between steps."
    if len(data.ranks) > MOST_BOXES:
        words += f" The first {MOST_BOXES} of {len(data.ranks):,} ranks are drawn; the table has all."
    totals: Row = {"parameters": data.num_parameters, "tokens": data.num_tokens}

    def draw(width: float, uid: str) -> Raw:
        return plan_picture(data.ranks, data.axes, width, uid, totals=totals)

    columns = ("rank", *data.axes, "layers", "parameters", "tokens", "memory_bytes")
    return [
        tag("p", words, class_="caption"),
        figures_of(draw, "plan-picture"),
        folded("The same as a table", table("What each rank holds.", data.ranks, columns)),
        raw if data.plan else None,
    ]


def ownership(data: ReportData) -> Child:
    if not data.ownership or data.num_tokens < 1:
        return nothing("no layout was given")

    def draw(width: float, uid: str) -> Raw:
        return ownership_strips(data.ownership, data.num_tokens, width, uid, data.layout)

    held = sum(num_held(segments) for segments in data.ownership)
    words = f"One sequence of {data.num_tokens:,} tokens, split over {len(data.ownership)} ranks"
    words += f" by the {data.layout} layout." if data.layout else "."
    words += " Numbers on the right are tokens held."
    if magnified(data.ownership, data.num_tokens, WIDE):
        words += " Hatched: single tokens at a fixed stride, too thin to draw; the lowest strip magnifies the pattern."
    warning = None
    if held != data.num_tokens:
        text = f"The ranks hold {held:,} tokens together, but the sequence has {data.num_tokens:,}: "
        text += "some are held twice or by no rank."
        warning = tag("p", text, class_="warn")
    rows = [
        {"rank": rank, "from": start, "below": stop, "stride": step, "tokens": len(range(start, stop, step))}
        for rank, segments in enumerate(data.ownership)
        for start, stop, step in segments
    ]
    columns = ("rank", "from", "below", "stride", "tokens")
    return [
        tag("p", words, class_="caption"),
        warning,
        figures_of(draw, "own"),
        folded("Segments as a table", table("Segments in global positions.", rows, columns)),
    ]


def timeline(data: ReportData) -> Child:
    if not data.timeline:
        return nothing("no schedule was simulated or traced")
    ranks = sorted({row["rank"] for row in data.timeline})
    words = (
        f"{data.schedule or 'One schedule'} on {len(ranks)} ranks. Filled boxes are attention blocks with their number "
    )
    words += "of allowed query–key pairs, dashed boxes are sends with their bytes, arrows end at the receiver. "
    words += f"Time is in {data.time_unit}."
    if len(ranks) > MOST_RANKS:
        words += f" The first {MOST_RANKS} ranks are drawn; the tables hold all."
    drawing = draw_timeline(data.timeline, data.time_unit, data.schedule, WIDE, "time")
    events = sorted(data.timeline, key=lambda row: (row["start"], row["rank"]))
    columns = ("start", "duration", "rank", "step", "kind", "lane", "label", "area", "bytes", "peer")
    return [
        tag("p", words, class_="caption"),
        tag("figure", drawing, class_="gantt"),
        table(f"Totals by rank, times in {data.time_unit}.", _totals(data.timeline), _TOTALS),
        folded("Blocks and moves as a table", table("Blocks and moves in order of time.", events, columns, most=600)),
    ]


_TOTALS = ("rank", "blocks", "compute", "idle", "area", "moves", "bytes")


def _totals(timeline: Sequence[Row]) -> list[Row]:
    end = max(row["start"] + row["duration"] for row in timeline) - min(row["start"] for row in timeline)
    rows = []
    for rank in sorted({row["rank"] for row in timeline}):
        blocks = [row for row in timeline if row["rank"] == rank and row["kind"] == "compute"]
        moves = [row for row in timeline if row["rank"] == rank and row["kind"] == "send"]
        busy = sum(row["duration"] for row in blocks)
        rows.append(
            {
                "rank": rank,
                "blocks": len(blocks),
                "compute": float(f"{busy:.6g}"),
                "idle": f"{100 * (1 - busy / end):.0f} %" if end > 0 else "–",
                "area": sum(row["area"] for row in blocks)
                if all(row.get("area") is not None for row in blocks)
                else None,
                "moves": len(moves),
                "bytes": sum(row.get("bytes") or 0 for row in moves),
            }
        )
    return rows


def sample(data: ReportData) -> Child:
    if not data.completion and not data.prompt:
        return nothing("no completion was sampled")
    text = tag("pre", tag("span", data.prompt, class_="prompt"), tag("b", data.completion))
    words = "The prompt is grey, what the model wrote is bold. Control characters are shown as symbols."
    return [tag("p", words, class_="caption"), text]


def settings(values: Row, summary: str, absent: str) -> Child:
    if not values:
        return nothing(absent)
    return folded(summary, tag("pre", json.dumps(values, indent=2, ensure_ascii=False)))


def hardware(data: ReportData) -> Child:
    pairs = [*data.hardware.items(), *data.versions.items()]
    if not pairs:
        return nothing("no hardware or versions were given")
    items = [
        [tag("dt", str(key)), tag("dd", value if isinstance(value, str) else json.dumps(value))] for key, value in pairs
    ]
    return tag("dl", items, class_="pairs")


def _figures(row: Row) -> dict[str, float | None]:
    return {"model": row["model"], **{name: v for name, v in row.items() if name not in ("context", "model")}}


def _finite(number: float | None) -> TypeGuard[float]:
    return number is not None and math.isfinite(number)
