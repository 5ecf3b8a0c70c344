"""The plan as a picture: a box for each rank, framed by those that share what its inner axes do not split.

A frame holds the ranks of one pipeline stage that draw the same rows; in it are the ranks that share each sequence
(context) and every weight (tensor). A box has the colour of its context rank, as in "Who holds which tokens".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from longspan.train.markup import Raw, join, tag
from longspan.train.report.data import Row
from longspan.train.svg import svg, text_width
from longspan.train.units import bytes_text, count

MOST_RANKS = 64  # further ranks are not drawn; the caption and the table say so
_OUTER, _INNER = ("pipeline", "data", "expert"), ("context", "tensor")
SHARED = {
    "pipeline": "pipeline ranks share the layers",
    "data": "data ranks draw different rows",
    "expert": "expert ranks share the experts and draw different rows",
    "context": "context ranks share each sequence",
    "tensor": "tensor ranks share every weight",
}
_GAP, _PAD, _HEAD, _LINE = 8.0, 10.0, 26.0, 16.0


def plan_picture(ranks: Sequence[Row], axes: Mapping[str, int], width: float, uid: str, *, totals: Row) -> Raw:
    """The picture, ``width`` px wide.

    Args:
        ranks: with their coordinates by axis, and any of ``layers``, ``parameters``, ``tokens``, ``memory_bytes``.
        axes: sizes of the axes in use.
        totals: ``parameters`` of the model and ``tokens`` of a sequence, for "of ..."; may lack either.
    """
    drawn = list(ranks)[:MOST_RANKS]
    texts = {row["rank"]: _lines(row, axes, totals) for row in drawn}
    longest = max(text_width(line, 11) for lines in texts.values() for line in lines)
    inside = width - 2 * _PAD
    columns = max(1, int((inside + _GAP) // (longest + 20 + _GAP)))
    frames: dict[tuple[int, ...], list[Row]] = {}
    for row in drawn:
        frames.setdefault(tuple(row.get(axis, 0) for axis in _OUTER), []).append(row)
    columns = min(columns, max(len(held) for held in frames.values()))
    box = min((inside + _GAP) / columns - _GAP, 260.0)
    height = 26 + _LINE * max(len(lines) for lines in texts.values())
    # Frames of few boxes stand beside each other.
    frame = columns * (box + _GAP) - _GAP + 2 * _PAD
    beside = max(1, int((width + _GAP) // (frame + _GAP)))
    parts: list[Raw] = []
    y = 0.0
    order = sorted(frames.items())
    for first in range(0, len(order), beside):
        lowest = 0.0
        for place, (outer, held) in enumerate(order[first : first + beside]):
            x = place * (frame + _GAP)
            lines = math.ceil(len(held) / columns)
            tall = _HEAD + lines * (height + _GAP) - _GAP + _PAD
            parts.append(tag("rect", x=x, y=y, width=frame, height=tall, rx=6, class_="track"))
            parts.append(tag("text", _frame_name(outer, axes), x=x + _PAD, y=y + 17, class_="soft small"))
            for index, row in enumerate(held):
                at = x + _PAD + index % columns * (box + _GAP), y + _HEAD + index // columns * (height + _GAP)
                parts.append(_box(row, texts[row["rank"]], *at, box, height))
            lowest = max(lowest, tall)
        y += lowest + _GAP
    words = "; ".join(f"rank {row['rank']}: {', '.join(texts[row['rank']])}" for row in drawn)
    total = " × ".join(f"{name} {size}" for name, size in axes.items())
    return svg(width, y - _GAP + 1, f"The plan: {total}", words + ".", uid, parts)


def _frame_name(outer: tuple[int, ...], axes: Mapping[str, int]) -> str:
    named = [f"{axis} {place}" for axis, place in zip(_OUTER, outer, strict=True) if axes.get(axis, 1) > 1]
    return ", ".join(named) or "all ranks draw the same rows"


def _lines(row: Row, axes: Mapping[str, int], totals: Row) -> list[str]:
    place = [f"{axis} {row[axis]}" for axis in _INNER if axes.get(axis, 1) > 1 and axis in row]
    lines = [", ".join(place)] if place else []
    if row.get("layers") is not None:
        lines.append(f"layers: {row['layers']}")
    for key, text in (("parameters", count), ("tokens", lambda number: f"{number:,}")):
        if row.get(key) is not None:
            whole = f" of {text(totals[key])}" if totals.get(key) else ""
            lines.append(f"{key}: {text(row[key])}{whole}")
    if row.get("memory_bytes") is not None:
        lines.append(f"peak memory: {bytes_text(row['memory_bytes'])}")
    return lines or ["nothing recorded"]


def _box(row: Row, lines: list[str], x: float, y: float, width: float, height: float) -> Raw:
    colour = f"r{int(row.get('context', 0)) % 8}"
    tip = tag("title", f"rank {row['rank']}: {', '.join(lines)}")
    title = f"rank {row['rank']}" + (f", {row['device']}" if row.get("device") else "")
    texts = [tag("text", title, x=x + 10, y=y + 17, class_="strong")]
    texts += [
        tag("text", line, x=x + 10, y=y + 17 + _LINE * index, class_="small") for index, line in enumerate(lines, 1)
    ]
    rect = tag("rect", tip, x=x, y=y, width=width, height=height, rx=4, class_="box")
    return tag("g", join([rect, *texts]), class_=colour)
