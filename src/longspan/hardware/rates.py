"""Rates of links as people write them: 100mbit, 1.5gbit."""

from __future__ import annotations

import re

_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?bit)(?:/s|ps)?", re.IGNORECASE)


def parse_rate(text: str) -> float | None:
    """Bits per second of "100mbit", "1.5gbit" and the like; None (no limit) for "none".

    Raises ValueError for anything else, and for rates outside 1 kbit/s to 100 Gbit/s.
    """
    if text.strip().lower() == "none":
        return None
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a rate must be a number with bit, kbit, mbit or gbit, or none, got {text!r}; say 100mbit")
    rate_bit_per_s = float(match[1]) * _UNITS[match[2].lower()]
    check_rate(rate_bit_per_s)
    return rate_bit_per_s


def check_rate(rate_bit_per_s: float) -> None:
    """Raises ValueError for a rate that a token bucket cannot be trusted to keep."""
    if not 1e3 <= rate_bit_per_s <= 100e9:  # NaN as well
        raise ValueError(
            f"a rate must be from 1 kbit/s to 100 Gbit/s, got {rate_bit_per_s:g} bit/s; pass none for no limit"
        )
