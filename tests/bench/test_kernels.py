"""The kernel benchmark: what it refuses, its cells, its gate, rows that are gone on from, table and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from longspan.attention.kernels.cpu_flash import CpuFlash
from longspan.attention.masks import causal
from longspan.bench import kernel_cell, kernels
from longspan.bench.attention_cell import Problem
from longspan.bench.contenders import CONTENDERS, Contender
from longspan.bench.exact import excess, formula, make_inputs
from longspan.bench.kernel_cell import KernelCell, Task, measure
from longspan.bench.kernel_plots import plots
from longspan.bench.kernels import KernelBenchConfig, run_kernel_bench, table
from longspan.cli import main
from longspan.hardware import saved
from tests.data import REPOSITORY

CPU = torch.device("cpu")
PROBLEM = Problem(mask="causal_document", length=96, heads=4, kv_heads=2, head_dim=8, dtype="fp32")


def small(out: Path, **changes) -> KernelBenchConfig:
    options = {"kernels": ("cpu_flash", "torch_efficient"), "masks": ("causal",), "ratios": (), "length": (40,)}
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 8, "repetitions": 2, "device": "cpu"}
    return KernelBenchConfig(**{**options, **sizes, "out": out, **changes})


def cell(kernel: str, task: Task | None = None) -> KernelCell:
    return KernelCell(task=task or Task(problem=PROBLEM), kernel=kernel, device="here", threads=1)


def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "kernels.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": ("fa9",)}, "unknown kernel 'fa9'; known: cudnn, "),
        ({"masks": ("diagonal",)}, "unknown mask 'diagonal'; known: full, causal"),
        ({"length": (0,)}, "must be positive"),
        ({"kv_heads": 0}, "must be positive"),
        ({"blocks": (0,)}, "must be positive"),
        ({"threads": -1}, "threads at least 0"),
        ({"length": ()}, "name at least one"),
        ({"masks": (), "ratios": ()}, "name at least one"),
        ({"ratios": (0.0,)}, r"shares of blocks in \(0, 1\]"),
        ({"heads": 3, "kv_heads": 2}, "a multiple of KV heads, got 3 and 2"),
        ({"profile": Path("x.json")}, "--profile says where --save-profile writes"),
        ({"profile": Path("x"), "save_profile": True}, "a profile is a .json file"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        run_kernel_bench(small(tmp_path, device="cuda"))


def test_by_default_all_kernels_meet_four_masks_and_twenty_sparse_ones() -> None:
    cells = list(KernelBenchConfig().cells("here", "fp32", 1))
    assert len({each.task for each in cells}) == 4 + 2 * 10
    assert len(cells) == len(CONTENDERS) * 24
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name.split("_")[-1] in ("flash", "math", "reference")])
@pytest.mark.parametrize(
    "task",
    [
        Task(problem=replace(PROBLEM, mask="full", dtype="bf16")),
        Task(problem=PROBLEM),
        Task(problem=replace(PROBLEM, kv_heads=4), block=16, ratio=0.3),
    ],
    ids=["full", "documents", "sparse"],
)
def test_what_runs_here_is_exact_at_the_gate_and_beyond_it(name: str, task: Task) -> None:
    row = measure(cell(name, task), CPU, 2, 48)
    if name == "cuda_flash":
        assert row == {"status": "refused", "reason": "it takes CUDA tensors, not cpu"}
        return
    assert row["status"] == "ok" and row["excess"] <= 1 and row["sampled_excess"] <= 1 and row["gate_length"] == 48
    mask = task.make_mask()
    assert row["forward_flop"] == 4 * mask.area * 4 * 8 and row["backward_flop"] == 10 * mask.area * 4 * 8
    for kind in ("forward", "backward"):
        low, median, high = row[f"{kind}_s"]
        assert 0 < low <= median <= high < 10
    assert row["build_s"] > 0


@pytest.mark.parametrize("name", ["cpu_flash", "torch_flash", "torch_math"])
def test_contenders_give_what_the_formula_gives(name: str) -> None:
    mask = Task(problem=PROBLEM).make_mask()
    inputs = make_inputs(96, h=4, g=2, d=8, dtype=torch.float64)
    contender: Contender = CONTENDERS[name](mask, inputs)
    expected = formula(inputs, mask.dense())
    assert excess((contender.forward(), *contender.backward()), expected, expected) <= 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cudnn", "CUDA tensors"),
        ("flex", "no backward on cpu"),
        ("torch_cudnn", "CUDA tensors"),
        ("torch_efficient", "CUDA tensors"),
        ("torch_flex", "no backward on cpu"),
    ],
)
def test_what_a_kernel_cannot_do_is_a_row_with_the_reason(name: str, words: str) -> None:
    row = measure(cell(name), CPU, 1, 96)
    assert row["status"] == "refused" and words in row["reason"] and "\n" not in row["reason"]


def test_what_is_too_large_is_refused(monkeypatch) -> None:
    from longspan.bench import contenders

    monkeypatch.setattr(contenders, "_memory_bytes", lambda device: 2**16)
    assert "a dense mask must fit into half of the memory" in measure(cell("torch_flash"), CPU, 1, 96)["reason"]
    full = cell("torch_math", Task(problem=replace(PROBLEM, mask="full")))
    assert "matrices of scores must fit" in measure(full, CPU, 1, 96)["reason"]
    monkeypatch.setattr(contenders, "_REFERENCE_SCORES", 4 * 96**2 - 1)
    assert "heads x pairs, got 36,864" in measure(cell("reference"), CPU, 1, 96)["reason"]
    monkeypatch.setattr(contenders, "_MAX_CALLS", 0)
    assert "at most 0 calls here" in measure(cell("cpu_flash"), CPU, 1, 96)["reason"]
    monkeypatch.setattr(contenders, "_MAX_BANDS", 1)
    assert "at most 1 bands" in measure(cell("cpu_flash"), CPU, 1, 96)["reason"]
    monkeypatch.setattr(kernel_cell, "_MAX_BLOCKS", 35)
    sparse = cell("torch_math", Task(problem=PROBLEM, block=16, ratio=0.3))
    assert "at most 35 blocks here, got 36" in measure(sparse, CPU, 1, 96)["reason"]


def _blind(self, q, k, v, bands, **options):
    return _right(self, q, k, v, causal(q.shape[1]).bands, **options)


def _late(self, q, k, v, bands, **options):
    """Wrong in the last row of a sequence that is longer than the gate's."""
    out, lse = _right(self, q, k, v, bands, **options)
    out[:, 48:][:, -1:] += 0.01
    return out, lse


def _breaks(self, q, k, v, bands, **options):
    raise RuntimeError("the compiler gave up\nat length")


_right = CpuFlash.forward


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        (_blind, "red", "against float64 at 48 tokens"),
        (_late, "red", "against float64 at 96 tokens"),
        (_breaks, "failed", "the compiler gave up"),
    ],
)
def test_what_is_wrong_has_no_times(wrong, status, words, monkeypatch) -> None:
    monkeypatch.setattr(CpuFlash, "forward", wrong)
    row = measure(cell("cpu_flash"), CPU, 1, 48)
    assert row["status"] == status and row["reason"].endswith(words)
    assert not any(name.endswith("_s") for name in row)


def test_memory_that_runs_out_is_a_refusal(monkeypatch) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel_cell, "_measure", full)
    assert measure(cell("cpu_flash"), CPU, 1, 48)["status"] == "refused"


def test_a_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch) -> None:
    assert run_kernel_bench(small(tmp_path)) == 0
    first, second = rows_of(tmp_path)
    assert (first["status"], second["status"]) == ("ok", "refused")
    assert table(json.loads((tmp_path / "kernels.json").read_text())) == (tmp_path / "kernels.md").read_text()
    capsys.readouterr()
    assert run_kernel_bench(small(tmp_path, length=(40, 56))) == 0
    assert "40 tokens" not in capsys.readouterr().out
    assert rows_of(tmp_path)[:2] == [first, second]
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "kernels_causal_forward.svg",
        "kernels_causal_backward.svg",
    }
    monkeypatch.setattr(CpuFlash, "forward", _breaks)
    assert run_kernel_bench(small(tmp_path)) == 0  # nothing is measured
    assert run_kernel_bench(small(tmp_path, fresh=True)) == 1
    assert rows_of(tmp_path)[0]["status"] == "failed"


def made(kernel: str, length: int, **changes) -> dict:
    config = small(Path(), kernels=(kernel,), length=(length,), **changes)
    (only,) = config.cells("GPU", "bf16", 0)
    figures = {"excess": 0.25, "sampled_excess": 0.5, "build_s": 0.004, "added_bytes": 3 << 20}
    figures |= {"forward_s": [0.001, 0.002, 0.003], "backward_s": [0.004, 0.004, 0.005], "forward_flop": 4e11}
    row = {"status": "ok", "forward_added_bytes": 1 << 20, "backward_flop": 1e12, **figures}
    return json.loads(json.dumps({"cell": kernels.asdict(only), **row}))


def test_the_table_shows_medians_work_and_the_larger_error() -> None:
    refused = {**made("cudnn", 64), "status": "refused", "reason": "no"}
    lines = table({"rows": [made("cpu_flash", 64), refused, made("flex", 128)]}).splitlines()
    assert lines[0] == "**causal, 64 tokens, H:G 2:1, D 8, bf16; GPU**"
    assert lines[4] == (
        "| `cpu_flash` | 2.000 (1.000–3.000) | 200.000 | 4.000 (4.000–5.000) | 250.000 | 1.0 | 3.0 | 4.000 | 0.50 |"
    )
    assert lines[5].startswith("| `cudnn` | refused: no |")
    assert lines[7] == "**causal, 128 tokens, H:G 2:1, D 8, bf16; GPU**"


def test_plots_are_documents_of_one_line_a_kernel() -> None:
    sparse = {"masks": (), "blocks": (64,)}
    rows = [made(kernel, length) for length in (64, 128) for kernel in ("flex", "cudnn")]
    rows += [made("flex", 64, **sparse, ratios=(ratio,)) for ratio in (0.5, 1.0)]
    rows += [made("flex", 64, masks=("full",)), {**made("torch_math", 64), "status": "refused"}]
    drawn = plots(rows)
    names = ("block_sparse_64_64", "causal")
    assert sorted(drawn) == [f"{name}_{kind}" for name in names for kind in ("backward", "forward")]
    text = drawn["causal_forward"]
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "flex" in text and "cudnn" in text and "torch_math" not in text
    assert len([path for path in root.iter() if path.get("class", "").startswith("line s")]) == 4  # with the legend's


@pytest.mark.filterwarnings("ignore:get_parser")  # tyro's, of the function that knows a parser's options
def test_on_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    given: list[KernelBenchConfig] = []
    monkeypatch.setattr(kernels, "run_kernel_bench", lambda config: given.append(config) or 0)
    assert main(["bench", "kernels", "--save-profile", "--heads", "4", "--kv-heads", "2"]) == 0
    assert main(["bench", "kernels", "--fresh", "--ratios", "--length", "64", "128"]) == 0
    assert given[0].save_profile and given[1].fresh and given[1].ratios == () and given[1].length == (64, 128)
    assert main(["bench", "kernels", "--kernel", "flex"]) == 2
    assert "did you mean --kernels?" in capsys.readouterr().err
    assert not saved.profile_path(CPU).exists()


@pytest.mark.parametrize("name", ["kernels_h200", "kernels_sparse_h200"])
def test_the_page_shows_what_was_measured_and_nothing_of_red_rows(name: str) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    for row in record["rows"]:
        assert (row["status"] == "ok") == ("forward_s" in row)
    assert kernels.summary(record) in (REPOSITORY / "docs" / "benchmarks.md").read_text()
