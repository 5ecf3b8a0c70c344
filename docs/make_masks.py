"""Draws the pictures of docs/masks.md, one a pattern, and writes its table between the page's markers.

Run by hand after a change: ``python docs/make_masks.py``; the output is committed, and a test fails where it is stale.
A picture is drawn from the bands of the real mask, at 48 tokens: rows are queries, columns are keys, both from the top
left.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from longspan.attention.bands import Bands
from longspan.attention.masks import Mask
from longspan.attention.patterns import DOCUMENT_PATTERNS, PATTERNS
from longspan.train.markup import Raw, tag

DOCS = Path(__file__).parent
PAGE, PICTURES = DOCS / "masks.md", DOCS / "assets" / "masks"
BEGIN, END = "<!-- patterns:begin -->", "<!-- patterns:end -->"
NUM_TOKENS, PIXELS = 48, 96
# Lengths that show each pattern small; the benchmark draws them from histograms of real corpora.
LENGTHS = {"short": (9, 5, 14, 3, 7, 10), "long": (3, 19, 2, 4, 17, 3)}
OPTIONS: dict[str, dict[str, int]] = {
    "sliding_window": {"window": 6},
    "sliding_window_causal": {"window": 10},
    "global_sliding_window": {"window": 5, "num_global": 5},
    "block_causal_document": {"block": 5, "max_blocks": 4, "seed": 3},
}
STYLE = Raw(
    ".on{fill:#2f6fdb}.off{fill:#eef0f3}@media (prefers-color-scheme:dark){.on{fill:#6ea1ff}.off{fill:#262c36}}"
)


def example(name: str) -> Mask:
    """The pattern's mask at the size of a picture."""
    options: dict[str, object] = {**OPTIONS.get(name, {})}
    if name in DOCUMENT_PATTERNS:
        options["lengths"] = LENGTHS["long" if name.endswith("_long") else "short"]
    return PATTERNS[name](NUM_TOKENS, **options)


def outline(bands: Bands) -> str:
    """An SVG path over all allowed cells: one run a row and band; x is the key, y the query."""
    runs = []
    for q0, q1, k0, k1, lo, hi in bands:
        for q in range(q0, q1):
            start, stop = max(k0, q + lo), min(k1, q + hi + 1)
            if start < stop:
                runs.append(f"M{start} {q}h{stop - start}v1h{start - stop}z")
    return "".join(runs)


def picture(name: str) -> str:
    """The SVG file of a pattern."""
    ground = tag("rect", width=NUM_TOKENS, height=NUM_TOKENS, class_="off")
    cells = tag("path", d=outline(example(name).bands), class_="on")
    drawing = tag(
        "svg",
        tag("title", name),
        tag("style", STYLE),
        ground,
        cells,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {NUM_TOKENS} {NUM_TOKENS}",
        width=PIXELS,
        height=PIXELS,
        **{"shape-rendering": "crispEdges"},
    )
    return f"{drawing}\n"


def table() -> str:
    """The page's table of patterns."""
    lines = ["| pattern | picture | what may attend | takes |", "| --- | --- | --- | --- |"]
    for name, make in PATTERNS.items():
        words = (inspect.getdoc(make) or "").partition("\n")[0].replace("``", "`").rstrip(".")
        if name.endswith("_long"):
            words += "; lengths mix a few long documents with many short ones"
        parameters = [f"`{p}`" for p in inspect.signature(make).parameters if p != "num_tokens"]
        lines.append(f"| `{name}` | ![{name}](assets/masks/{name}.svg) | {words} | {', '.join(parameters)} |")
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """Every file this script writes, and what it should hold."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    drawn = {PICTURES / f"{name}.svg": picture(name) for name in PATTERNS}
    return {**drawn, PAGE: f"{before}{BEGIN}\n{table()}{after}"}


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for path in PICTURES.glob("*.svg"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
