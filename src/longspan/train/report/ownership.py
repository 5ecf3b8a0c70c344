"""Who holds which tokens: a strip of the global sequence for all ranks together and for each rank, coloured by owner.

Segments with a step (a striped layout) are drawn token by token while a token is wide enough to see; else as a
hatched run, and a magnified strip of the first tokens shows the pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.train.markup import Raw, join, tag
from longspan.train.svg import svg, text_width

Segment = tuple[int, int, int]
_ROW, _GAP = 24.0, 7.0
_LEAST_STRIPE = 2.0  # px; thinner single tokens would blur into one another
_MAGNIFIED = 32  # tokens in the magnified strip


def num_held(segments: Sequence[Segment]) -> int:
    """Tokens in the segments."""
    return sum(len(range(*segment)) for segment in segments)


def magnified(ownership: Sequence[Sequence[Segment]], num_tokens: int, plot_width: float) -> bool:
    """Whether some segment's single tokens are too thin to draw, so that the pattern needs a magnified strip."""
    steps = [segment[2] for segments in ownership for segment in segments]
    return any(step > 1 for step in steps) and plot_width / num_tokens < _LEAST_STRIPE


def ownership_strips(
    ownership: Sequence[Sequence[Segment]], num_tokens: int, width: float, uid: str, layout: str
) -> Raw:
    """Strips for all ranks and for each, ``width`` px wide; ``uid`` is unique on the page."""
    counts = [f"{num_held(segments):,}" for segments in ownership]
    left = max(text_width("all ranks"), text_width(f"rank {len(ownership) - 1}")) + 8
    right = max(text_width(count) for count in counts) + 10
    plot = width - left - right
    zoom = magnified(ownership, num_tokens, plot)
    scale = plot / num_tokens
    parts: list[Raw] = []
    y = 2.0
    parts.append(_row("all ranks", None, left, y, plot))
    for rank, segments in enumerate(ownership):
        parts.append(_segments(segments, rank, left, y, scale, labels=True, among=len(ownership)))
    y += _ROW + _GAP + 4
    for rank, segments in enumerate(ownership):
        parts.append(_row(f"rank {rank}", counts[rank], left, y, plot))
        parts.append(_segments(segments, rank, left, y, scale))
        y += _ROW + _GAP
    parts += _axis(num_tokens, left, y, plot)
    y += 28
    if zoom:
        shown = min(_MAGNIFIED, num_tokens)
        y += 10
        parts.append(tag("text", f"magnified: tokens 0 to {shown - 1}", x=left, y=y + 8, class_="soft"))
        y += 16
        for rank, segments in enumerate(ownership):
            cells = [token for segment in segments for token in range(*segment) if token < shown]
            parts.append(_segments([(t, t + 1, 1) for t in cells], rank, left, y, plot / shown, labels=shown <= 32))
        y += _ROW + 4
    title = f"Who holds which tokens: {layout or 'layout'} over {len(ownership)} ranks"
    words = [f"rank {rank} holds {count} of {num_tokens:,} tokens" for rank, count in enumerate(counts)]
    return svg(width, y, title, "; ".join(words) + ".", uid, parts)


def _row(label: str, count: str | None, left: float, y: float, plot: float) -> Raw:
    middle = y + _ROW / 2 + 4
    name = tag("text", label, x=left - 8, y=middle, class_="soft", text_anchor="end")
    track = tag("rect", x=left, y=y, width=plot, height=_ROW, class_="track")
    end = tag("text", count, x=left + plot + 8, y=middle, class_="soft") if count else None
    return join([name, track, end])


def _segments(
    segments: Sequence[Segment], rank: int, left: float, y: float, scale: float, *, labels: bool = False, among: int = 1
) -> Raw:
    """The boxes of one rank's segments; ``labels`` writes the owner into them, ``among`` ranks share the strip."""
    parts: list[Raw] = []
    for start, stop, step in segments:
        x, length = left + start * scale, (stop - start) * scale
        if step == 1:
            tip = tag("title", f"rank {rank}: tokens {start:,} to {stop - 1:,}")
            parts.append(tag("rect", tip, x=x, y=y, width=max(length, 0.75), height=_ROW, class_="held"))
            if labels and text_width(str(rank)) + 4 < length:
                middle = x + length / 2
                parts.append(tag("text", rank, x=middle, y=y + _ROW / 2 + 4, class_="owner", text_anchor="middle"))
        else:
            tip = tag("title", f"rank {rank}: every {step}th token from {start:,} below {stop:,}")
            if scale >= _LEAST_STRIPE:
                box = f"v{_ROW:g}h{scale:.2f}v-{_ROW:g}z"
                marks = "".join(f"M{left + token * scale:.2f} {y:g}{box}" for token in range(start, stop, step))
                parts.append(tag("path", tip, d=marks, class_="held"))
            else:
                pitch, shift = (3.0 * among, 3.0 * rank) if among > 1 else (6.0, 3.0)
                if among == 1:
                    parts.append(tag("rect", x=x, y=y, width=length, height=_ROW, class_="held sparse"))
                places = (x + index * pitch + shift for index in range(int(length / pitch) + 1))
                lines = "".join(f"M{place:.1f} {y:g}v{_ROW:g}" for place in places if place < x + length)
                parts.append(tag("path", tip, d=lines, class_="hatch thick" if among > 1 else "hatch"))
    return tag("g", parts, class_=f"r{rank % 8}")


def _axis(num_tokens: int, left: float, y: float, plot: float) -> list[Raw]:
    parts = []
    quarters = sorted({num_tokens * i // 4 for i in range(5)}) if plot > 420 else [0, num_tokens // 2, num_tokens]
    for token in quarters:
        x = left + plot * token / num_tokens
        anchor = "end" if token == num_tokens else "start" if token == 0 else "middle"
        parts.append(tag("line", x1=x, x2=x, y1=y - 3, y2=y + 3, class_="axis"))
        parts.append(tag("text", f"{token:,}", x=x, y=y + 17, class_="soft", text_anchor=anchor))
    return parts
