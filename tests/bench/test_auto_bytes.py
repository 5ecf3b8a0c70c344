"""Bytes of ``auto`` on packed documents: counted as the schedules have them, and what the page claims."""

from __future__ import annotations

import json
import statistics

import pytest

from longspan.attention.masks import documents
from longspan.bench import auto_bytes
from longspan.context.build import checked_schedule
from longspan.context.choose import layout_of
from longspan.context.estimate import estimate, sent_bytes
from longspan.context.schedule import Sizes, bytes_sent
from tests.data import REPOSITORY


@pytest.mark.parametrize("method", ["mask_aware", "ulysses", "usp", "descending+all_gather"])
def test_bytes_are_those_of_the_schedule(method: str) -> None:
    mask, sizes = documents([60, 7, 120, 69]), Sizes(head_dim=16)
    layout = layout_of("balanced", mask, 4)
    schedule = checked_schedule(mask, layout, method, 8, 2)
    counted = sent_bytes(auto_bytes._forward(method, mask, layout, 8, 2), sizes)
    assert counted.tolist() == bytes_sent(schedule.forward, 4, sizes)


@pytest.mark.parametrize("world", [8, 16])
def test_the_slow_link_is_slow_between_any_two_ranks(world: int) -> None:
    """Also on two nodes of eight: no phase is faster than what its fullest port sends."""
    mask, where = documents([world * 512]), auto_bytes._where("10 Gbit/s", world, 128)
    phase = auto_bytes._forward("ulysses", mask, layout_of("contiguous", mask, world), 16, 16)
    wire_s = sent_bytes(phase, where.sizes).max() / 1.25e9
    assert estimate(phase, where.topology, where.device, where.sizes) >= wire_s > 0


def test_the_page_shows_what_was_counted_and_what_holds() -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "auto_bytes.json").read_text())
    assert auto_bytes.table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()

    def shares(ranks: int, kv_heads: int, link: str, name: str) -> list[float]:
        rows = record["rows"]
        return [r[name]["mean"] for r in rows if (r["ranks"], r["kv_heads"], r["link"]) == (ranks, kv_heads, link)]

    assert all(row["balanced"]["imbalance"] <= 1.05 for row in record["rows"])
    assert statistics.median(shares(8, 8, "NVSwitch", "balanced")) < 0.15
    assert statistics.mean(shares(64, 8, "NVSwitch", "balanced")) < 0.065
    assert max(shares(64, 32, "10 Gbit/s", "auto")) < 0.04
