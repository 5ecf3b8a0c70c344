"""Regret of ``auto``: what is compared with what, and the map of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from longspan.bench.regret import heat_map, regret_table, regrets
from tests.data import REPOSITORY


def row(name: str, both_s: float, *, kv_heads: int = 8, run: str = "one", status: str = "ok", **changes) -> dict:
    problem = {"mask": "causal", "heads": 8, "kv_heads": kv_heads}
    cell = {"problem": problem, "method": name, "layout": None, "network": "port", "rate_bit_per_s": 2e8}
    found = {"run": run, "status": status, "cell": cell, "method": name, "layout": "zigzag"}
    return {**found, "both_s": [0.0, both_s, 9.0], **changes}


def test_auto_is_held_to_the_fastest_beside_it_and_to_what_it_chose() -> None:
    rows = [
        row("ring", 2.0), row("zigzag", 1.0), row("burst", 0.1, status="red"), row("auto", 1.1, method="zigzag"),
        row("ring", 1.0, kv_heads=1), row("auto", 3.0, kv_heads=1, method="ring", layout="contiguous"),
    ]  # fmt: skip
    first, second = regrets(rows)
    assert (first.problem, first.network, first.best) == ("causal 8:8", "port 200 Mbit/s", "zigzag")
    assert (first.ratio, first.twice) == (1.1, 1.1)
    assert (second.problem, second.ratio) == ("causal 8:1", 3.0)
    assert second.twice is None  # the same method on another layout is another schedule
    text = regret_table([first, second])
    assert "| causal 8:8 | port 200 Mbit/s | `zigzag`, zigzag | 1.100 | `zigzag` | 1.000 | 1.10 | 1.10 |" in text


def test_what_was_measured_in_another_run_or_alone_is_no_cell() -> None:
    assert regrets([row("ring", 1.0, run="before"), row("auto", 1.0)]) == []
    assert regrets([row("ring", 1.0), row("zigzag", 2.0)]) == []


def test_the_map_has_a_box_a_cell_darker_the_more_was_lost() -> None:
    cells = regrets([row("ring", 1.0), row("auto", 1.0), row("ring", 1.0, kv_heads=1), row("auto", 1.1, kv_heads=1)])
    drawing = ET.fromstring(heat_map(cells))
    boxes = [e for e in drawing.iter() if e.tag.endswith("rect") and "fill-opacity" in e.get("style", "")]
    assert [box.get("style") for box in boxes] == [
        "fill:var(--r1);fill-opacity:0.00",
        "fill:var(--r1);fill-opacity:0.30",
    ]
    words = "".join(drawing.itertext())
    assert "causal 8:1" in words and "1.10 × ring" in words


def test_the_page_shows_what_the_lab_measured() -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "attention_lab_choice.json").read_text())
    cells = regrets(record["rows"])
    assert len(cells) == 24
    assert regret_table(cells) in (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert heat_map(cells) == (REPOSITORY / "docs" / "assets" / "choice.svg").read_text()
    again = json.loads((REPOSITORY / "benchmarks" / "results" / "attention_lab_choice_again.json").read_text())
    assert regret_table(regrets(again["rows"])) in (REPOSITORY / "docs" / "benchmarks.md").read_text()
