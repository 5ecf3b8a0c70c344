"""What each way of saving memory saves and costs on this machine: peak memory and tokens/s by sequence length. Run:

    python -m longspan.bench.memory --lengths 16384 131072 --layers 16 --width 2048 --out OUT

Each cell is a process of its own, so that one which runs out of memory is a row like the others. Gate: on a short
sequence, in the cell's own process, loss and every gradient must equal those of the plain run (nothing recomputed,
tiled or moved) by 1e-5 of the largest in fp32, 3e-2 in bf16; otherwise the cell has no figure.

A step is forward, backward and, where layers are streamed, the arrival of all gradients on the host; no optimiser.
"Peak" is what the process held most, less what it held before the model was made. On a CPU, where device and host are
one memory, peaks say nothing of offload; times say what the copies cost there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longspan.attention import masks
from longspan.bench.record import head, now, quartiles
from longspan.context.sequence import SequenceContext
from longspan.hardware.devices import default_device, peak_memory_bytes, reset_peak_memory, resident_bytes
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.layer_stream import LayerStream
from longspan.plan.plan import Offload, Plan, Recompute
from longspan.train.config import ModelConfig
from longspan.train.parallel import apply_saving, stream

_GATE_TOKENS = 96
_OUT_OF_MEMORY = 3
_FAILED_GATE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Technique:
    """One way of saving memory, by a name for the table.

    Args:
        loss_chunk: tokens whose logits are there at a time; 0 for all, None for the decoder's default.
    """

    name: str
    recompute: Recompute = "none"
    mlp_tile: int = 0
    loss_chunk: int | None = None
    offload: Offload = "none"

    def plan(self, precision: Any) -> Plan:
        return Plan(
            context=1, recompute=self.recompute, mlp_tile=self.mlp_tile, offload=self.offload, precision=precision
        )


TECHNIQUES = (
    Technique(name="plain", loss_chunk=0),
    Technique(name="chunked loss"),
    Technique(name="recompute full", recompute="full"),
    Technique(name="recompute attention", recompute="attention"),
    Technique(name="and mlp tiles", recompute="attention", mlp_tile=4096),
    Technique(name="and activations", recompute="attention", mlp_tile=4096, offload="activations"),
    Technique(name="full, tiles, activations", recompute="full", mlp_tile=4096, offload="activations"),
    Technique(name="layers", offload="layers"),
    Technique(name="and layers", recompute="attention", mlp_tile=4096, offload="layers"),
    Technique(name="all", recompute="attention", mlp_tile=4096, offload="both"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One process: a technique at a length, of a model of this shape."""

    technique: Technique
    length: int
    layers: int
    width: int
    heads: int
    steps: int

    def decoder(self) -> DecoderConfig:
        return ModelConfig(layers=self.layers, width=self.width, heads=self.heads).decoder(257, self.length)


def _apply(model: DecoderLM, technique: Technique, device: torch.device, **options: int) -> LayerStream | None:
    plan = technique.plan("fp32")  # the model is in the dtype of the device already: nothing is cast
    apply_saving(model, plan, **options)
    return stream(model, plan, device)


def _step(model: DecoderLM, streamed: LayerStream | None, tokens: torch.Tensor, ctx: Any, chunk: int | None) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], ctx, chunk_tokens=tokens.shape[1] if chunk == 0 else chunk)[0]
    loss.backward()
    if streamed is not None:
        streamed.flush()
    return float(loss.detach()) / (tokens.shape[1] - 1)


def _context(length: int, device: torch.device) -> SequenceContext:
    return SequenceContext(masks.causal(length), device=device)


def _tokens(length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(device)


def gate(cell: Cell, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from the plain run, of the loss and of each gradient by its largest value."""
    small = ModelConfig(layers=min(cell.layers, 4), width=64, heads=2).decoder(257, _GATE_TOKENS)
    plain = build(small, device="cpu", dtype=dtype, seed=1)
    other = copy.deepcopy(plain)
    # As the cell has it, but for sizes: so small that everything is tiled, chunked and moved here too.
    technique = replace(
        cell.technique,
        mlp_tile=min(cell.technique.mlp_tile, 32),
        loss_chunk=32 if cell.technique.loss_chunk is None else cell.technique.loss_chunk,
    )
    ctx, tokens = _context(_GATE_TOKENS, device), _tokens(_GATE_TOKENS, device)
    plain.to(device)
    want = _step(plain, None, tokens, ctx, 0)
    if technique.offload not in ("layers", "both"):
        other.to(device)
    got = _step(other, _apply(other, technique, device, min_bytes=0), tokens, ctx, technique.loss_chunk)
    worst = abs(got - want) / abs(want)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        reference, grad = p.grad.float().cpu(), q.grad.float().cpu()
        worst = max(worst, float((grad - reference).abs().max() / reference.abs().max()))
    return worst


def measure(cell: Cell) -> dict[str, Any]:
    """The figures of one cell, in this process. Raises ValueError where the gate fails."""
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    difference, limit = gate(cell, device, dtype), 3e-2 if dtype == torch.bfloat16 else 1e-5
    if not difference <= limit:  # not `>`, which a number that is none would pass
        raise ValueError(
            f"{cell.technique.name} must equal the plain run by {limit:g}, got {difference:g}; no figure was kept"
        )
    gc.collect()
    before = resident_bytes(device)
    reset_peak_memory(device)
    streams = cell.technique.offload in ("layers", "both")
    model = build(cell.decoder(), device="cpu" if streams else device, dtype=dtype)
    streamed = _apply(model, cell.technique, device)
    ctx, tokens = _context(cell.length, device), _tokens(cell.length, device)
    times = []
    for _ in range(cell.steps + 1):
        start = time.perf_counter()
        _step(model, streamed, tokens, ctx, cell.technique.loss_chunk)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step_s = quartiles(times[1:])
    return {
        "device": device.type,
        "difference": difference,
        "peak_bytes": peak_memory_bytes(device) - before,
        "parameter_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "step_s": step_s,
        "tokens_per_s": cell.length / step_s[1],
    }


def run(cells: Sequence[Cell], out: Path) -> Path:
    """All cells, each in a process of its own; writes ``memory.json`` and ``memory.md``."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        command = [sys.executable, "-m", "longspan.bench.memory", "--cell", json.dumps(asdict(cell))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # A process that the system killed ran out of host memory, in all likelihood.
        status = {0: "ok", _OUT_OF_MEMORY: "out of memory", -9: "killed", _FAILED_GATE: "refused"}.get(done.returncode)
        if status is None:
            raise RuntimeError(f"{cell.technique.name} at {cell.length} tokens failed: {done.stderr.strip()[-2000:]}")
        row = {"cell": asdict(cell), "status": status}
        row |= json.loads(done.stdout.splitlines()[-1]) if status == "ok" else {"why": done.stderr.strip()[-300:]}
        rows.append(row)
        print(_line(row), flush=True)
    record = {**head("memory", now()), "rows": rows}
    path = out / "memory.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    (out / "memory.md").write_text(table(record))
    return path


def _line(row: dict[str, Any]) -> str:
    cell = row["cell"]
    figures = row["status"]
    if row["status"] == "ok":
        figures = f"{row['peak_bytes'] / 2**30:8.2f} GiB  {row['tokens_per_s']:>10,.0f} tokens/s"
    return f"length {cell['length']:>9,}  {cell['technique']['name']:<26} {figures}"


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = ["| length | technique | peak (GiB) | tokens/s |", "|---:|---|---:|---:|"]
    for row in record["rows"]:
        cell, figures = row["cell"], f"{row['status']} | "
        if row["status"] == "ok":
            figures = f"{row['peak_bytes'] / 2**30:.2f} | {row['tokens_per_s']:,.0f}"
        lines.append(f"| {cell['length']:,} | {cell['technique']['name']} | {figures} |")
    return "\n".join(lines) + "\n"


def _one(text: str) -> int:
    values = json.loads(text)
    cell = Cell(**{**values, "technique": Technique(**values["technique"])})
    try:
        print(json.dumps(measure(cell)))
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(str(error).split("\n")[0], file=sys.stderr)
        return _OUT_OF_MEMORY
    except ValueError as error:
        print(error, file=sys.stderr)
        return _FAILED_GATE
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="peak memory and tokens/s by technique and sequence length")
    parser.add_argument("--cell", help="one cell as JSON, measured in this process")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    names = [technique.name for technique in TECHNIQUES]
    parser.add_argument("--techniques", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    args = parser.parse_args(argv)
    if args.cell is not None:
        return _one(args.cell)
    shape = {"layers": args.layers, "width": args.width, "heads": args.heads, "steps": args.steps}
    chosen = [technique for technique in TECHNIQUES if technique.name in args.techniques]
    print(run([Cell(technique=t, length=n, **shape) for n in args.lengths for t in chosen], args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
