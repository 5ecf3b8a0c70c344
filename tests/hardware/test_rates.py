"""Rates of links: what is read, and what is refused."""

from __future__ import annotations

import pytest

from longspan.hardware.rates import parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 1e8),
        ("1.5gbit", 1.5e9),
        ("500 kbit", 5e5),
        ("2000bit", 2e3),
        ("10Mbit/s", 1e7),
        ("1gbitps", 1e9),
        ("none", None),
    ],
)
def test_rates_are_read(text: str, rate: float | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "100", "100mb", "100mbyte", "-1mbit", "1e3mbit", "mbit", "nan"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a rate must be a number .* got .*; say 100mbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0mbit", "999bit", "101gbit"])
def test_rates_out_of_reach_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"from 1 kbit/s to 100 Gbit/s, got .*; pass none"):
        parse_rate(text)
