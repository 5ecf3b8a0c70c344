"""A training step on one device: ours, Hugging Face's and torchtitan's, beside the floor. ``longspan bench step``.

All start from one checkpoint of random weights and take the same batch at every step, with the same AdamW and the same
clipping. Every cell (who, how long a sequence) is a process of its own, so that one which runs out of memory or is not
installed is a row like the others. The floor (`longspan.bench.floor`) is timed in the same run.

Gate: at each length, losses before and after the first update must be those of the first contender that ran there
(relative 2e-3 and 1e-2: all compute in bf16, and Hugging Face updates in it too); a row that fails has no figure. Later
losses are in the record, and are compared by nobody: a batch taken again and again is soon known by heart.
Times are of ``steps`` steps one after another, waited for at their end, three times; a row has the quartiles.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from longspan.bench.floor import measure_floor, model_flops
from longspan.bench.record import Row, head, now, quartiles
from longspan.context.choose import preset_of
from longspan.hardware.devices import default_device, device_name, peak_memory_bytes, reset_peak_memory
from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import build
from longspan.model.huggingface import save_pretrained
from longspan.plan.plan import Plan
from longspan.train.config import OptimConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.launch import discover, init_process_group
from longspan.train.loop import Trainer
from longspan.train.setting import make_folder
from longspan.train.utilisation import peak_flop_per_s

Contender = Literal[
    "floor",
    "ours",
    "ours_pure",
    "ours_eager",
    "transformers",
    "transformers_compiled",
    "torchtitan",
    "torchtitan_compiled",
]
Shape = Literal["llama-1b", "tiny"]
_OPTIM = OptimConfig(lr=1e-4, warmup=0, final=1.0)
_PURE = ("ours_pure", "transformers")  # weights and moments in bf16 alone
_WARM_UP, _ROUNDS = 2, 3
_GATES = {"first_loss": 2e-3, "second_loss": 1e-2}
_OUT_OF_MEMORY, _NOT_INSTALLED, _REFUSED = 3, 4, 5
_STATUS = {0: "ok", _OUT_OF_MEMORY: "out of memory", _NOT_INSTALLED: "not installed", _REFUSED: "refused"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBenchConfig:
    """Measure a training step on one device, ours and others', and write JSON and a table.

    Args:
        shape: "llama-1b": 16 layers of width 2048, 32:8 heads of 64, mlp 8192, 128,256 words, tied; "tiny" for trying.
        contenders: who runs, in this order; "floor" is the step that nothing can go below. "ours" keeps fp32 weights
            and moments, as torchtitan does; "ours_pure" has bf16 alone, as transformers has.
        activation_budget: of `ours`, whose blocks are compiled, as a plan has it: below 1 where activations do not fit.
        recompute: activation checkpointing of the others.
        steps: of each of three timed rounds.
        out: where the results go.
    """

    shape: Shape = "llama-1b"
    lengths: tuple[int, ...] = (8192,)
    contenders: tuple[Contender, ...] = get_args(Contender)
    activation_budget: float = 1.0
    recompute: bool = False
    steps: int = 5
    out: Path = Path("runs/bench_step")

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 8 or self.steps < 1 or not self.contenders:
            raise ValueError(
                f"lengths must be 8 tokens or more, and there must be steps and contenders, got {self.lengths}, "
                f"{self.steps} and {self.contenders}; change the one that is not so"
            )


def shape_config(shape: Shape) -> DecoderConfig:
    """The model of a shape."""
    layers, width, heads, kv_heads, inner, words = (16, 2048, 32, 8, 8192, 128256)
    if shape == "tiny":
        layers, width, heads, kv_heads, inner, words = (2, 64, 4, 2, 128, 512)
    return DecoderConfig(
        num_layers=layers,
        hidden_size=width,
        vocab_size=words,
        attention=AttentionConfig(num_heads=heads, head_dim=width // heads, num_kv_heads=kv_heads),
        mlp=MlpConfig(inner_size=inner),
        positions=RotaryConfig(theta=5e5, max_positions=2**20),
        tie_embeddings=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One process: who, at which length, and how."""

    contender: Contender
    shape: Shape
    length: int
    steps: int
    activation_budget: float
    recompute: bool
    weights: str


def _batch(config: DecoderConfig, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))


def _ours(cell: Cell, config: DecoderConfig, device: torch.device) -> tuple[Callable[[], Any], dict[str, Any]]:
    init_process_group(600.0, launch=discover())
    compiled = cell.contender != "ours_eager"
    plan = Plan(
        context=1,
        compile=compiled,
        activation_budget=cell.activation_budget if compiled else 1.0,
        precision="pure_bf16" if cell.contender == "ours_pure" else "auto",
    )
    trainer = Trainer(TrainConfig(init=Path(cell.weights), optim=_OPTIM), config, plan, device)
    tokens = _batch(config, cell.length)
    batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], lengths=None, num_labels=cell.length, position=0)
    about = {"plan": trainer.plan.to_dict(), "notes": [f"precision {trainer.plan.precision}"]}
    return lambda: trainer.step(0, 1, [(batch, None)])["loss"], about


def _theirs(cell: Cell, config: DecoderConfig, device: torch.device) -> tuple[Callable[[], Any], dict[str, Any]]:
    from longspan.bench import peers

    make = peers.hugging_face if cell.contender.startswith("transformers") else peers.torchtitan
    peer = make(
        config,
        Path(cell.weights),
        _batch(config, cell.length),
        compiled=cell.contender.endswith("_compiled"),
        recompute=cell.recompute,
        device=device,
        optim=_OPTIM,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    return peer.step, {"version": peer.version, "parameters": peer.parameters, "notes": [*peer.notes]}


def measure(cell: Cell) -> Row:
    """The figures of one cell, in this process."""
    device, config = default_device(), shape_config(cell.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = None
    if device.type == "cuda":
        peak = peak_flop_per_s(device_name(device), preset_of(device), "bf16")
    if cell.contender == "floor":
        floor = measure_floor(config, cell.length, device, dtype)
        steps = {"step_s": [floor.step_s] * 3, "pure_step_s": [floor.pure_step_s] * 3}
        return {**floor._asdict(), **steps, "peak_flop_per_s": peak}
    step, about = (_ours if cell.contender.startswith("ours") else _theirs)(cell, config, device)
    start = time.perf_counter()
    losses = [float(step())]
    first_s = time.perf_counter() - start
    losses += [float(step()) for _ in range(_WARM_UP - 1)]
    gc.collect()
    reset_peak_memory(device)
    times = []
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        losses += [step() for _ in range(cell.steps)]
        _wait(device)
        times.append((time.perf_counter() - start) / cell.steps)
    row = {
        **about,
        "step_s": quartiles(times),
        "first_step_s": first_s,
        "first_loss": float(losses[0]),
        "second_loss": float(losses[1]),
        "losses": [float(loss) for loss in losses],
        "peak_bytes": peak_memory_bytes(device),
        "peak_flop_per_s": peak,
    }
    if dist.is_initialized():
        dist.destroy_process_group()
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_step_bench(config: StepBenchConfig) -> int:
    """All cells, each in a process of its own; writes ``step.json`` and ``step.md``. Returns the exit code: 1 where a
    row failed, or failed the gate."""
    make_folder(config.out)
    decoder, rows = shape_config(config.shape), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        if set(config.contenders) - {"floor"}:
            model = build(decoder, device="cpu", dtype=torch.float32, seed=0)
            save_pretrained(model, weights, dtype=torch.bfloat16)
            del model
        for length in config.lengths:
            for contender in config.contenders:
                given = {f.name: getattr(config, f.name) for f in fields(Cell) if hasattr(config, f.name)}
                cell = Cell(**given, contender=contender, length=length, weights=str(weights))
                rows.append(_row(cell, rows, decoder))
                print(_line(rows[-1]), flush=True)
    record = {**head("step", now()), "model": decoder.to_dict(), "rows": rows}
    (config.out / "step.json").write_text(json.dumps(record, indent=2) + "\n")
    (config.out / "step.md").write_text(table(record))
    print(f"results {config.out / 'step.json'} and {config.out / 'step.md'}")
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def _row(cell: Cell, earlier: Sequence[Row], config: DecoderConfig) -> Row:
    command = [sys.executable, "-m", "longspan.bench.step", json.dumps(asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    status = _STATUS.get(done.returncode, "failed")
    named = {name: value for name, value in asdict(cell).items() if name != "weights"}
    if status != "ok":
        return {"cell": named, "status": status, "why": done.stderr.strip()[-600:]}
    row = {"cell": named, "status": "ok", **json.loads(done.stdout.splitlines()[-1])}
    base = next((r for r in earlier if r["cell"]["length"] == cell.length and "first_loss" in r), row)
    for name, tolerance in _GATES.items() if "first_loss" in row else ():
        # Not `>`, which a loss that is no number would pass.
        if not abs(row[name] - base[name]) <= tolerance * abs(base[name]):
            why = f"{name} must be that of {base['cell']['contender']}, {base[name]}, got {row[name]}"
            return {"cell": named, "status": "wrong", "why": why}
    row["tokens_per_s"] = cell.length / row["step_s"][1]
    if row["peak_flop_per_s"] is not None:  # of a card that is known by name
        row["mfu"] = model_flops(config, cell.length) / row["step_s"][1] / row["peak_flop_per_s"]
    return row


def _line(row: Row) -> str:
    cell, figures = row["cell"], row["status"]
    if row["status"] == "ok":
        figures = f"{row['step_s'][1] * 1e3:10,.1f} ms  {row['tokens_per_s']:>10,.0f} tokens/s"
    else:
        figures += ": " + row["why"].split("\n")[-1][:160]
    return f"length {cell['length']:>7,}  {cell['contender']:<22} {figures}"


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table; every ratio is to a row of the same length: of who keeps weights in bf16 alone,
    to the floor with such an optimiser and to "ours_pure", where there are these."""
    lines = [
        "| length | who | step (ms) | tokens/s | MFU | floor ÷ step | peak (GiB) | ours ÷ it |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cell = row["cell"]
        if row["status"] != "ok":
            lines.append(f"| {cell['length']:,} | {cell['contender']} | {row['status']} | | | | | |")
            continue
        same = {r["cell"]["contender"]: r for r in record["rows"] if r["cell"]["length"] == cell["length"]}
        ratios = []
        pure = cell["contender"].startswith(_PURE)
        ours = "ours_pure" if pure and same.get("ours_pure", {"status": ""})["status"] == "ok" else "ours"
        for name, over in (("floor", True), (ours, False)):
            other = same.get(name, {"status": ""})
            known = other["status"] == "ok" and cell["contender"] != name
            other_s = other.get("pure_step_s" if pure else "step_s", other.get("step_s"))
            pair = (other_s[1], row["step_s"][1]) if known else (0, 1)
            ratios.append(f"{pair[0] / pair[1] if over else pair[1] / pair[0]:.3f}" if known else "")
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
        mfu = f"{row['mfu']:.3f}" if "mfu" in row else ""
        lines.append(
            f"| {cell['length']:,} | {cell['contender']} | {row['step_s'][1] * 1e3:,.1f} | {row['tokens_per_s']:,.0f} "
            f"| {mfu} | {ratios[0]} | {peak} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """One cell, given as JSON."""
    from longspan.bench.peers import NotInstalledError

    try:
        print(json.dumps(measure(Cell(**json.loads(sys.argv[1])))))
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(str(error).split("\n")[0], file=sys.stderr)
        return _OUT_OF_MEMORY
    except NotInstalledError as error:
        print(error, file=sys.stderr)
        return _NOT_INSTALLED
    except ValueError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
