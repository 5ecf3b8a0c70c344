"""The attention benchmark: what it refuses, its exact answer, its gate, how figures of ranks become rows, and resuming.

Tests that start ranks in network namespaces need what ``test_network`` needs, and say so otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from longspan.bench import attention
from longspan.bench.attention import AttentionBenchConfig, combine, run_attention_bench, table, with_times
from longspan.bench.attention_cell import Cell, Job, Meeting, Problem, measure, solve
from longspan.bench.record import key
from longspan.context.methods import METHODS
from tests.bench.test_network import mine, missing
from tests.ranks import run_ranks

PART = {
    "status": "ok",
    "excess": 0.2,
    "method": "ring",
    "layout": "contiguous",
    "build_s": 0.1,
    "forward_formula_bytes": 100,
    "both_formula_bytes": 300,
    "forward_counted_bytes": 101,
    "both_counted_bytes": 303,
    "added_bytes": 7,
    "forward_s": [1.0, 2.0, 3.0],
    "both_s": [2.0, 4.0, 6.0],
}


@pytest.fixture
def real() -> None:
    if (reason := missing()) is not None:
        pytest.skip(f"no network lab here: {reason}")


def small(out: Path, **changes) -> AttentionBenchConfig:
    options = {"ranks": 2, "methods": ("ring",), "length": (48,), "heads": 2, "kv_heads": (1,), "head_dim": 8}
    return AttentionBenchConfig(**{**options, "repetitions": 2, "timeout_s": 60.0, "out": out, **changes})


def row(config: AttentionBenchConfig, method: str, run: str = "now", **changes) -> dict:
    cell = next(cell for cells in config.problems() for cell in cells if cell.method == method)
    return {"run": run, "versions": {"torch": "2"}, "cell": asdict(cell), **combine([{**PART, **changes}])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": "100mbit"}, r"a rate needs a network, .* add --network port or mesh"),
        ({"rate": "fast", "network": "port"}, r"got 'fast'; say 100mbit"),
        ({"methods": ("rings",)}, r"'rings'; known: auto, ring"),
        ({"methods": ("ring:2",)}, r"takes no degree"),
        ({"baseline": "none"}, r"'none'; known: auto"),
        ({"masks": ("diagonal",)}, r"unknown mask 'diagonal'; known: full, causal"),
        ({"repetitions": 0}, r"must be positive"),
        ({"timeout_s": 0.0}, r"must be positive"),
        ({"kv_heads": ()}, r"name at least one"),
        ({"kv_heads": (0,)}, r"KV heads and head dim must be positive"),
        ({"head_dim": 0}, r"KV heads and head dim must be positive"),
        ({"heads": 3, "kv_heads": (2,)}, r"a multiple of KV heads, got 3 and 2"),
        ({"ranks": 1, "network": "mesh"}, r"two ranks, got 1"),
        ({"length": (3,), "ranks": 4}, r"3 tokens for 4 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_all_methods_are_measured_by_default_and_the_baseline_first(tmp_path) -> None:
    problems = list(small(tmp_path, methods=(), masks=("causal", "full"), heads=4, kv_heads=(1, 4)).problems())
    assert len(problems) == 4
    for cells in problems:
        assert [cell.method for cell in cells] == ["zigzag", *(name for name in METHODS if name != "zigzag")]
        assert len({cell.problem for cell in cells}) == 1


def test_a_repetition_takes_as_long_as_its_slowest_rank() -> None:
    slow = {**PART, "forward_s": [3.0, 1.0, 1.0], "added_bytes": 9, "forward_formula_bytes": 50, "excess": 0.4}
    got = combine([PART, slow])
    assert got["forward_s"] == [2.5, 3.0, 3.0]  # of 3, 2, 3
    assert got["both_s"] == [3.0, 4.0, 5.0]
    assert got["forward_formula_bytes"] == [100, 50]
    assert got["added_bytes_per_rank"] == [7, 9]
    assert got["excess"] == 0.4


def test_rounds_add_up_to_one_row() -> None:
    again = {**PART, "forward_s": [9.0], "both_s": [8.0]}
    slow = {**PART, "forward_s": [1.0, 2.0, 7.0]}
    later = with_times([again, again], [PART, slow])
    assert [part["forward_s"] for part in later] == [[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 7.0, 9.0]]
    assert later[0]["both_s"] == [2.0, 4.0, 6.0, 8.0] and combine(later)["forward_s"][1] == 4.5
    red = [again, {"status": "red", "reason": "wrong"}]
    assert with_times(red, [PART, slow]) == red


@pytest.mark.slow
def test_methods_take_turns(tmp_path, monkeypatch) -> None:
    asked, measure = [], attention._Ranks.measure

    def noting(self, job, timeout_s):
        asked.append((job.cell.method, job.repetitions))
        parts = measure(self, job, timeout_s)
        return [{"status": "refused", "reason": "no"}] * 2 if job.cell.method == "double_ring" else parts

    monkeypatch.setattr(attention._Ranks, "measure", noting)
    assert run_attention_bench(small(tmp_path, methods=("double_ring", "ring"), rounds=3)) == 0
    turn = [("zigzag", 2), ("ring", 2)]
    assert asked == [turn[0], ("double_ring", 2), turn[1], *turn, *turn]
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "refused", "ok"]


def test_a_cell_that_is_not_right_has_no_figures() -> None:
    red = {"status": "red", "reason": "9 times", "excess": 9.0}
    redder = {"status": "red", "reason": "inf times", "excess": float("inf")}
    assert combine([red, redder]) == {"status": "red", "reason": "inf times"}
    assert combine([{"status": "refused", "reason": "no"}] * 2) == {"status": "refused", "reason": "no"}


def test_a_ratio_is_taken_within_one_run_only(tmp_path) -> None:
    config = small(tmp_path, network="port", rate="10mbit")
    base = row(config, "zigzag", forward_s=[4.0] * 2, both_s=[8.0] * 2)
    same, other = row(config, "ring"), row(config, "ring", run="before")
    for ring, ratio in ((same, "0.50"), (other, "–")):
        record = {"config": {"baseline": "zigzag"}, "rows": [base, ring]}
        last = table(record).splitlines()[-1].split("|")
        assert [text.strip() for text in last[3:7]] == ["2.000 (1.500–2.500)", ratio, "4.000 (3.000–5.000)", ratio]
    assert "causal, 48 tokens, H:G 2:1, D 8, fp32; 2 ranks, port, 10 Mbit/s" in table(record)


def measured(rank: int, world: int, jobs: list[Job], store: str) -> list[dict]:
    meeting = Meeting(FileStore(store, world), rank, world)
    return [measure(job, meeting) for job in jobs]


def test_the_gate_is_green_for_the_right_answer_red_for_another_and_a_refusal_is_no_failure(tmp_path) -> None:
    cells = {cell.method: cell for cell in next(small(tmp_path, methods=("ring",), ranks=3).problems())}
    ring, right, wrong = cells["ring"], tmp_path / "right.pt", tmp_path / "wrong.pt"
    solve(ring.problem, right)
    answer = torch.load(right)
    answer["inputs"][2][0, -1] += 1  # the last value alone: most of the ranks do not even see it
    torch.save(answer, wrong)
    unfit = replace(ring, layout="spiral")
    jobs = [Job(cell=c, answer=a, repetitions=2) for c, a in [(ring, right), (ring, wrong), (unfit, right)]]
    for green, red, refused in run_ranks(measured, 3, jobs, str(tmp_path / "store")):
        assert green["status"] == "ok"
        assert green["excess"] <= 1
        assert len(green["forward_s"]) == len(green["both_s"]) == 2
        assert red["status"] == "red"
        assert not any(name.endswith("_s") for name in red)
        assert refused["status"] == "refused"
        assert "spiral" in refused["reason"]


@pytest.mark.slow
def test_ranks_on_loopback_pass_the_gate_and_are_not_measured_twice(tmp_path, capsys) -> None:
    config = small(tmp_path, masks=("causal_document",))
    assert run_attention_bench(config) == 0
    record = json.loads((tmp_path / "attention.json").read_text())
    assert [line["cell"]["method"] for line in record["rows"]] == ["zigzag", "ring"]
    for line in record["rows"]:
        assert line["status"] == "ok"
        assert line["excess"] <= 1
        assert line["forward_counted_bytes"] == [None, None]
        assert 0 < line["forward_s"][1] < 60
    assert (tmp_path / "attention.md").read_text() == table(record)
    num_lines = len((tmp_path / "attention.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert run_attention_bench(config) == 0
    assert len((tmp_path / "attention.jsonl").read_text().splitlines()) == num_lines
    assert "answer to" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_baseline_is_measured_again_beside_a_new_cell(tmp_path) -> None:
    assert run_attention_bench(small(tmp_path, methods=("zigzag",))) == 0
    assert run_attention_bench(small(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [line["cell"]["method"] for line in lines] == ["zigzag", "zigzag", "ring"]
    assert lines[1]["run"] == lines[2]["run"]


@pytest.mark.slow
def test_a_wrong_answer_turns_the_gate_red_and_a_lost_rank_fails_its_cell_alone(tmp_path, monkeypatch) -> None:
    def wrong(problem: Problem, path: Path) -> None:
        solve(problem, path)
        if problem.mask == "full":
            path.unlink()  # every rank fails
            return
        answer = torch.load(path)
        answer["inputs"][2][0, -1] += 1  # the last value alone
        torch.save(answer, path)

    monkeypatch.setattr(attention, "solve", wrong)
    assert run_attention_bench(small(tmp_path, masks=("full", "causal"), methods=("zigzag",))) == 1
    failed, red = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert failed["status"] == "failed"
    assert "FileNotFoundError" in failed["reason"]
    assert red["status"] == "red"
    assert "times the error allowed against float64" in red["reason"]
    assert not {"forward_s", "both_s"} & (set(red) | set(failed))


@pytest.mark.slow
def test_ranks_in_hosts_send_what_the_formula_says(real, tmp_path) -> None:
    config = small(tmp_path, network="mesh", rate="100mbit", length=(1024,), head_dim=16)
    assert run_attention_bench(config) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert len(rows) == 2
    for line in rows:
        for kind in ("forward", "both"):
            for counted, formula_bytes in zip(
                line[f"{kind}_counted_bytes"], line[f"{kind}_formula_bytes"], strict=True
            ):
                # A message of gloo has a header of some dozens of bytes, and an answer as long.
                assert -100 <= counted - formula_bytes < 2000
    assert rows[0]["both_formula_bytes"][0] > 100_000
    assert not mine()


@pytest.mark.slow
def test_every_method_passes_on_a_port_network(real, tmp_path) -> None:
    config = small(tmp_path, ranks=4, network="port", rate="100mbit", length=(512,), methods=(), heads=4, kv_heads=(2,))
    assert run_attention_bench(config) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {line["cell"]["method"] for line in rows} == set(METHODS)
    assert {line["status"] for line in rows} <= {"ok", "refused"}
    assert not mine()


def test_cells_differ_by_everything_that_changes_the_figure() -> None:
    problem = Problem(mask="causal", length=48, heads=2, kv_heads=1, head_dim=8, dtype="fp32")
    cell = Cell(problem=problem, method="ring", layout=None, ranks=2, network="port", rate_bit_per_s=1e6, threads=1)
    others = [
        replace(cell, method="zigzag"),
        replace(cell, layout="striped"),
        replace(cell, ranks=3),
        replace(cell, network="mesh"),
        replace(cell, rate_bit_per_s=None),
        replace(cell, threads=2),
        replace(cell, problem=replace(problem, seed=1)),
    ]
    assert len({key(asdict(each)) for each in (cell, *others)}) == 1 + len(others)
