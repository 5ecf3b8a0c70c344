"""Attention split over the GPUs of one host, through NCCL: every method checked, then timed. Run under torchrun:

    torchrun --nproc-per-node 4 -m longspan.bench.attention_cuda --lengths 65536 --out OUT

Gate: each method on each mask in float64 (the reference kernel), forward and gradients, against the plain formula; a
method that fails it is not timed. Times are in bf16, medians over repetitions of the slowest rank, beside one GPU alone
with the same kernel on the whole sequence: its time over the ranks is the ideal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch import Tensor

from longspan import __version__
from longspan.attention import masks
from longspan.attention.masks import Mask
from longspan.bench.attention_cell import Problem
from longspan.bench.exact import formula, make_inputs
from longspan.context import attend, attention, prepare, shard, unshard
from longspan.context.attend import where_of
from longspan.context.choose import default_layout
from longspan.context.methods import METHODS, reason_against
from longspan.context.run import bound

GATE_MASKS = {
    "causal": lambda s: masks.causal(s),
    "full": lambda s: masks.full(s),
    "documents": lambda s: masks.documents([s // 3, s // 5, s - s // 3 - s // 5]),
    "window": lambda s: masks.sliding_window(s, s // 4, 3),
}
_LIMIT = 1e-11


def gate(method: str, group: dist.ProcessGroup, device: torch.device) -> str:
    """Nothing where a method is exact on every mask that it takes, else what went wrong."""
    for name, make in GATE_MASKS.items():
        for h, g, s in ((4, 2, 101), (6, 3, 67)):
            mask = make(s)
            if reason_against(method, mask, default_layout(mask, group.size(), method)):
                continue
            whole = make_inputs(s, h=h, g=g, dtype=torch.float64).to(device)
            q, k, v = (shard(x, mask, group, method=method).requires_grad_() for x in whole[:3])
            out = attention(q, k, v, mask=mask, group=group, method=method)
            grads = torch.autograd.grad(out, (q, k, v), shard(whole.dout, mask, group, method=method))
            expected = formula(whole, mask.dense().to(device))
            for mine, reference in zip((out.detach(), *grads), expected, strict=True):
                error = float((unshard(mine, mask, group, method=method) - reference).abs().max())
                if not error <= _LIMIT:
                    return f"{name}, {h} heads on {g}: error {error:.1e}"
    return ""


def timed(
    tensors: Sequence[Tensor], mask: Mask, group: dist.ProcessGroup, method: str, repetitions: int
) -> dict[str, Any]:
    """Seconds of forward, and of forward and backward (medians of the slowest rank), and peak memory."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    rows: dict[str, list[float]] = {"forward_s": [], "both_s": []}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    handle = prepare(
        mask,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        group=group,
        method=method,
        device=q.device,
        where=where_of(group, q.device, dtype=q.dtype, head_dim=q.shape[3]),
    )
    for repetition in range(repetitions + 2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        dist.barrier(group)
        torch.cuda.synchronize()
        marks[0].record()
        out = attend(q, k, v, handle)
        marks[1].record()
        torch.autograd.grad(out, (q, k, v), tensors[3])
        marks[2].record()
        torch.cuda.synchronize()
        times = torch.tensor([marks[0].elapsed_time(m) / 1e3 for m in marks[1:]], device=q.device)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
        if repetition >= 2:
            rows["forward_s"].append(float(times[0]))
            rows["both_s"].append(float(times[1]))
    peak = torch.tensor([torch.cuda.max_memory_allocated() - held], device=q.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return medians | {"peak_added_bytes": int(peak), "took": bound(handle).built.method}


def main(argv: list[str] | None = None) -> int:
    """The whole benchmark on this rank."""
    parser = argparse.ArgumentParser(prog="longspan.bench.attention_cuda", description=__doc__)
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "auto"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[65536])
    parser.add_argument("--masks", nargs="*", default=["causal", "full", "causal_document"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", nargs="*", type=int, default=[32, 8])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    group, world = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    alone = dist.new_group([rank], use_local_synchronization=True)
    assert isinstance(alone, dist.ProcessGroup)
    gates, rows = {}, []
    for method in options.methods:
        started_s = time.monotonic()
        gates[method] = "" if method == "auto" else gate(method, group, device)
        if rank == 0:
            print(f"gate {method:16} {gates[method] or 'exact'}  ({time.monotonic() - started_s:.1f} s)", flush=True)
    for s in options.lengths:
        for name in options.masks:
            for g in options.kv_heads:
                shape = {"heads": options.heads, "kv_heads": g, "head_dim": options.head_dim}
                mask = Problem(mask=name, length=s, dtype="bf16", **shape).make_mask()
                draw = torch.Generator(device).manual_seed(s)  # alike on all ranks
                whole = [
                    torch.randn(1, s, n, options.head_dim, generator=draw, device=device, dtype=torch.bfloat16)
                    for n in (options.heads, g, g, options.heads)
                ]
                ideal = timed(whole, mask, alone, "ring", options.repetitions)
                for method in (m for m in options.methods if not gates[m]):
                    try:
                        parts = [shard(x, mask, group, method=method) for x in whole]
                        row = timed(parts, mask, group, method, options.repetitions)
                    except ValueError as error:
                        row = {"refused": str(error)}
                    row |= {"mask": name, "length": s, "kv_heads": g, "method": method, "alone": ideal}
                    rows.append(row)
                    if rank == 0:
                        print(_line(row, world), flush=True)
    if rank == 0:
        record = {
            "suite": "attention_cuda",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"torchrun --nproc-per-node {world} -m {__spec__.name} {' '.join(argv or sys.argv[1:])}",
            "versions": {
                "longspan": __version__,
                "torch": torch.__version__,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            },
            "hardware": f"{world} x {torch.cuda.get_device_name()}",
            "heads": options.heads,
            "head_dim": options.head_dim,
            "gate": {m: text or "exact" for m, text in gates.items()},
            "rows": rows,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "attention_cuda.json").write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()
    return 1 if any(gates.values()) else 0


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record: times in ms, and in brackets the share of the ideal."""
    world = int(record["hardware"].split()[0])
    lines = ["| mask | KV heads | method | forward | backward | added MiB |", "|---|---:|---|---:|---:|---:|"]
    for row in record["rows"]:
        if "refused" not in row:
            alone, backward_s = row["alone"], row["both_s"] - row["forward_s"]
            shares = (
                alone["forward_s"] / world / row["forward_s"],
                (alone["both_s"] - alone["forward_s"]) / world / backward_s,
            )
            forward = f"{1e3 * row['forward_s']:.1f} ({shares[0]:.0%})"
            backward = f"{1e3 * backward_s:.1f} ({shares[1]:.0%})"
            added = f"{row['peak_added_bytes'] / 2**20:,.0f}"
            lines.append(
                f"| {row['mask']} | {row['kv_heads']} | `{row['method']}` | {forward} | {backward} | {added} |"
            )
    return "\n".join(lines)


def _line(row: dict[str, Any], world: int) -> str:
    head = f"{row['mask']:16} s {row['length']:7} g {row['kv_heads']:3} {row['method']:16}"
    if "refused" in row:
        return f"{head} refused: {row['refused'][:80]}"
    ideal = row["alone"]
    backward, alone = row["both_s"] - row["forward_s"], ideal["both_s"] - ideal["forward_s"]
    forward = ideal["forward_s"] / world / row["forward_s"]
    return (
        f"{head} forward {1e3 * row['forward_s']:8.2f} ms ({forward:4.0%} of ideal)"
        f"  backward {1e3 * backward:8.2f} ms ({alone / world / backward:4.0%})"
        f"  took {row['took']:16} added {row['peak_added_bytes'] / 2**20:7.0f} MiB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
