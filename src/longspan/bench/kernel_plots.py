"""Plots of the kernel benchmark: TFLOP/s against length for each mask, and against the share of blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from longspan.bench.record import Row
from longspan.train.markup import Raw, tag
from longspan.train.report.style import CSS
from longspan.train.svg import Chart, Series, line_chart, text_width

_WIDTH, _HEIGHT, _LEGEND = 720.0, 320.0, 22.0
_KINDS = ("forward", "backward")
_COLOURS = 8  # series that the style sheet tells apart; further ones are thin


def plots(rows: Sequence[Row]) -> dict[str, str]:
    """Standalone SVG documents by name. A mask at one length only, or one share of blocks, is no plot."""
    groups: dict[tuple[str, str], list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        if row["status"] != "ok":
            continue
        task, problem = row["cell"]["task"], row["cell"]["task"]["problem"]
        if task["block"] is None:
            groups[problem["mask"], "tokens"].append((problem["length"], row))
        else:
            name = f"{problem['mask']}_{task['block']}_{problem['length']}"
            groups[name, "% of blocks"].append((100 * task["ratio"], row))
    return {
        f"{name}_{kind}": _plot(name, x_label, kind, points)
        for (name, x_label), points in groups.items()
        if len({x for x, _ in points}) > 1
        for kind in _KINDS
    }


def _plot(name: str, x_label: str, kind: str, points: list[tuple[float, Row]]) -> str:
    lines: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    for x, row in sorted(points, key=lambda point: point[0]):
        lines[row["cell"]["kernel"]].append((x, row[f"{kind}_flop"] / row[f"{kind}_s"][1] / 1e12))
    series = [
        Series(label=label, points=line, style=f"s{number % _COLOURS}", faint=number >= _COLOURS)
        for number, (label, line) in enumerate(lines.items())
    ]
    chart = Chart(
        title=f"{name}, {kind}",
        description=f"TFLOP/s of the allowed pairs by {x_label}, {kind}, of {', '.join(lines)}",
        series=series,
        x_label=x_label,
        y_label=f"TFLOP/s, {kind}, {name}",
        y_text=lambda value: f"{value:g}",
        from_zero=True,
    )
    return _document(chart)


def _document(chart: Chart) -> str:
    """A chart with its legend above, as a file that opens by itself."""
    legend: list[Raw] = []
    x, y = 0.0, 14.0
    for series in chart.series:
        width = text_width(series.label) + 34
        if x + width > _WIDTH:
            x, y = 0.0, y + _LEGEND
        legend.append(tag("path", d=f"M{x:g} {y - 4:g}h14", class_=f"line {series.style}{' faint' * series.faint}"))
        legend.append(tag("text", series.label, x=x + 20, y=y, class_="soft"))
        x += width
    top = y + 12
    page = tag("rect", width=_WIDTH, height=_HEIGHT + top, style="fill:var(--page)")
    drawing = tag("g", line_chart(chart, _WIDTH, _HEIGHT, "plot"), transform=f"translate(0 {top:g})")
    size = {"viewBox": f"0 0 {_WIDTH:g} {_HEIGHT + top:g}", "width": _WIDTH, "height": _HEIGHT + top}
    return tag("svg", tag("style", CSS), page, legend, drawing, xmlns="http://www.w3.org/2000/svg", **size)
