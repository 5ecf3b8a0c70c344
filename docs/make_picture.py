"""Draws `docs/assets/longspan.svg`, the README's picture: a sequence over four ranks, its mask, the ring's rounds.

Run by hand after a change: ``python docs/make_picture.py``; the output is committed. Everything drawn is computed
from the zigzag rule (chunk c of 2w belongs to rank min(c, 2w - 1 - c)) and the ring's (in round t, rank r holds the
keys of r - t).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from longspan.train.markup import Raw, tag
from longspan.train.report.style import RANK_COLOURS

RANKS, CHUNKS = 4, 8
WIDTH, HEIGHT = 960.0, 520.0
OUTPUT = Path(__file__).parent / "assets" / "longspan.svg"

_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif'
_LIGHT = ("#ffffff", "#d5d9e0", "#1d2129", "#5b6472", "#eef0f3")
_DARK = ("#161a21", "#343b47", "#e8eaee", "#a2abb8", "#262c36")


def _rules(theme: str, colours: tuple[str, ...]) -> str:
    card, rule, ink, soft, track = colours
    ranks = "".join(f".r{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(RANK_COLOURS[theme][:RANKS]))
    return (
        f".card{{fill:{card};stroke:{rule}}}text{{fill:{ink}}}.soft{{fill:{soft}}}.none{{fill:{track}}}"
        f".line{{stroke:{soft}}}.head{{fill:{soft}}}.gap{{stroke:{card}}}{ranks}"
    )


STYLE = Raw(
    f"text{{font:14px {_FONT};stroke:none}}.title{{font-size:16px;font-weight:650}}.small{{font-size:12px}}"
    ".owner{font-weight:650}.mid{text-anchor:middle}.line{fill:none;stroke-width:1.6}.faded{opacity:.22}"
    ".gap{stroke-width:1.5}"
    + _rules("light", _LIGHT)
    + f"@media (prefers-color-scheme:dark){{{_rules('dark', _DARK)}}}"
    + "text.owner{fill:#14161a}"
)


def owner(chunk: int) -> int:
    """The rank that holds a chunk under zigzag."""
    return min(chunk, 2 * RANKS - 1 - chunk)


def text(words: str, x: float, y: float, style: str = "") -> Raw:
    return tag("text", words, x=x, y=y, class_=style or None)


def sequence(x: float, y: float, width: float, height: float) -> list[Raw]:
    """The sequence as one strip of chunks with their owners."""
    size, parts = width / CHUNKS, []
    for chunk in range(CHUNKS):
        rank = owner(chunk)
        box = tag("rect", x=x + chunk * size, y=y, width=size, height=height, class_=f"r{rank}")
        edge = tag("rect", x=x + chunk * size, y=y, width=size, height=height, class_="gap", fill="none")
        parts += [box, edge, text(f"rank {rank}", x + (chunk + 0.5) * size, y + height / 2 + 5, "owner mid")]
    return parts


def triangle(x: float, y: float, size: float, at_round: int | None = None) -> list[Raw]:
    """The causal mask by chunks, rows in the colour of their owner; with ``at_round``, its blocks are strong."""
    cell, parts = size / CHUNKS, [tag("rect", x=x, y=y, width=size, height=size, class_="none")]
    for row in range(CHUNKS):
        for column in range(row + 1):
            now = at_round is None or (owner(row) - owner(column)) % RANKS == at_round
            left, top = x + column * cell, y + row * cell
            shape = f"M{left:.1f} {top:.1f}v{cell:.1f}h{cell:.1f}" + ("z" if row == column else f"v-{cell:.1f}z")
            parts.append(tag("path", d=shape, class_=f"r{owner(row)}{'' if now else ' faded'}", stroke_opacity=0))
    across = (f"M{x:.1f} {y + i * cell:.1f}h{i * cell:.1f}" for i in range(1, CHUNKS))
    down = (f"M{x + i * cell:.1f} {y + i * cell:.1f}V{y + size:.1f}" for i in range(1, CHUNKS))
    edges = "".join([*across, *down])
    parts.append(tag("path", d=edges, class_="gap", fill="none", stroke_width=1.0 if at_round is not None else None))
    return parts


def ring(x: float, y: float, radius: float) -> list[Raw]:
    """The ranks in a circle, each handing its keys and values to the next."""
    parts, knob = [], 25.0
    gap = math.asin(knob / radius) * 1.12
    for rank in range(RANKS):
        angle = 2 * math.pi * rank / RANKS - math.pi / 2
        start, end = angle + gap, angle + 2 * math.pi / RANKS - gap
        x0, y0 = x + radius * math.cos(start), y + radius * math.sin(start)
        x1, y1 = x + radius * math.cos(end), y + radius * math.sin(end)
        parts.append(tag("path", d=f"M{x0:.1f} {y0:.1f}A{radius:g} {radius:g} 0 0 1 {x1:.1f} {y1:.1f}", class_="line"))
        turn = math.degrees(end) + 90 - 8
        parts.append(
            tag("path", d="M3 0l-9 -5v10z", transform=f"translate({x1:.1f} {y1:.1f}) rotate({turn:.1f})", class_="head")
        )
        cx, cy = x + radius * math.cos(angle), y + radius * math.sin(angle)
        parts.append(tag("circle", cx=cx, cy=cy, r=knob, class_=f"r{rank}"))
        parts.append(text(f"{rank}", cx, cy + 5, "owner mid"))
    parts += [text("keys and", x, y - 1, "soft small mid"), text("values", x, y + 15, "soft small mid")]
    return parts


def picture() -> Raw:
    """The whole picture."""
    parts: list[Raw] = [tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, rx=12, class_="card")]
    left, inner = 32.0, WIDTH - 64
    parts.append(text("1 · One long sequence, split over the ranks in zigzag order", left, 38, "title"))
    parts += sequence(left, 52, inner, 40)
    parts.append(text("first token", left, 110, "soft small"))
    parts.append(tag("text", "last token", x=left + inner, y=110, class_="soft small", text_anchor="end"))

    top, size = 186.0, 280.0
    parts.append(text("2 · Every rank has an equal share", left, 150, "title"))
    parts.append(text("of the causal mask (rows: queries, columns: keys)", left, 170, "soft small"))
    parts += triangle(left, top, size)

    middle = left + size + 52
    parts.append(text("3 · Keys and values go round the ring;", middle, 150, "title"))
    parts.append(
        text("queries stay. In each round all ranks work, on the blocks they can see then.", middle, 170, "soft small")
    )
    parts += ring(middle + 100, top + size / 2, 96)
    small, gap = 114.0, 52.0
    first = WIDTH - 32 - 2 * small - gap
    for index in range(RANKS):
        x, y = first + (index % 2) * (small + gap), top + (index // 2) * (small + gap)
        parts += triangle(x, y, small, index)
        parts.append(text(f"round {index}", x + small / 2, y + small + 18, "soft small mid"))
    caption = "A token attends to all tokens before it, on whichever rank they live: the result is exact."
    parts.append(text(caption, left, HEIGHT - 20, "soft small"))
    words = "A sequence in 8 chunks held by 4 ranks in zigzag order; the causal mask coloured by the rank of the query;"
    words += " and the four rounds of the ring, in each of which every rank computes an equal part."
    return tag(
        "svg",
        tag("title", "longspan: one sequence over many ranks", id="t"),
        tag("desc", words, id="d"),
        tag("style", STYLE),
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_labelledby="t d",
    )


def main() -> int:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(picture() + "\n", encoding="utf-8")
    print(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
