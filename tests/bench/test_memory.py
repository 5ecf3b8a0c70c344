"""The benchmark of memory at toy size: the gate, cells in processes of their own, the table of the record."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from longspan.bench import memory
from longspan.bench.memory import TECHNIQUES, Cell, Technique, gate, table
from longspan.cli import main
from tests.data import REPOSITORY

DEVICE = torch.device("cpu")


def cell(technique: Technique) -> Cell:
    return Cell(technique=technique, length=64, layers=4, width=32, heads=2, steps=1)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_every_technique_passes_the_gate(technique: Technique) -> None:
    assert gate(cell(technique), DEVICE, torch.float32) <= 1e-5


def test_adapters_and_a_window_pass_the_gate() -> None:
    technique = next(t for t in TECHNIQUES if t.name == "full, tiles, activations")
    with_both = replace(cell(technique), lora=4, window=32, kv_heads=1)
    assert gate(with_both, DEVICE, torch.float32) <= 1e-5
    row = memory.measure(with_both)
    assert row["tokens_per_s"] > 0


def test_streamed_layers_compute_in_the_dtype_of_the_model() -> None:
    technique = next(t for t in TECHNIQUES if t.name == "all")
    model = memory._model(cell(technique), DEVICE, torch.bfloat16)
    streamed = memory._apply(model, technique, DEVICE)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, _, out: seen.append(out[0].dtype))
    ctx, tokens = memory._context(64, DEVICE, 0), memory._tokens(cell(technique), 64, DEVICE)
    memory._step(model, streamed, tokens, ctx, None)
    assert seen[0] == torch.bfloat16


def test_a_step_may_end_with_the_optimizers() -> None:
    made = []
    keep = memory.make_optimizer
    with mock.patch.object(memory, "make_optimizer", lambda *given: made.append(keep(*given)) or made[0]):
        row = memory.measure(replace(cell(TECHNIQUES[0]), optimizer=True, steps=2))
    assert row["tokens_per_s"] > 0 and {float(state["step"]) for state in made[0].state.values()} == {3.0}


def test_the_gate_bites() -> None:
    step = memory._step

    def spoilt(model, streamed, *rest):
        with torch.no_grad():
            if streamed is not None:
                model.blocks[1].mlp.up.weight.mul_(1.01)
        return step(model, streamed, *rest)

    with mock.patch.object(memory, "_step", spoilt), pytest.raises(ValueError, match="layers must equal the plain run"):
        memory.measure(cell(Technique(name="layers", offload="layers")))


def test_cells_run_on_their_own_and_the_table_is_the_records(tmp_path, capsys) -> None:
    options = ["--layers", "3", "--width", "32", "--heads", "2", "--steps", "1", "--out", str(tmp_path)]
    assert main(["bench", "memory", "--lengths", "64", "--techniques", "all", *options]) == 0
    record = json.loads((tmp_path / "memory.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["ok"] and record["suite"] == "memory"
    assert (tmp_path / "memory.md").read_text() == table(record)
    assert "all" in capsys.readouterr().out


def test_a_cell_out_of_memory_is_a_row(tmp_path) -> None:
    def short(*_args, **_kwargs):
        return mock.Mock(returncode=3, stdout="", stderr="CUDA out of memory")

    with mock.patch.object(memory.subprocess, "run", short):
        path = memory.run([cell(TECHNIQUES[0])], tmp_path)
    record = json.loads(path.read_text())
    assert record["rows"][0]["status"] == "out of memory" and "| 64 | plain | out of memory |" in table(record)


def test_an_optimizer_is_for_what_lies_on_the_device() -> None:
    with pytest.raises(ValueError, match="timed on what lies on the device, got optimizer with 'layers'"):
        memory.MemoryBenchConfig(optimizer=True)


def test_an_unknown_technique_is_refused() -> None:
    with pytest.raises(ValueError, match=r"techniques must be some of 'plain', .*, got 'magic'; pick of these"):
        memory.MemoryBenchConfig(techniques=("plain", "magic"))


@pytest.mark.parametrize("name", ["16k", "64k", "128k", "8b_full", "8b_lora", "8b_lora_640k"])
def test_the_page_has_the_records_table(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"memory_{name}_h200.json").read_text())
    assert table(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()
