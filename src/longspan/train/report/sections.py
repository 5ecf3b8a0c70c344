"""The sections of the report, one function each: `ReportData` in, markup of the section's body out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

from longspan.train.markup import Child, Raw, join, tag
from longspan.train.report.data import ReportData, Row
from longspan.train.report.ownership import magnified, num_held, ownership_strips
from longspan.train.report.tables import folded, loss_text, table
from longspan.train.report.tables import value as cell
from longspan.train.report.timeline import MOST_RANKS, draw_timeline
from longspan.train.svg import Chart, Series, line_chart
from longspan.train.units import bytes_text, count

_WIDE, _NARROW = 880.0, 350.0
_SMOOTH_FROM = 80  # steps from which the loss gets a running mean beside the raw line


def nothing(what: str) -> Raw:
    return tag("p", f"Nothing was recorded here: {what}.", class_="caption")


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


def loss(data: ReportData) -> Child:
    if not data.steps:
        return nothing("no training step was finished")
    raw = [(row["step"], row.get("loss")) for row in data.steps]
    smooth = len(raw) >= _SMOOTH_FROM
    series = [Series(label="loss", points=raw, faint=smooth)]
    legend = [("s0", "training loss", "")]
    if smooth:
        window = max(3, len(raw) // 40 | 1)
        series.append(Series(label=f"mean of {window}", points=_running_mean(raw, window)))
        legend = [("s0", f"training loss: every step (thin) and the mean over {window} steps", "")]
    lengths = sorted({row["sequence_length"] for row in data.evals})
    for index, length in enumerate(lengths, 1):
        points = [(row["step"], row["loss"]) for row in data.evals if row["sequence_length"] == length]
        style = f"s{index % 8}"
        series.append(Series(label=f"held out at {length:,}", points=points, kind="dots", style=style))
        legend.append((style, f"held out at {length:,}", "dot"))
    spans = _spans(data.steps)
    chart = Chart(
        title="Loss by step",
        description=_first_and_last(raw, "loss")
        + (f" The sequence length takes {len(spans)} value(s)." if spans else ""),
        series=series,
        x_label="step",
        y_label="loss, nats per token",
        y_text=lambda y: f"{y:.3g}",
        spans=spans,
        span_label="sequence length",
    )
    lost = [str(step) for step, y in raw if y is not None and not math.isfinite(y)]
    warning = None
    if lost:
        named = ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else "")
        warning = tag(
            "p", f"The loss is not finite at {len(lost)} of {len(raw)} steps: {named} (marked ×).", class_="warn"
        )
    caption = (
        "The strip above the curve is the sequence length, which grows during training." if len(spans) > 1 else None
    )
    columns = (
        "step",
        "sequence_length",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_s",
        "memory_bytes",
        "time_s",
    )
    tables = [folded("Training steps as a table", table(_where(data, "Training steps."), data.steps, columns))]
    if data.evals:
        names = ("step", "sequence_length", "loss", "bits_per_byte")
        tables.append(folded("Held-out evaluations as a table", table("Held-out evaluations.", data.evals, names)))
    if data.events:
        tables.append(folded("Events as a table", table("Events.", data.events, ("step", "message", "time_s"))))
    note = tag("p", caption, class_="caption") if caption else None
    return [warning, _both(chart, 330, 260, "loss"), _legend(legend), note, tables]


def throughput(data: ReportData) -> Child:
    figures: list[Child] = []
    speed = [(row["step"], row["tokens_per_s"]) for row in data.steps if row.get("tokens_per_s") is not None]
    memory = [(row["step"], row["memory_bytes"]) for row in data.steps if row.get("memory_bytes") is not None]
    spans = _spans(data.steps)
    pairs: tuple[tuple[str, str, list, Callable[[float], str]], ...] = (
        ("speed", "tokens per second, all ranks", speed, count),
        ("memory", "peak memory of the fullest rank", memory, bytes_text),
    )
    for index, (name, label, points, text) in enumerate(pairs):
        if points:
            chart = Chart(
                title=f"{label[0].upper()}{label[1:]}, by step",
                description=_first_and_last(points, label),
                series=[Series(label=name, points=points, style=f"s{index}")],
                x_label="step",
                y_label=label,
                y_text=text,
                spans=spans,
                span_label="sequence length",
                from_zero=True,
                y_base=_binary_unit(points) if text is bytes_text else 1.0,
            )
            figures.append(_both(chart, 240, 220, name))
    if data.ranks:
        columns = ["rank", "device", "tokens", "mask_area", "tokens_per_s", "memory_bytes", "memory_limit_bytes"]
        columns += sorted({name for row in data.ranks for name in row} - set(columns))
        figures += [tag("h3", "By rank"), table("What each rank held and did.", data.ranks, columns)]
    return figures or nothing("no step and no rank was measured")


def ownership(data: ReportData) -> Child:
    if not data.ownership or data.num_tokens < 1:
        return nothing("no layout was given")

    def draw(width: float, uid: str) -> Raw:
        return ownership_strips(data.ownership, data.num_tokens, width, uid, data.layout)

    held = sum(num_held(segments) for segments in data.ownership)
    words = f"One sequence of {data.num_tokens:,} tokens, split over {len(data.ownership)} ranks"
    words += f" by the {data.layout} layout." if data.layout else "."
    words += " Numbers on the right are tokens held."
    if magnified(data.ownership, data.num_tokens, _WIDE):
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
        _figures_of(draw, "own"),
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
    drawing = draw_timeline(data.timeline, data.time_unit, data.schedule, _WIDE, "time")
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


def _spans(steps: Sequence[Row]) -> list[tuple[float, float, str]]:
    """Runs of equal sequence length as (first step, first step of the next run, text)."""
    spans: list[tuple[float, float, str]] = []
    for row in steps:
        length = row.get("sequence_length")
        if length is None:
            continue
        text, step = f"{length:,}", row["step"]
        if spans:
            first, _, label = spans[-1]
            spans[-1] = (first, step, label)
        if not spans or spans[-1][2] != text:
            spans.append((step, step, text))
    return spans


def _running_mean(points: Sequence[tuple[float, float | None]], window: int) -> list[tuple[float, float | None]]:
    """The mean of the ``window`` points around each one, fewer at the ends and at gaps: it does not lag."""
    half = window // 2
    means: list[tuple[float, float | None]] = []
    for index, (x, y) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = [v for _, v in points[index - reach : index + reach + 1] if v is not None and math.isfinite(v)]
        means.append((x, sum(near) / len(near) if y is not None and math.isfinite(y) else None))
    return means


def _binary_unit(points: Sequence[tuple[float, float]]) -> float:
    largest = max((y for _, y in points if math.isfinite(y)), default=1.0)
    return 1024.0 ** int(math.log(max(largest, 1.0), 1024))


def _first_and_last(points: Sequence[tuple[float, float | None]], name: str) -> str:
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not finite:
        return f"No finite value of {name}."
    (x0, y0), (x1, y1) = finite[0], finite[-1]
    return f"{name}: {loss_text(y0)} at step {x0:,}, {loss_text(y1)} at step {x1:,}."


def _where(data: ReportData, caption: str) -> str:
    return f"{caption} All records: {data.metrics_file}." if data.metrics_file else caption


def _legend(entries: Sequence[tuple[str, str, str]]) -> Raw:
    return tag(
        "ul",
        [tag("li", tag("i"), text, class_=f"{style} {kind}".strip()) for style, text, kind in entries],
        class_="legend",
    )


def _both(chart: Chart, high: float, low: float, uid: str) -> Raw:
    return _figures_of(lambda width, name: line_chart(chart, width, high if width == _WIDE else low, name), uid)


def _figures_of(draw: Callable[[float, str], Raw], uid: str) -> Raw:
    """One figure drawn at two widths, of which the page shows the fitting one: scaled-down text would be unreadable."""
    wide = tag("figure", draw(_WIDE, f"{uid}-wide"), class_="wide")
    return join([wide, tag("figure", draw(_NARROW, f"{uid}-narrow"), class_="narrow")])
