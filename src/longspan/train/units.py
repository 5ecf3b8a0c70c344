"""Numbers as people read them: counts, bytes and durations, for the progress line and the report."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """A short count: 950, 1.25k, 41.2k, 3.4M. Numbers that are not finite are named (nan, inf)."""
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else _three_digits(value)


def bytes_text(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 4 MiB, 1.5 GiB. Numbers that are not finite are named (nan, inf)."""
    if not math.isfinite(num_bytes):
        return str(num_bytes)
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} B"
    value = float(num_bytes)
    for suffix in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 1000:
            return f"{_three_digits(value)} {suffix}"
    return f"{value:,.0f} TiB"


def duration(seconds: float) -> str:
    """A clock time: 0:07, 12:30, 1:02:03. A duration that is not finite is '-:--'."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    if hours:
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{rest // 60}:{rest % 60:02d}"


def _three_digits(value: float) -> str:
    """Three significant digits without trailing zeros and without an exponent."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
