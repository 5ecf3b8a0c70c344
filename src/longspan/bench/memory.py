"""What each way of saving memory saves and costs on this machine: peak memory and tokens/s by sequence length.
``longspan bench memory``.

Each cell is a process of its own, so that one which runs out of memory is a row like the others. Gate: on a short
sequence, in the cell's own process, loss and every gradient must equal those of the plain run (nothing recomputed,
tiled or moved) by 1e-5 of the largest in fp32, 3e-2 in bf16; otherwise the cell has no figure.

Weights are random; with adapters (``lora``) the rest is frozen and has no gradients. With a ``window`` each token
attends to the latest keys alone: the same memory as a causal mask, and far less time, for lengths at which the latter
takes minutes. A step is forward, backward and, where layers are streamed, the arrival of all gradients on the host;
with ``optimizer`` also AdamW's, whose moments are in the dtype of the weights (on CUDA bf16, rounded by chance).
"Peak" is what the process held most, less what it held before the model was made. On a CPU, where device and host are
one memory, peaks say nothing of offload; times say what the copies cost there.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from longspan.attention import masks
from longspan.bench.record import head, now, quartiles
from longspan.context.sequence import SequenceContext, windowed
from longspan.hardware.devices import default_device, peak_memory_bytes, reset_peak_memory, resident_bytes
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.layer_stream import LayerStream
from longspan.model.lora import LoraConfig, apply_lora
from longspan.model.recompute import Recompute
from longspan.plan.plan import Offload, Plan
from longspan.train.adamw import round_step
from longspan.train.config import ModelConfig, OptimConfig
from longspan.train.loop import make_optimizer
from longspan.train.parallel import apply_saving, stream
from longspan.train.setting import make_folder

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

    def plan(self, dtype: torch.dtype = torch.float32) -> Plan:
        """Of one rank, that computes in the dtype of the model: nothing is cast."""
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
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
class Setup:
    """What all cells of a run have.

    Args:
        layers, width, heads, kv_heads, inner, words, lora: the model; kv_heads and inner 0 for as many as heads and 8/3
            of the width, lora the rank of adapters beside frozen weights or 0.
        window: keys that a token attends to; 0 for all before it.
        offload_gib: most host memory for activations, 0 for no limit.
        optimizer: whether a step ends with AdamW's; not with streamed layers.
        steps: timed, after `warm_up`.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 0
    inner: int = 0
    words: int = 257
    lora: int = 0
    window: int = 0
    offload_gib: int = 0
    optimizer: bool = False
    steps: int = 3
    warm_up: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBenchConfig(Setup):
    """Measure what each way of saving memory saves and costs, and write JSON and a table.

    Args:
        lengths: of the one sequence of a step.
        techniques: what is measured, in this order.
        out: where the results go.
    """

    lengths: tuple[int, ...] = (4096,)
    techniques: tuple[str, ...] = tuple(technique.name for technique in TECHNIQUES)
    out: Path = Path("runs/bench_memory")

    def __post_init__(self) -> None:
        sizes = (self.layers, self.width, self.heads, self.words, self.steps, *self.lengths)
        others = (self.kv_heads, self.inner, self.lora, self.window, self.offload_gib, self.warm_up)
        if min(sizes) < 1 or min(others) < 0 or not self.lengths or not self.techniques:
            raise ValueError(
                f"lengths, sizes and steps must be positive, the rest 0 or more, got {asdict(self)}; change the one "
                "that is not"
            )
        known = {technique.name: technique for technique in TECHNIQUES}
        if unknown := [name for name in self.techniques if name not in known]:
            raise ValueError(
                f"techniques must be some of {', '.join(map(repr, known))}, got {unknown[0]!r}; pick of these"
            )
        if self.optimizer and (streamed := [name for name in self.techniques if known[name].plan().streams_layers]):
            raise ValueError(
                f"an optimizer's step is timed on what lies on the device, got optimizer with {streamed[0]!r}; name "
                "techniques without layers"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell(Setup):
    """One process: a technique at a length."""

    technique: Technique
    length: int

    def decoder(self) -> DecoderConfig:
        model = ModelConfig(
            layers=self.layers, width=self.width, heads=self.heads, kv_heads=self.kv_heads, inner=self.inner
        )
        decoder = model.decoder(self.words, self.length)
        # As Llama has it.
        return replace(decoder, attention=replace(decoder.attention, qk_norm_eps=None))


def _apply(
    model: DecoderLM, technique: Technique, device: torch.device, *, offload_gib: int = 0, min_bytes: int = 2**20
) -> LayerStream | None:
    plan = technique.plan(next(model.parameters()).dtype)
    plan = replace(plan, offload_gib=offload_gib if plan.moves_activations else 0)
    apply_saving(model, plan, min_bytes=min_bytes)
    return stream(model, plan, device)


def _step(model: DecoderLM, streamed: LayerStream | None, tokens: torch.Tensor, ctx: Any, chunk: int | None) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], ctx, chunk_tokens=tokens.shape[1] if chunk == 0 else chunk)[0]
    loss.backward()
    if streamed is not None:
        streamed.flush()
    return float(loss.detach()) / (tokens.shape[1] - 1)


def _context(length: int, device: torch.device, window: int) -> SequenceContext:
    mask = masks.causal(length)
    return SequenceContext(windowed(mask, window) if 0 < window < length else mask, device=device)


def _tokens(cell: Cell, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, cell.words, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(device)


def _model(cell: Cell, device: torch.device, dtype: torch.dtype) -> DecoderLM:
    """Random weights drawn where they lie: billions of them would take the host minutes."""
    model = build(cell.decoder(), device="meta", dtype=dtype)
    if cell.lora:
        apply_lora(model, LoraConfig(rank=cell.lora))
        model.to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, cell.width**-0.5) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def gate(cell: Cell, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from the plain run, of the loss and of each gradient by its largest value."""
    small = replace(
        cell,
        length=_GATE_TOKENS,
        layers=min(cell.layers, 4),
        width=64,
        heads=2,
        kv_heads=min(cell.kv_heads, 1),
        inner=0,
        window=min(cell.window, 40),
        words=257,
    )
    torch.manual_seed(1)
    plain = _model(small, torch.device("cpu"), dtype)
    other = copy.deepcopy(plain)
    # As the cell has it, but for sizes: so small that everything is tiled, chunked and moved here too.
    technique = replace(
        cell.technique,
        mlp_tile=min(cell.technique.mlp_tile, 32),
        loss_chunk=32 if cell.technique.loss_chunk is None else cell.technique.loss_chunk,
    )
    ctx, tokens = _context(_GATE_TOKENS, device, small.window), _tokens(small, _GATE_TOKENS, device)
    plain.to(device)
    want = _step(plain, None, tokens, ctx, 0)
    if not technique.plan().streams_layers:
        other.to(device)
    got = _step(other, _apply(other, technique, device, min_bytes=0), tokens, ctx, technique.loss_chunk)
    worst = abs(got - want) / abs(want)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        if not p.requires_grad:
            continue
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
    model = _model(cell, torch.device("cpu") if cell.technique.plan().streams_layers else device, dtype)
    streamed = _apply(model, cell.technique, device, offload_gib=cell.offload_gib)
    ctx, tokens = _context(cell.length, device, cell.window), _tokens(cell, cell.length, device)
    optimizer = make_optimizer(model, OptimConfig()) if cell.optimizer else None
    times, one = [], torch.ones((), dtype=torch.float64, device=device)
    for _ in range(cell.warm_up + cell.steps):
        start = time.perf_counter()
        _step(model, streamed, tokens, ctx, cell.technique.loss_chunk)
        if optimizer is not None and dtype == torch.bfloat16:
            round_step(optimizer, one, 0)
        elif optimizer is not None:
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step_s = quartiles(times[cell.warm_up :])
    return {
        "device": device.type,
        "difference": difference,
        "peak_bytes": peak_memory_bytes(device) - before,
        "parameter_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "step_s": step_s,
        "tokens_per_s": cell.length / step_s[1],
    }


def run_memory_bench(config: MemoryBenchConfig) -> int:
    """All cells of a config. Returns the exit code."""
    make_folder(config.out)
    shared = {item.name: getattr(config, item.name) for item in fields(Setup)}
    by_name = {technique.name: technique for technique in TECHNIQUES}
    cells = [
        Cell(**shared, technique=by_name[name], length=length)
        for length in config.lengths
        for name in config.techniques
    ]
    print(f"results {run(cells, config.out)} and {config.out / 'memory.md'}")
    return 0


def run(cells: Sequence[Cell], out: Path) -> Path:
    """All cells, each in a process of its own; writes ``memory.json`` and ``memory.md``, with every row anew."""
    record: dict[str, Any] = {**head("memory", now()), "rows": []}
    path = out / "memory.json"
    for cell in cells:
        command = [sys.executable, "-m", "longspan.bench.memory", json.dumps(asdict(cell))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # A process that the system killed ran out of host memory, in all likelihood.
        status = {0: "ok", _OUT_OF_MEMORY: "out of memory", -9: "killed", _FAILED_GATE: "refused"}.get(done.returncode)
        if status is None:
            raise RuntimeError(f"{cell.technique.name} at {cell.length} tokens failed: {done.stderr.strip()[-2000:]}")
        row = {"cell": asdict(cell), "status": status}
        why = done.stderr.strip().split("\n")[-1][:300]
        row |= json.loads(done.stdout.splitlines()[-1]) if status == "ok" else {"why": why}
        record["rows"].append(row)
        print(_line(row), flush=True)
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


def main() -> int:
    """One cell, given as JSON."""
    values = json.loads(sys.argv[1])
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


if __name__ == "__main__":
    sys.exit(main())
