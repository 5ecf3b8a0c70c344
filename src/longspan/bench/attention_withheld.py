"""Every rank of a split attention timed alone on one GPU, its arrivals withheld as a wire would. Run:

    python -m longspan.bench.attention_withheld --ranks 8 --length 65536 --out OUT

Gates: at a short length forward and gradients against the formula in float64, at the full length against the single
kernel. The ideal is the single kernel's time over the ranks; a schedule counts as fast as its *slowest* rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan import __version__
from longspan.attention.kernels import pick
from longspan.attention.kernels.contract import row_sums
from longspan.attention.masks import Mask
from longspan.bench.attention_cell import Problem
from longspan.bench.exact import excess, formula, make_inputs
from longspan.context.build import checked_schedule
from longspan.context.choose import default_layout, layout_of
from longspan.context.emulate import Emulation, emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.schedule import Schedule
from longspan.context.withhold import rank_times

_GATE_LENGTH = 2048
_APART = 2.0**-6  # of the largest element: two roundings to bf16 on either side


def _schedule(mask: Mask, name: str, ranks: int, heads: int, kv_heads: int) -> tuple[Schedule, Geometry]:
    """Of a method, on a layout that is named after @ or on its own."""
    method, _, layout_name = name.partition("@")
    layout = layout_of(layout_name, mask, ranks) if layout_name else default_layout(mask, ranks, method)
    return checked_schedule(mask, layout, method, heads, kv_heads), Geometry(mask, layout)


def gate(problem: Problem, method: str, ranks: int, settings: Settings) -> float:
    """Error of the emulated ranks as a multiple of what is allowed, at a short length (``bench.exact``)."""
    device = torch.device("cuda")
    short = replace(problem, length=_GATE_LENGTH)
    mask = short.make_mask()
    inputs = make_inputs(short.length, h=short.heads, g=short.kv_heads, d=short.head_dim, dtype=torch.bfloat16).to(
        device
    )
    allowed = mask.dense().to(device)
    exact, plain = formula(inputs.to(torch.float64), allowed), formula(inputs, allowed)
    got = emulate(*_schedule(mask, method, ranks, short.heads, short.kv_heads), *inputs[:3], settings, inputs.dout)
    return excess(_results(got), [x.cpu() for x in exact], [x.cpu() for x in plain])


def _results(got: Emulation) -> tuple[Tensor, ...]:
    assert got.grads is not None
    return (got.out, *got.grads)


def _median_s(step: Callable[[], object], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions + 2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        marks[0].record()
        step()
        marks[1].record()
        torch.cuda.synchronize()
        seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return statistics.median(seconds[2:])


def single(inputs: tuple[Tensor, ...], mask: Mask, settings: Settings, repetitions: int) -> dict[str, Any]:
    """The whole sequence in one call of the same kernel: its times, and its results in the inputs' dtype."""
    q, k, v, dout = inputs
    options = {"scale": settings.scale, "softcap": None}
    out, lse = settings.kernel.forward(q, k, v, mask.bands, **options)
    delta = row_sums(dout, out.to(q.dtype).float()).contiguous()
    grads = settings.kernel.backward(dout, q, k, v, lse, delta, mask.bands, **options)
    return {
        "forward_s": _median_s(lambda: settings.kernel.forward(q, k, v, mask.bands, **options), repetitions),
        "backward_s": _median_s(
            lambda: settings.kernel.backward(dout, q, k, v, lse, delta, mask.bands, **options), repetitions
        ),
        "results": tuple(x.to(q.dtype) for x in (out, *grads)),
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: milliseconds of the slowest rank, and the share of the ideal."""
    lines = ["| KV heads | method | forward | share | backward | share |", "|---:|---|---:|---:|---:|---:|"]
    for row in record["rows"]:
        parts = [str(row["kv_heads"]), f"`{row['method']}`"]
        for name in ("forward", "backward"):
            parts += [f"{1e3 * max(row[f'{name}_s']):.2f}", f"{row[f'{name}_share']:.1%}"]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The whole benchmark. Exit code 1 where a gate is red."""
    parser = argparse.ArgumentParser(prog="longspan.bench.attention_withheld", description=__doc__)
    parser.add_argument("--methods", nargs="*", default=["zigzag", "all_gather", "mask_aware", "staged_ulysses"])
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", nargs="*", type=int, default=[32, 8])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--bytes-per-s", type=float, default=450e9)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for kv_heads in options.kv_heads:
        problem = Problem(
            mask=options.mask, length=options.length, heads=options.heads, kv_heads=kv_heads,
            head_dim=options.head_dim, dtype="bf16",
        )  # fmt: skip
        mask = problem.make_mask()
        draw = torch.Generator("cuda").manual_seed(0)
        q, k, v, dout = (
            torch.randn(1, options.length, n, options.head_dim, generator=draw, device="cuda", dtype=torch.bfloat16)
            for n in (options.heads, kv_heads, kv_heads, options.heads)
        )
        inputs = q, k, v, dout
        settings = Settings(pick(inputs[0], softcap=None), options.head_dim**-0.5, None)
        alone = single(inputs, mask, settings, options.repetitions)
        for method in options.methods:
            row: dict[str, Any] = {"method": method, "kv_heads": kv_heads, "ranks": options.ranks}
            row["gate"] = gate(problem, method, options.ranks, settings)
            if row["gate"] <= 1:
                schedule, geometry = _schedule(mask, method, options.ranks, options.heads, kv_heads)
                forward, backward, result = rank_times(
                    schedule, geometry, inputs, settings,
                    bytes_per_s=options.bytes_per_s, repetitions=options.repetitions,
                )  # fmt: skip
                row["against_single"] = max(
                    float((a.double() - b.double()).abs().max() / b.double().abs().max())
                    for a, b in zip(_results(result), alone["results"], strict=True)
                )
                del result
                right = row["against_single"] <= _APART
                for name, times in (("forward", forward), ("backward", backward)) if right else ():
                    slowest = max(times, key=lambda t: t.time_s)
                    row[f"{name}_s"] = [t.time_s for t in times]
                    row[f"{name}_share"] = alone[f"{name}_s"] / options.ranks / slowest.time_s
                    row[f"{name}_host_s"] = max(t.host_s for t in times)
                    row[f"{name}_wire_s"] = [(t.wire_s, t.wanted_wire_s) for t in times]
            rows.append(row | {f"single_{name}_s": alone[f"{name}_s"] for name in ("forward", "backward")})
            print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
            torch.cuda.empty_cache()
    record = {
        "suite": "attention_withheld",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m longspan.bench.attention_withheld " + " ".join(sys.argv[1:]),
        "versions": {"longspan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": torch.cuda.get_device_name(),
        "config": {name: value for name, value in vars(options).items() if name != "out"},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention_withheld.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["gate"] > 1 or row.get("against_single", 0) > _APART for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
