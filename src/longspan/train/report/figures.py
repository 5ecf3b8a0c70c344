"""What the sections of the report share: drawings at two widths, legends, and the words for what is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from longspan.train.markup import Raw, join, tag
from longspan.train.report.data import Row
from longspan.train.report.tables import loss_text
from longspan.train.svg import Chart, line_chart

WIDE, NARROW = 880.0, 330.0  # px: a desktop's column and a phone's


def nothing(what: str) -> Raw:
    return tag("p", f"Nothing was recorded here: {what}.", class_="caption")


def figures_of(draw: Callable[[float, str], Raw], uid: str) -> Raw:
    """One figure drawn at two widths, of which the page shows the fitting one: scaled-down text would be unreadable."""
    wide = tag("figure", draw(WIDE, f"{uid}-wide"), class_="wide")
    return join([wide, tag("figure", draw(NARROW, f"{uid}-narrow"), class_="narrow")])


def chart_of(chart: Chart, high: float, low: float, uid: str) -> Raw:
    return figures_of(lambda width, name: line_chart(chart, width, high if width == WIDE else low, name), uid)


def legend(entries: Sequence[tuple[str, str, str]]) -> Raw:
    """(class of the colour, text, class of the mark) of each entry."""
    return tag(
        "ul",
        [tag("li", tag("i"), text, class_=f"{style} {kind}".strip()) for style, text, kind in entries],
        class_="legend",
    )


def spans(steps: Sequence[Row]) -> list[tuple[float, float, str]]:
    """Runs of equal sequence length as (first step, first step of the next run, text)."""
    found: list[tuple[float, float, str]] = []
    for row in steps:
        length = row.get("sequence_length")
        if length is None:
            continue
        text, step = f"{length:,}", row["step"]
        if found:
            first, _, label = found[-1]
            found[-1] = (first, step, label)
        if not found or found[-1][2] != text:
            found.append((step, step, text))
    return found


def first_and_last(points: Sequence[tuple[float, float | None]], name: str) -> str:
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not finite:
        return f"No finite value of {name}."
    (x0, y0), (x1, y1) = finite[0], finite[-1]
    return f"{name}: {loss_text(y0)} at step {x0:,}, {loss_text(y1)} at step {x1:,}."
