"""Ranks timed one by one: the page shows what was measured, and only what passed its gate."""

from __future__ import annotations

import json

import pytest

from longspan.bench import attention
from longspan.bench.attention_withheld import table
from tests.data import REPOSITORY

PAGE = (REPOSITORY / "docs" / "benchmarks.md").read_text()


def _record(name: str) -> dict:
    return json.loads((REPOSITORY / "benchmarks" / "results" / name).read_text())


def test_the_page_shows_the_ranks_that_were_timed_alone() -> None:
    record = _record("attention_withheld_h200.json")
    assert all(row["gate"] <= 1 for row in record["rows"])
    for row in record["rows"]:
        for direction in ("forward", "backward"):
            for as_it_was, wanted in row[f"{direction}_wire_s"]:
                assert as_it_was >= 0.95 * wanted  # arrivals were withheld as long as they should be
            ideal = row[f"single_{direction}_s"] / row["ranks"]
            assert row[f"{direction}_share"] == pytest.approx(ideal / max(row[f"{direction}_s"]))
    assert table(record) in PAGE


@pytest.mark.parametrize("name", ["lab_port", "lab_port_one_head", "lab_port_documents", "lab_mesh", "lab_loopback"])
def test_the_page_shows_what_the_lab_measured(name: str) -> None:
    record = _record(f"attention_{name}.json")
    assert all(row["status"] == "ok" for row in record["rows"])
    assert attention.table(record) in PAGE
