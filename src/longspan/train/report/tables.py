"""Tables behind the figures: every number is on the page as it was given (`<data value=...>`), shown short."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from longspan.train.markup import Raw, tag
from longspan.train.report.data import Row
from longspan.train.units import bytes_text

MOST_ROWS = 200  # a table longer than this shows evenly spaced rows and says so


def value(item: Any, text: Callable[[Any], str] | None = None) -> Raw:
    """One value: a dash for None, a warning for a number that is not finite, else its text with the exact number."""
    if item is None:
        return tag("span", "–", aria_label="not recorded", role="img")
    if isinstance(item, str | bool):
        return tag("span", str(item))
    if isinstance(item, float) and not math.isfinite(item):
        return tag("span", "not a number" if math.isnan(item) else "infinite", class_="warn")
    if isinstance(item, int | float):
        return tag("data", text(item) if text else f"{item:,}", value=repr(item))
    return tag("span", ", ".join(map(str, item)))


def loss_text(loss: float) -> str:
    return f"{loss:.4f}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str] | None]] = {
    "step": ("step", None),
    "sequence_length": ("sequence length", None),
    "loss": ("loss, nats/token", loss_text),
    "bits_per_byte": ("bits/byte", loss_text),
    "aux_loss": ("auxiliary loss", loss_text),
    "mfu": ("MFU", lambda share: f"{100 * share:.1f} %"),
    "data_wait_s": ("waiting for data, s", lambda time: f"{time:.3g}"),
    "start_ms": ("start, ms", lambda time: f"{time:.2f}"),
    "duration_ms": ("duration, ms", lambda time: f"{time:.2f}"),
    "tokens_per_s": ("tokens/s", lambda rate: f"{rate:,.0f}"),
    "memory_bytes": ("peak memory", bytes_text),
    "memory_limit_bytes": ("memory limit", bytes_text),
    "learning_rate": ("learning rate", lambda rate: f"{rate:.3g}"),
    "gradient_norm": ("gradient norm", lambda norm: f"{norm:.3g}"),
    "time_s": ("time, s", lambda time: f"{time:,.1f}"),
    "mask_area": ("allowed pairs", None),
    "start": ("start", lambda time: f"{time:g}"),
    "duration": ("duration", lambda time: f"{time:g}"),
    "bytes": ("bytes", bytes_text),
    "area": ("allowed pairs", None),
}


def table(caption: str, rows: Sequence[Row], columns: Sequence[str], *, most: int = MOST_ROWS) -> Raw:
    """A scrolling table of the columns that some row has; texts to the left, numbers to the right."""
    present = [name for name in columns if any(row.get(name) is not None for row in rows)]
    every = max(1, math.ceil(len(rows) / most))
    shown = list(rows[::every])
    if every > 1:
        shown += [rows[-1]] if (len(rows) - 1) % every else []
        caption += f" Every {every}th of {len(rows):,} rows and the last."
    longest = {
        name: max((len(row[name]) for row in rows if isinstance(row.get(name), str)), default=0) for name in present
    }
    style = {name: None if not size else "text" if size <= 40 else "text long" for name, size in longest.items()}
    head = [
        tag("th", COLUMNS.get(name, (name.replace("_", " "), None))[0], scope="col", class_=style[name])
        for name in present
    ]
    body = [
        tag(
            "tr",
            [tag("td", value(row.get(name), COLUMNS.get(name, ("", None))[1]), class_=style[name]) for name in present],
        )
        for row in shown
    ]
    inner = tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body))
    tall = " tall" if len(shown) > 20 else ""
    return tag("div", inner, class_=f"scroll{tall}", tabindex=0, role="region", aria_label=caption)


def folded(summary: str, *children: Raw) -> Raw:
    """Content behind a summary line; opens without a script."""
    return tag("details", tag("summary", summary), children)
