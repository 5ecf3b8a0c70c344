"""The training benchmark: its table is that of the JSON, and the documentation shows the JSON's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.bench import training
from longspan.bench.record import commit
from longspan.bench.training import BenchConfig, run_training_bench, table
from longspan.context.methods import METHODS
from longspan.train.launch import Joined
from tests.data import REPOSITORY
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", ["training_cpu", "training_h200"])
def test_the_page_shows_what_was_measured(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    assert table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("ranks", "lengths", "steps"), [((0,), (8,), 1), ((1,), (), 1), ((1,), (8,), 0), ((4,), (2,), 1)]
)
def test_bad_sizes_are_refused(ranks, lengths, steps, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"positive|a token for every rank"):
        run_training_bench(BenchConfig(ranks=ranks, lengths=lengths, steps=steps, out=tmp_path))


@pytest.mark.slow
def test_two_ranks_pass_the_gate_and_need_less_memory(tmp_path) -> None:
    assert run_training_bench(BenchConfig(ranks=(1, 2), lengths=(4096,), steps=1, out=tmp_path)) == 0
    one, two = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert max(two["added_bytes_per_rank"]) < 0.75 * max(one["added_bytes_per_rank"])


def row(ranks: int, length: int, **changes: float) -> dict[str, object]:
    """What a case leaves, by default one that passes."""
    figures = {"first_loss": 5.5, "last_loss": 5.25, "tokens_per_s": 100.0} | changes
    return {"ranks": ranks, "length": length, "added_bytes_per_rank": [2**20] * ranks, **figures}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_loss": 5.502}, "the loss at 1 ranks must equal that at 2, got first_loss 5.502 and 5.5 at length 64"),
        ({"last_loss": 5.26}, "got last_loss 5.26 and 5.25"),
        ({"last_loss": float("nan")}, "got last_loss nan and 5.25"),
        ({"last_loss": 5.251}, None),
    ],
)
def test_the_gate_holds_every_loss_to_the_first_listed_ranks(changes, words, tmp_path, monkeypatch) -> None:
    def local_ranks(world: int, argv: list[str], **_: object) -> int:
        given = changes if world == 1 else {}
        Path(argv[argv.index("--out") + 1]).write_text(json.dumps(row(world, int(argv[1]), **given)))
        return 0

    monkeypatch.setattr(training, "local_ranks", local_ranks)
    if words is None:
        assert run_training_bench(BenchConfig(ranks=(2, 1), lengths=(64,), steps=1, out=tmp_path)) == 0
        record = json.loads((tmp_path / "training.json").read_text())
        assert [(r["ranks"], r["last_loss"]) for r in record["rows"]] == [(2, 5.25), (1, 5.251)]
        assert record["commit"] == commit()
    else:
        with pytest.raises(ValueError, match=words):
            run_training_bench(BenchConfig(ranks=(2, 1), lengths=(64,), steps=1, out=tmp_path))
        assert not (tmp_path / "training.json").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match=r"the folder .*taken/x cannot be made \(Not a directory\); choose another"):
        run_training_bench(BenchConfig(ranks=(1,), lengths=(8,), steps=1, out=tmp_path / "taken" / "x"))


def one_case(rank: int, world: int) -> dict[str, Any]:
    with mock.patch.object(training, "init_process_group", lambda *_, **__: Joined(torch.device("cpu"), False)):
        return training.measure(8 * world, 2)


def test_a_case_says_which_method_ran() -> None:
    one, other = run_ranks(one_case, 2)
    assert one["method"] == other["method"] in METHODS
    assert one["last_loss"] == other["last_loss"] != one["first_loss"]
