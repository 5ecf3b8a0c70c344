"""Line charts as SVG text: scales, round ticks, gaps where a value is missing, and marks where it is not finite.

Colours are CSS classes (`s0`, `s1`, ... for series; see report/style.py): one drawing serves light and dark pages.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from longspan.train.markup import Child, Raw, join, tag

FONT = 12.0  # px, the size of every text in the charts
_POINTS_PER_PIXEL = 1.0  # more points than this in a line are thinned to each bucket's extremes


def text_width(text: str, size: float = FONT) -> float:
    """A safe guess of the width of ``text`` in px: the page's font is not known here."""
    return 0.58 * size * len(text)


def svg(
    width: float, height: float, title: str, description: str, uid: str, *children: Child, **attributes: object
) -> Raw:
    """An accessible ``<svg>`` with title and description; ``uid`` is unique on the page."""
    return tag(
        "svg",
        tag("title", title, id=f"{uid}-t"),
        tag("desc", description, id=f"{uid}-d"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{uid}-t {uid}-d",
        **attributes,
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high].

    Raises:
        ValueError: the interval is not finite or is empty.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"an axis needs low < high, both finite, got [{low}, {high}]; widen the interval")
    power = 10.0 ** math.floor(math.log10((high - low) / max(most, 1)))
    for size in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = size * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [index * step for index in range(first, last + 1)]
    return []


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most about ``limit`` of the points: the lowest and highest of each run, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        run = range(start, min(start + size, len(points)))
        ends = {min(run, key=lambda i: points[i][1]), max(run, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line or cloud of dots; a y of None is a gap, a y that is not finite is marked on the chart's top edge."""

    label: str
    points: Sequence[tuple[float, float | None]]
    style: str = "s0"  # CSS class
    kind: Literal["line", "dots"] = "line"
    faint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A line chart: what to draw, not how large.

    ``spans`` are (first x, last x, label) of a property that changes in steps, drawn as a strip above the lines.
    """

    title: str
    description: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    y_text: Callable[[float], str]
    spans: Sequence[tuple[float, float, str]] = ()
    span_label: str = ""
    from_zero: bool = False
    y_base: float = 1.0  # ticks are round in this unit: 1024 ** 2 for values in bytes shown as MiB


def line_chart(chart: Chart, width: float, height: float, uid: str) -> Raw:
    """Draws the chart at a size in px; ``uid`` is unique on the page. Without a finite point it says so."""
    values = [(x, y) for series in chart.series for x, y in series.points if y is not None and math.isfinite(y)]
    if not values:
        empty = tag("text", "no finite values to draw", x=width / 2, y=40, class_="soft", text_anchor="middle")
        return svg(width, 72, chart.title, chart.description, uid, empty)
    low_x, high_x = _padded(min(x for x, _ in values), max(x for x, _ in values), 0)
    if chart.spans:
        low_x, high_x = min(low_x, chart.spans[0][0]), max(high_x, chart.spans[-1][1])
    low_y, high_y = _padded(min(y for _, y in values), max(y for _, y in values), 0.05)
    if chart.from_zero:
        low_y = min(0.0, low_y) if min(y for _, y in values) < 0 else 0.0
    most = max(3, int(height // 44))
    y_ticks = [tick * chart.y_base for tick in ticks(low_y / chart.y_base, high_y / chart.y_base, most)]
    left = max(text_width(chart.y_text(tick)) for tick in y_ticks or [low_y]) + 12
    top, bottom = (62.0 if chart.spans else 30.0), 42.0
    plot_width, plot_height = width - left - 14, height - top - bottom

    def at_x(x: float) -> float:
        return left + (x - low_x) / (high_x - low_x) * plot_width

    def at_y(y: float) -> float:
        return top + (high_y - y) / (high_y - low_y) * plot_height

    parts: list[Raw] = [tag("text", chart.y_label, x=0, y=14, class_="soft")]
    parts += _spans(chart, at_x, top, top + plot_height)
    for tick in y_ticks:
        parts.append(tag("line", x1=left, x2=left + plot_width, y1=at_y(tick), y2=at_y(tick), class_="grid"))
        parts.append(tag("text", chart.y_text(tick), x=left - 8, y=at_y(tick) + 4, class_="soft", text_anchor="end"))
    x_ticks = [tick for tick in ticks(low_x, high_x, max(3, int(plot_width // 90))) if tick == int(tick)]
    for tick in x_ticks:
        x, half = at_x(tick), text_width(f"{tick:,.0f}") / 2
        anchor, x_text = ("end", width) if x + half > width else ("middle", x)
        parts.append(tag("line", x1=x, x2=x, y1=top + plot_height, y2=top + plot_height + 5, class_="axis"))
        parts.append(tag("text", f"{tick:,.0f}", x=x_text, y=top + plot_height + 19, class_="soft", text_anchor=anchor))
    base = top + plot_height
    parts.append(tag("line", x1=left, x2=left + plot_width, y1=base, y2=base, class_="axis"))
    parts.append(tag("text", chart.x_label, x=left + plot_width / 2, y=height - 5, class_="soft", text_anchor="middle"))
    parts += [_series(series, at_x, at_y, top, int(plot_width * _POINTS_PER_PIXEL)) for series in chart.series]
    return svg(width, height, chart.title, chart.description, uid, parts, data_hover=_hover(chart, at_x, top, base))


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def _spans(chart: Chart, at_x: Callable[[float], float], top: float, bottom: float) -> list[Raw]:
    """The strip of steps above the plot, with a hairline down at each change."""
    if not chart.spans:
        return []
    parts = []
    y, height = top - 30.0, 20.0
    for index, (first, last, label) in enumerate(chart.spans):
        x, width = at_x(first), at_x(last) - at_x(first)
        tip = tag("title", f"{chart.span_label} {label} from step {first:,.0f}")
        weight = 0.12 + 0.38 * (index + 1) / len(chart.spans)
        parts.append(
            tag("rect", tip, x=x, y=y, width=max(width - 1, 0.5), height=height, class_="span", fill_opacity=weight)
        )
        if text_width(label, 11) + 6 <= width:
            parts.append(tag("text", label, x=x + width / 2, y=y + 14, class_="small", text_anchor="middle"))
        if index:
            parts.append(tag("line", x1=x, x2=x, y1=y + height, y2=bottom, class_="change"))
    return parts


def _series(
    series: Series, at_x: Callable[[float], float], at_y: Callable[[float], float], top: float, limit: int
) -> Raw:
    lost = [at_x(x) for x, y in series.points if y is not None and not math.isfinite(y)]
    marks = [tag("path", d=f"M{x - 4:.1f} {top - 4:.1f}l8 8m0 -8l-8 8", class_="lost") for x in lost[:200]]
    if series.kind == "dots":
        dots = [
            tag("circle", tag("title", f"{series.label}: {y:.6g} at {x:,.0f}"), cx=at_x(x), cy=at_y(y), r=4.0)
            for x, y in series.points
            if y is not None and math.isfinite(y)
        ]
        return tag("g", dots, marks, class_=f"dots {series.style}")
    runs = itertools.groupby(series.points, key=lambda point: point[1] is not None and math.isfinite(point[1]))
    commands = []
    for finite, group in runs:
        if not finite:
            continue
        run = [(x, y) for x, y in group if y is not None]
        pixels = [(at_x(x), at_y(y)) for x, y in thin(run, max(limit, 8))]
        if len(pixels) == 1:
            pixels.append((pixels[0][0] + 0.1, pixels[0][1]))  # a round cap makes a lone point a visible dot
        commands.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels))
    line = tag("path", d="".join(commands), class_=f"line {series.style}{' faint' if series.faint else ''}")
    return join([line, marks])


def _hover(chart: Chart, at_x: Callable[[float], float], top: float, bottom: float) -> str | None:
    """What the page's small script shows under the pointer: pixels and ready texts, so that it computes nothing."""
    lines = [series for series in chart.series if series.kind == "line"]
    if not lines:
        return None
    every = max(1, len(lines[0].points) // 400)
    texts: dict[float, list[str]] = {}
    for series in lines:
        for x, y in list(series.points)[::every]:
            value = "none" if y is None else chart.y_text(y) if math.isfinite(y) else "not finite"
            texts.setdefault(x, []).append(f"{series.label} {value}" if len(lines) > 1 else value)
    rows = [[round(at_x(x), 1), f"{chart.x_label} {x:,.0f}: " + ", ".join(text)] for x, text in sorted(texts.items())]
    return json.dumps({"top": top, "bottom": bottom, "rows": rows}, separators=(",", ":"))
