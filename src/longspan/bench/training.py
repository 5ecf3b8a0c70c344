"""Training throughput and memory on this machine: tokens/s and peak memory per rank, by sequence length and ranks.

``longspan bench`` starts the ranks of each case through the same launcher as training and runs this module in each.
Gate: at the same length, the loss of the first step must equal that at the first listed number of ranks (relative
1e-4), and so must, after the updates, the loss of the last one (1e-3: rounding has entered the weights by then). Only
then is a figure kept; ratios are against that number of ranks too.
Memory is what the training steps add to the resident memory of the process: its peak less what model, gradients and
libraries hold before (libraries alone take some 400 MB). AdamW's state is made by the first step, so it is part of what
is added. Both are in the JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.bench.record import head, now, quartiles
from longspan.context.build import resolve
from longspan.hardware.devices import peak_memory_bytes, reset_peak_memory, resident_bytes
from longspan.model.config import DecoderConfig
from longspan.plan.plan import Plan
from longspan.train.config import ModelConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.launch import discover, init_process_group, local_ranks
from longspan.train.loop import Trainer, gathered
from longspan.train.setting import make_folder

_GATES = {"first_loss": 1e-4, "last_loss": 1e-3}
_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Measure on this machine, and write JSON and a table.

    Args:
        suite: "training": tokens/s and peak memory per rank against sequence length, at several numbers of ranks.
        out: where the results go.
    """

    suite: Literal["training"] = "training"
    ranks: tuple[int, ...] = (1, 2, 4)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    steps: int = 3
    out: Path = Path("runs/bench")


def bench_model(length: int) -> DecoderConfig:
    """The model of the benchmark: 4 layers of width 256, bytes."""
    return ModelConfig(layers=4, width=256, heads=4).decoder(257, length)


def measure(length: int, steps: int) -> dict[str, Any]:
    """One rank's part of one case: a causal sequence of ``length`` tokens split over all ranks."""
    joined = init_process_group(_TIMEOUT_S, launch=discover())
    world = dist.get_world_size()
    plan = Plan().fit(world).on(joined.device.type)
    trainer = Trainer(TrainConfig(), bench_model(length), plan, joined.device)
    tokens = torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], lengths=None, num_labels=length, position=0)
    small = min(length, 16 * world)
    warm = Batch(tokens=tokens[:, :small], labels=tokens[:, 1 : small + 1], lengths=None, num_labels=small, position=0)
    trainer.gradients([(warm, None)])  # allocates gradients and connects the ranks
    gc.collect()
    before = resident_bytes(joined.device)
    reset_peak_memory(joined.device)
    times, losses = [], []
    for step in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        losses.append(trainer.step(step, steps + 1, [(batch, None)])["loss"])
        if joined.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = peak_memory_bytes(joined.device)
    peaks, added = gathered(peak), gathered(max(0, peak - before))
    step_s = quartiles(times[1:])
    result = {
        "ranks": world,
        "length": length,
        "method": resolve(masks.causal(length), world, plan.method, None)[0],
        "device": joined.device.type,
        "step_s": step_s,
        "tokens_per_s": length / step_s[1],
        "peak_bytes_per_rank": [int(x) for x in peaks],
        "added_bytes_per_rank": [int(x) for x in added],
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    dist.destroy_process_group()
    return result


def run_training_bench(config: BenchConfig) -> int:
    """All cases, each in processes of its own; writes ``training.json`` and ``training.md``. Returns the exit code.

    The first of ``ranks`` is what the others are held to and compared with.
    """
    ranks, lengths, steps, out = config.ranks, config.lengths, config.steps, config.out
    if min(ranks, default=0) < 1 or min(lengths, default=0) < 1 or steps < 1:
        raise ValueError(f"ranks, lengths and steps must be positive, got {ranks}, {lengths} and {steps}")
    make_folder(out)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for world in ranks:
            if length < world:
                raise ValueError(f"a sequence needs a token for every rank, got {length} tokens for {world} ranks")
            case = out / f"case_{length}_{world}.json"
            code = local_ranks(
                world, ["--length", str(length), "--steps", str(steps), "--out", str(case)],
                command=("-m", "longspan.bench.training"),
            )  # fmt: skip
            if code:
                return code
            row = json.loads(case.read_text())
            case.unlink()
            _check(row, next((other for other in rows if other["length"] == length), row))
            rows.append(row)
            print(_line(row), flush=True)
    record = {**head("training", now()), "model": bench_model(max(lengths)).to_dict(), "rows": rows}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "training.md").write_text(table(record))
    print(f"results {out / 'training.json'} and {out / 'training.md'}")
    return 0


def _check(row: dict[str, Any], base: dict[str, Any]) -> None:
    """The gate. Not `>`, which a loss that is not a number would pass."""
    for name, tolerance in _GATES.items():
        if not abs(row[name] - base[name]) <= tolerance * abs(base[name]):
            raise ValueError(
                f"the loss at {row['ranks']} ranks must equal that at {base['ranks']}, got {name} {row[name]} and "
                f"{base[name]} at length {row['length']}; no figure was kept"
            )


def _line(row: dict[str, Any]) -> str:
    added = max(row["added_bytes_per_rank"]) / 2**20
    return (
        f"length {row['length']:>7,}  ranks {row['ranks']}  {row['tokens_per_s']:>10,.0f} tokens/s  +{added:>7,.0f} MiB"
    )


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table; ratios are against the first listed number of ranks at the same length."""
    lines = [
        "| length | ranks | tokens/s | ratio | memory the step adds, largest rank (MiB) | ratio |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        base = next(r for r in record["rows"] if r["length"] == row["length"])
        added, base_added = max(row["added_bytes_per_rank"]), max(base["added_bytes_per_rank"])
        lines.append(
            f"| {row['length']:,} | {row['ranks']} | {row['tokens_per_s']:,.0f} | "
            f"{row['tokens_per_s'] / base['tokens_per_s']:.2f} | {added / 2**20:,.0f} | "
            f"{added / max(1, base_added):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """One rank of one case."""
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    result = measure(int(options["--length"]), int(options["--steps"]))
    if discover().rank == 0:
        Path(options["--out"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
