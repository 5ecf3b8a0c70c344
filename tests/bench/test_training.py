"""The training benchmark: its table is that of the JSON, and the documentation shows the JSON's table."""

from __future__ import annotations

import json

import pytest

from longspan.bench.training import run_training_bench, table
from tests.data import REPOSITORY


@pytest.mark.parametrize("name", ["training_cpu", "training_h200"])
def test_the_page_shows_what_was_measured(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    assert table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("ranks", "lengths", "steps"), [((0,), (8,), 1), ((1,), (), 1), ((1,), (8,), 0), ((4,), (2,), 1)]
)
def test_bad_sizes_are_refused(ranks, lengths, steps, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"positive|a token for every rank"):
        run_training_bench(ranks, lengths, steps, tmp_path)


@pytest.mark.slow
def test_two_ranks_pass_the_gate_and_need_less_memory(tmp_path) -> None:
    assert run_training_bench((1, 2), (4096,), 1, tmp_path) == 0
    one, two = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert max(two["added_bytes_per_rank"]) < 0.75 * max(one["added_bytes_per_rank"])
