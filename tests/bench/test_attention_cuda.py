"""Attention over GPUs: the documentation shows what was measured, and a method that is wrong is not timed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from longspan.bench import attention_cuda
from longspan.bench.attention_cuda import gate, table
from longspan.context.methods import METHODS
from tests.data import REPOSITORY
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", ["attention_4xh200", "attention_2xh200"])
def test_the_page_shows_what_was_measured(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    assert set(record["gate"].values()) == {"exact"}
    assert table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()


def _gates(rank: int, world: int) -> tuple[list[str], str]:
    group = dist.group.WORLD
    assert group is not None
    right = [gate(name, group, torch.device("cpu")) for name in METHODS]
    honest = attention_cuda.attention
    attention_cuda.attention = lambda q, k, v, **rest: 1.001 * honest(q, k, v, **rest)
    return right, gate("ring", group, torch.device("cpu"))


def test_the_gate_lets_right_methods_through_and_no_wrong_one() -> None:
    for right, wrong in run_ranks(_gates, 2):
        assert set(right) == {""}
        assert wrong.startswith("causal, 4 heads on 2: error")
