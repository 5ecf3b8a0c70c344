"""The end of a run: baselines on the same bytes, the exported model, a sampled completion, the report."""

from __future__ import annotations

import math
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longspan import __version__
from longspan.attention import masks
from longspan.context.build import checked_schedule
from longspan.context.geometry import Geometry
from longspan.context.schedule import Sizes
from longspan.context.timeline import timeline
from longspan.hardware.devices import devices
from longspan.layout.mesh import AXES
from longspan.model import cost
from longspan.model.config import LearnedPositionsConfig
from longspan.model.generate import generate
from longspan.model.hf_adapter import load_adapter, save_adapter
from longspan.model.huggingface import load_pretrained, save_pretrained
from longspan.train.data.evaluation import Bigram, corpus_bytes, scored_bytes, zlib_bits_per_byte
from longspan.train.data.tokenizers import save_tokenizer
from longspan.train.metrics import read_metrics
from longspan.train.precision import compute_dtype
from longspan.train.profiling import read_ranges
from longspan.train.progress import say
from longspan.train.report import ReportData, write_report

if TYPE_CHECKING:
    from longspan.train.loop import Trainer
    from longspan.train.setting import Setting

_SAMPLE_TOKENS = 240
_TIMELINE_WORLD = 16  # more ranks than this are not drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run measured."""

    steps: int
    tokens: int
    elapsed_s: float
    stop_reason: str
    headline: Sequence[dict[str, Any]] = ()
    peak_bytes: Sequence[int] = ()
    held: Sequence[dict[str, Any]] = ()  # by rank, see `holdings`


def finish(setting: Setting, trainer: Trainer, outcome: Outcome) -> Path | None:
    """Export the model (collective), then, on rank 0, sample from it, print the result and write the report."""
    config, rank = setting.config, dist.get_rank()
    out, folder = config.out, config.out / ("adapter" if config.lora.rank else "model")
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    if not setting.not_exported:
        trainer.settle()
        try:
            if config.lora.rank:
                save_adapter(trainer.model, folder, config.lora, base=str(config.init))
            else:
                save_pretrained(trainer.model, folder)
        except OSError as error:
            raise OSError(f"the trained model could not be written to {folder}: {error}") from None
    if rank != 0:
        return None
    completion, notes = "", list(setting.notes)
    if not setting.not_exported:
        save_tokenizer(setting.tokenizer, folder)
        try:
            completion = sample(setting, folder, trainer.device)
        except ValueError as error:  # the prompt or the model do not suit; the run has its result all the same
            notes.append(f"no completion was sampled: {error}")
    if outcome.stop_reason:
        notes.append(f"stopped early: {outcome.stop_reason}")
    headline = baselines(setting, outcome.headline)
    report = write_report(out / "report.html", _report(setting, trainer, outcome, headline, completion, notes))
    lines = summary(headline, outcome, completion, setting.config.prompt if completion else "")
    kept = f"not exported: {setting.not_exported}" if setting.not_exported else str(folder)
    lines.append(f"{folder.name:<7} {kept}")
    say("\n".join([*lines, f"report  {report}"]), sys.stdout)
    return report


def baselines(setting: Setting, headline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's figures with a byte bigram's and zlib's on the same bytes."""
    if not headline:
        return []
    data = scored_bytes(next(iter(setting.windows.values())), setting.tokenizer)
    bigram = Bigram.fit(corpus_bytes(setting.train, setting.tokenizer)).bits_per_byte(data)
    zlib = zlib_bits_per_byte(data)
    return [{**row, "bigram": bigram, "zlib": zlib} for row in headline]


def sample(setting: Setting, folder: Path, device: torch.device) -> str:
    """A completion of the configured prompt by the exported model, read back from disk."""
    if not setting.config.prompt:
        return ""
    # As `longspan generate` reads it: in the precision in which training computes on the device.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = setting.config.init if setting.config.lora.rank else None
    model = load_pretrained(base or folder, dtype=dtype, device=device)
    if base is not None:
        load_adapter(model, folder)
    prompt = torch.from_numpy(setting.tokenizer.encode(setting.config.prompt))[None]
    stop = {setting.tokenizer.separator_id}
    positions = setting.decoder.positions
    room = positions.max_positions + 1 - prompt.shape[1] if isinstance(positions, LearnedPositionsConfig) else math.inf
    steps = generate(
        model,
        prompt,
        max_new_tokens=int(min(_SAMPLE_TOKENS, room)),
        temperature=0.8,
        top_p=0.95,
        seed=setting.config.seed,
        stop_ids=stop,
    )
    ids = [step[0] for step in steps]
    # A vocabulary is often padded beyond the tokenizer's: such tokens have no text.
    known = setting.tokenizer.vocab_size
    return setting.tokenizer.decode([token for token in ids if token not in stop and token < known])


def summary(headline: list[dict[str, Any]], outcome: Outcome, completion: str, prompt: str) -> list[str]:
    """The result in words for the terminal: wins and losses."""
    lines = [f"trained {outcome.steps} steps in {outcome.elapsed_s:.0f} s"]
    for row in headline:
        lines.append(
            f"held-out bits per byte at context {row['context']:>6,}: model {row['model']:.3f}   byte bigram "
            f"{row['bigram']:.3f}   zlib -9 {row['zlib']:.3f}"
        )
    if headline:
        best = min(row["model"] for row in headline)
        other = headline[0]
        against = "beats" if best < other["bigram"] else "does not beat"
        honest = "beats zlib too" if best < other["zlib"] else "zlib is still better"
        lines.append(f"the model {against} the bigram; {honest}")
    if prompt:
        lines += ["sample  " + (prompt + completion).replace("\n", "\n        ")]
    return lines


def _report(
    setting: Setting,
    trainer: Trainer,
    outcome: Outcome,
    headline: list[dict[str, Any]],
    completion: str,
    notes: list[str],
) -> ReportData:
    config, plan = setting.config, setting.plan
    records = read_metrics(config.out / "metrics.jsonl")
    length = setting.batches.max_length
    mask = masks.causal(length)
    rows_of_step = next(stage.rows for stage in setting.batches.stages if stage.length == length)
    parts = plan.row_ranks * setting.batches.num_micro(rows_of_step, plan.row_ranks)
    prepared = trainer.prepare.of(mask, -(-rows_of_step // parts))
    method, layout = next(iter(prepared.built.values())).method, prepared.layout
    attention = setting.decoder.attention
    rows: list[dict[str, Any]] = []
    if plan.context <= _TIMELINE_WORLD:
        schedule = checked_schedule(mask, layout, method, attention.num_heads, attention.kv_heads)
        sizes = Sizes(head_dim=attention.head_dim, inputs=compute_dtype(plan.precision).itemsize)
        rows = timeline(schedule.forward, Geometry(mask, layout), sizes)
    geometry = Geometry(mask, layout)
    ranks = [
        {
            "rank": rank,
            "device": trainer.device.type,
            "tokens": layout.local_sizes[place],
            "mask_area": geometry.area((layout.owned(place),), ((0, length),)),
            "memory_bytes": peak,
            **{name: value for name, value in held.items() if name not in AXES or name in plan.axes()},
        }
        for rank, (peak, held) in enumerate(zip(outcome.peak_bytes, outcome.held, strict=True))
        for place in [held["context"]]
    ]
    ownership = [
        [(s.start, s.start + (s.num_tokens - 1) * s.step + 1, s.step) for s in segments if s.num_tokens]
        for segments in layout.ranks
    ]
    parameters = sum(cost.parameters(setting.decoder).values())
    axes = " × ".join(f"{name} {size}" for name, size in plan.axes().items())
    return ReportData(
        title=f"longspan: {config.out.name}",
        summary=(
            f"{parameters:,} parameters, {outcome.steps} steps in {outcome.elapsed_s:.0f} s on {dist.get_world_size()} "
            f"ranks ({axes}), sequences up to {length:,} tokens."
        ),
        headline=headline,
        steps=[r for r in records if r["kind"] == "step"],
        evals=[r for r in records if r["kind"] == "eval"],
        events=[r for r in records if r["kind"] == "event"],
        ranks=ranks,
        axes=plan.axes(),
        num_parameters=parameters,
        ranges=read_ranges(config.out / "profile"),
        num_tokens=length,
        ownership=ownership,
        layout=layout.name,
        timeline=rows,
        time_unit="rounds of the busiest block",
        schedule=f"{method}, forward",
        prompt=config.prompt if completion else "",
        completion=completion,
        config={"train": config.to_dict(), "model": setting.decoder.to_dict()},
        plan=plan.to_dict(),
        hardware={device.name: device.kind for device in devices()},
        versions={"longspan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        command=setting.command or shlex.join(sys.argv),
        metrics_file=str(config.out / "metrics.jsonl"),
        notes=notes,
    )
