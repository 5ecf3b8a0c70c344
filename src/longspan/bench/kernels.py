"""Attention kernels on one device, measured: ours on bands beside torch's own, mask by mask, after a gate.

``longspan bench kernels`` follows the kernel half of the Long-Context Attention Benchmark (LongCA-bench): its masks,
and random block-sparse ones by the share of blocks. A kernel that cannot take a problem has a row that says why. Work
is counted by the allowed pairs alone, so a kernel that computes more than these shows fewer TFLOP/s. Times are of
kernels with a mask that is ready (``bench.timing`` says how they are taken); making it ready is a column of its own.
What a kernel makes anew in every call (ours on the CPU: the masks of its tiles) is in its time.

Every row is appended to ``kernels.jsonl`` when it is done, and one that is there, of the same versions, device and
problem, is not measured again. ``--save-profile`` calibrates instead: see ``bench.calibrate``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from longspan.attention.patterns import check_pattern
from longspan.bench.attention_cell import DTYPES, Problem
from longspan.bench.calibrate import calibrate
from longspan.bench.contenders import CONTENDERS
from longspan.bench.kernel_cell import SPARSE, KernelCell, Task, measure
from longspan.bench.kernel_plots import plots
from longspan.bench.record import Row, append_row, head, key, now, plain, read_rows, versions
from longspan.hardware.devices import device_name
from longspan.hardware.saved import profile_path, save_profile
from longspan.train.setting import make_folder

_RATIOS = tuple(number / 10 for number in range(1, 11))


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelBenchConfig:
    """Measure attention kernels on one device, and write JSON, a table and plots; or calibrate the device's profile.

    Args:
        kernels: names of longspan's kernels, and torch_flash, torch_cudnn, torch_efficient, torch_math, torch_flex; all
            by default.
        masks: names of mask patterns.
        length: tokens of the sequence, one or several.
        blocks: sizes of the blocks of block-sparse masks.
        ratios: shares of blocks that block-sparse masks have; none for no such masks.
        heads: query heads.
        device: "auto" is CUDA where there is a device.
        dtype: "auto" is bf16 on CUDA and fp32 elsewhere.
        histogram: JSON of document lengths; by default uniform from 1/32 to 1/4 of the length.
        repetitions: timed passes of each kind.
        gate_length: longer sequences are checked in full at this length, and in some rows at their own.
        threads: of torch on the CPU; 0 leaves them as they are.
        fresh: measure also what the results hold already.
        out: where the results go, and where those of an earlier run are looked for.
        save_profile: calibrate instead: fit a device profile to calls of the kernel that attention takes here, and keep
            it for method auto.
        profile: where the profile is written; by default where auto looks for it.
    """

    kernels: tuple[str, ...] = ()
    masks: tuple[str, ...] = ("full", "causal", "causal_document", "sliding_window_causal")
    length: tuple[int, ...] = (4096,)
    blocks: tuple[int, ...] = (64, 128)
    ratios: tuple[float, ...] = _RATIOS
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    histogram: Path | None = None
    seed: int = 0
    repetitions: int = 10
    gate_length: int = 2048
    threads: int = 0
    fresh: bool = False
    out: Path = Path("runs/bench")
    save_profile: bool = False
    profile: Path | None = None

    def __post_init__(self) -> None:
        for name in self.kernels:
            if name not in CONTENDERS:
                raise ValueError(f"unknown kernel {name!r}; known: {', '.join(CONTENDERS)}")
        for name in self.masks:
            check_pattern(name)
        counts = (*self.blocks, self.repetitions, self.gate_length)
        if min(counts) < 1 or self.threads < 0:
            raise ValueError(
                f"blocks, repetitions and gate_length must be positive and threads at least 0, got "
                f"{(*counts, self.threads)}; give such numbers"
            )
        if not self.length or not (self.masks or (self.blocks and self.ratios)):
            raise ValueError("length, and masks or blocks with ratios, must have a value, got none; name at least one")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios are shares of blocks in (0, 1], got {self.ratios}")
        list(self.cells("", "fp32", 0))  # which refuse sizes that no problem has
        if self.profile is not None and not self.save_profile:
            raise ValueError(f"--profile says where --save-profile writes, got {self.profile} without it; add it")
        if self.profile is not None and self.profile.suffix != ".json":
            raise ValueError(f"a profile is a .json file, got {str(self.profile)!r}; name it so")

    def where(self) -> tuple[torch.device, str]:
        """Device and dtype in force. Raises ValueError where CUDA was asked for and is not there."""
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise ValueError("device cuda was asked for and torch sees no CUDA device; use --device cpu or auto")
        cuda = there and self.device != "cpu"
        dtype = self.dtype if self.dtype != "auto" else "bf16" if cuda else "fp32"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), dtype

    def cells(self, device: str, dtype: str, threads: int) -> Iterator[KernelCell]:
        """All cells, those of one task together."""
        kinds: list[tuple[str, int | None, float | None]] = [(name, None, None) for name in self.masks]
        kinds += [(SPARSE, block, ratio) for block, ratio in product(self.blocks, self.ratios)]
        for length, (mask, block, ratio) in product(self.length, kinds):
            problem = Problem(
                mask=mask,
                length=length,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=dtype,
                histogram=None if self.histogram is None else str(self.histogram),
                seed=self.seed,
            )
            task = Task(problem=problem, block=block, ratio=ratio)
            for kernel in dict.fromkeys(self.kernels or CONTENDERS):
                yield KernelCell(task=task, kernel=kernel, device=device, threads=threads)


def run_kernel_bench(config: KernelBenchConfig) -> int:
    """Measures what is missing, or calibrates. Exit code 1 where a row is wrong or failed.

    Writes ``kernels.jsonl``, ``.json``, ``.md`` and ``kernels_*.svg``, or the profile.
    Raises ValueError where the device is not there, and for a fit that is not to be trusted.
    """
    device, dtype = config.where()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.save_profile:
        return _calibrate(config, device, dtype)
    make_folder(config.out)
    log, run = config.out / "kernels.jsonl", now()
    rows = {} if config.fresh else read_rows(log, versions())
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    cells = list(config.cells(device_name(device), dtype, threads))
    heading = None
    for cell in cells:
        name = key(asdict(cell))
        if name in rows:
            continue
        row: Row = {"run": run, "versions": versions(), "cell": asdict(cell)}
        row |= measure(cell, device, config.repetitions, config.gate_length)
        append_row(log, row)
        rows[name] = row
        if (title := _title(row["cell"])) != heading:
            heading = title
            print(title, flush=True)
        print(_line(row), flush=True)
    record = {
        **head("kernels", run),
        "config": plain(config),
        "rows": [rows[key(asdict(cell))] for cell in cells],
    }
    (config.out / "kernels.json").write_text(json.dumps(record, indent=2) + "\n")
    (config.out / "kernels.md").write_text(table(record))
    for name, drawing in plots(record["rows"]).items():
        (config.out / f"kernels_{name}.svg").write_text(drawing)
    print(f"results {config.out / 'kernels.json'}, {config.out / 'kernels.md'} and plots beside them")
    return int(any(row["status"] in ("red", "failed") for row in record["rows"]))


def _calibrate(config: KernelBenchConfig, device: torch.device, dtype: str) -> int:
    found = calibrate(
        device, DTYPES[dtype], heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, say=print
    )
    found.check()
    path = config.profile or profile_path(device)
    save_profile(found.profile, path)
    print(f"saved {path}")
    return 0


def _title(cell: dict[str, Any]) -> str:
    problem, device = cell["task"]["problem"], cell["device"]
    mask = problem["mask"]
    if cell["task"]["block"] is not None:
        mask = f"{mask} {cell['task']['ratio']:.0%} of blocks of {cell['task']['block']}"
    where = f"{device}, {cell['threads']} threads" if cell["threads"] else device
    shape = f"H:G {problem['heads']}:{problem['kv_heads']}, D {problem['head_dim']}, {problem['dtype']}"
    return f"{mask}, {problem['length']:,} tokens, {shape}; {where}"


def tflop_per_s(row: Row, kind: str) -> float:
    """Of the allowed pairs, at the median time."""
    return row[f"{kind}_flop"] / row[f"{kind}_s"][1] / 1e12


def _line(row: Row) -> str:
    name = f"  {row['cell']['kernel']:<16}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['reason']}"
    parts = [f"{kind} {1e3 * row[f'{kind}_s'][1]:9.3f} ms {tflop_per_s(row, kind):8.3f} TFLOP/s" for kind in _KINDS]
    return f"{name} {'   '.join(parts)}   added {row['added_bytes'] / 2**20:,.0f} MiB"


_KINDS = ("forward", "backward")


def table(record: dict[str, Any]) -> str:
    """The record as Markdown, a table per problem."""
    lines: list[str] = []
    heading = None
    for row in record["rows"]:
        title = _title(row["cell"])
        if title != heading:
            heading = title
            lines += [""] * bool(lines) + [
                f"**{title}**",
                "",
                "| kernel | forward ms (quartiles) | TFLOP/s | backward ms (quartiles) | TFLOP/s | "
                "MiB added forward | by both | mask ms | error ÷ allowed |",
                "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            ]
        parts = [f"`{row['cell']['kernel']}`"]
        if row["status"] != "ok":
            lines.append(f"| {parts[0]} | {row['status']}: {row['reason']} " + "|  " * 7 + "|")
            continue
        for kind in _KINDS:
            low, median, high = (1e3 * value for value in row[f"{kind}_s"])
            parts += [f"{median:.3f} ({low:.3f}–{high:.3f})", f"{tflop_per_s(row, kind):.3f}"]
        parts += [f"{row[name] / 2**20:,.1f}" for name in ("forward_added_bytes", "added_bytes")]
        parts += [f"{1e3 * row['build_s']:.3f}", f"{max(row['excess'], row['sampled_excess'] or 0.0):.2f}"]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def summary(record: dict[str, Any]) -> str:
    """The record as one Markdown table: TFLOP/s forward / backward, a line per problem, a column per kernel.

    A dash stands for a kernel that refused the problem, "red" and "failed" for what they say; kernels that took nothing
    have no column.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        task = row["cell"]["task"]
        mask = task["problem"]["mask"]
        if task["block"] is not None:
            mask += f", {task['ratio']:.0%} of blocks of {task['block']}"
        if row["status"] == "ok":
            text = " / ".join(f"{tflop_per_s(row, kind):.0f}" for kind in _KINDS)
        else:
            text = "–" if row["status"] == "refused" else row["status"]
        rows.setdefault(f"{mask} | {task['problem']['length']:,}", {})[row["cell"]["kernel"]] = text
    names = dict.fromkeys(name for cells in rows.values() for name, text in cells.items() if text != "–")
    lines = [f"| mask | tokens | {' | '.join(f'`{name}`' for name in names)} |", "|---|---:|" + "---:|" * len(names)]
    lines += [f"| {title} | {' | '.join(cells.get(name, '–') for name in names)} |" for title, cells in rows.items()]
    return "\n".join(lines) + "\n"
