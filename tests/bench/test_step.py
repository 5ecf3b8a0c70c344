"""The benchmark of a step at toy size: every contender that is here, the floor, the gate, the table of the record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.bench import step
from longspan.bench.floor import measure_floor, model_flops
from longspan.bench.step import StepBenchConfig, run_step_bench, shape_config, table
from longspan.cli import main
from tests.data import REPOSITORY

TINY = shape_config("tiny")


def test_ours_and_transformers_run_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    options = ["--shape", "tiny", "--lengths", "64", "--steps", "1", "--out", str(tmp_path)]
    assert main(["bench", "step", "--contenders", "ours_eager", "transformers", *options]) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["ok"] * 2 and record["suite"] == "step"
    ours, theirs = record["rows"]
    assert ours["losses"][-1] < ours["first_loss"] and theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert (tmp_path / "step.md").read_text() == table(record)
    assert "mfu" not in ours, "nobody knows this processor's peak"
    assert "ours_eager" in capsys.readouterr().out


def answer(losses: list[float]) -> mock.Mock:
    row = {"step_s": [1.0, 2.0, 3.0], "first_loss": losses[0], "second_loss": losses[1], "peak_bytes": 1}
    row["peak_flop_per_s"] = 1e12
    return mock.Mock(returncode=0, stdout=json.dumps(row), stderr="")


def test_the_gate_bites_and_what_did_not_run_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = mock.Mock(returncode=3, stdout="", stderr="CUDA out of memory")
    absent = mock.Mock(returncode=4, stdout="", stderr="torchtitan is not installed")
    answers = iter([answer([5.0, 4.0]), answer([5.02, 4.0]), answer([5.0, float("nan")]), short, absent])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: next(answers))
    monkeypatch.setattr(step, "head", lambda *_: {})
    names = ("ours", "ours_eager", "transformers", "transformers_compiled", "torchtitan")
    assert run_step_bench(StepBenchConfig(shape="tiny", lengths=(64,), contenders=names, out=tmp_path)) == 1
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "wrong", "wrong", "out of memory", "not installed"]
    assert "must be that of ours, 5.0, got 5.02" in rows[1]["why"] and "tokens_per_s" not in rows[2]


def test_flops_are_counted_as_the_docs_say() -> None:
    parameters = 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert model_flops(TINY, 10) == 10 * (6 * parameters + 6 * 2 * 64 * 10)
    floor = measure_floor(TINY, 32, torch.device("cpu"), torch.float32)
    assert min(floor[:4]) > 0 and floor.step_s == pytest.approx(sum(floor[:3]))
    assert floor.pure_optimiser_s == floor.optimiser_s, "nothing but fp32"
    pure = measure_floor(TINY, 32, torch.device("cpu"), torch.bfloat16)
    assert pure.pure_optimiser_s != pure.optimiser_s
    assert pure.pure_step_s == pytest.approx(pure.linears_s + pure.attention_s + pure.pure_optimiser_s)


def test_who_has_bf16_alone_is_compared_with_ours_that_has() -> None:
    def row(contender: str, step_s: float, **more: list[float]) -> dict[str, Any]:
        cell = {"contender": contender, "length": 64}
        return {"cell": cell, "status": "ok", "step_s": [step_s] * 3, "tokens_per_s": 1.0, **more}

    rows = [row("floor", 8.0, pure_step_s=[6.0] * 3), row("ours", 10.0), row("ours_pure", 7.5)]
    rows += [row("transformers", 12.0), row("torchtitan", 12.0)]
    lines = [line.split(" | ") for line in table({"rows": rows}).splitlines()[2:]]
    assert [(line[5], line[7].rstrip(" |")) for line in lines] == [
        ("", "0.800"),
        ("0.800", ""),
        ("0.800", ""),
        ("0.500", "1.600"),
        ("0.667", "1.200"),
    ]


@pytest.mark.parametrize("name", ["step_8k_h200", "step_128k_h200"])
def test_the_page_has_the_records_table(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    assert table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths must be 8 tokens or more"):
        StepBenchConfig(lengths=(4,))
