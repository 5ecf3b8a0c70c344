"""A whole training run on one rank: data, model, loop, checkpoints, and what is left behind at the end.

``run`` is what every rank executes, however it was started (alone, by ``--ranks``, torchrun or Slurm). Everything is
written below ``config.out``: config.json, plan.json, model.json, metrics.jsonl, checkpoints/, model/ (for Hugging Face)
and report.html.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.context.build import resolve as resolve_schedule
from longspan.model.config import DecoderConfig
from longspan.model.huggingface import read_config
from longspan.plan.plan import Plan
from longspan.train.checkpoint import CheckpointStore
from longspan.train.config import TrainConfig
from longspan.train.data.batches import BatchPlan
from longspan.train.data.corpus import Corpus, load_splits
from longspan.train.data.evaluation import HeldOutWindows, bits_per_byte, fit_held_out, held_out_windows, scored_bytes
from longspan.train.data.loader import BatchLoader
from longspan.train.data.stream import TokenStream
from longspan.train.data.tokenizers import Tokenizer, load_tokenizer
from longspan.train.evaluate import total_nats
from longspan.train.finish import Outcome, finish
from longspan.train.launch import discover, init_process_group
from longspan.train.liveness import Heartbeat, InterruptFlag
from longspan.train.loop import Meter, NotFiniteError, Trainer, gathered, steps_of
from longspan.train.metrics import MetricsWriter
from longspan.train.parallel import refuse_unsupported
from longspan.train.progress import TrainProgress

log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made of, resolved and the same on all ranks."""

    config: TrainConfig
    plan: Plan
    decoder: DecoderConfig
    batches: BatchPlan
    tokenizer: Tokenizer
    train: Corpus
    held_out: Corpus | None
    windows: dict[int, HeldOutWindows]
    command: str


def first_on_rank_0(fn: Callable[[], _T]) -> _T:
    """``fn()`` on rank 0 and then, when its files are there, on the others. Its ValueError, or as one what
    the file system refused, is raised on all ranks."""
    outcome: list[str | None] = [None]
    value = None
    if dist.get_rank() == 0:
        try:
            value = fn()
        except (ValueError, OSError) as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise ValueError(outcome[0])
    return fn() if value is None else value


def check_folder(config: TrainConfig) -> bool:
    """Refuses a run's folder that cannot be made, or that holds another run. Before anything is written."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the run's folder {config.out} cannot be made ({error.strerror}); choose another --out"
        ) from None
    metrics, checkpoints = config.out / "metrics.jsonl", config.out / "checkpoints"
    if config.resume is None and (
        (metrics.is_file() and metrics.stat().st_size) or list(checkpoints.glob("step_*[0-9]"))
    ):
        raise ValueError(
            f"the run's folder {config.out} already holds a run; go on with --resume latest, or choose another --out"
        )
    return True


def resolve(config: TrainConfig, world: int, command: str, device_type: str) -> Setting:
    """Reads data and checks that everything fits, before anything is computed. Collective.

    Raises ValueError, on all ranks, for whatever does not fit.
    """
    plan = Plan.read(config.plan_file) if config.plan_file is not None else config.plan
    plan = plan.fit(world).on(device_type)
    refuse_unsupported(plan)
    batches = config.batch.plan()
    batches.check(plan.data)
    if min(stage.length for stage in batches.stages) < plan.context:
        raise ValueError(
            f"a sequence must have a token for every rank that shares it, got rows of "
            f"{min(stage.length for stage in batches.stages)} tokens on {plan.context} ranks; use longer rows"
        )
    resolve_schedule(
        masks.causal(batches.max_length), plan.context, plan.method, None if plan.layout == "auto" else plan.layout
    )
    first_on_rank_0(lambda: check_folder(config))
    tokenizer = load_tokenizer(config.tokenizer)
    train, held_out = first_on_rank_0(lambda: load_splits(config.data, tokenizer, config.out / "tokens"))
    if config.init is not None:
        decoder = read_config(config.init)
        if decoder.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the checkpoint {config.init} has {decoder.vocab_size} tokens, but tokenizer {config.tokenizer} has "
                f"{tokenizer.vocab_size}; give the checkpoint's own --tokenizer"
            )
    else:
        decoder = config.model.decoder(tokenizer.vocab_size, batches.max_length)
    windows: dict[int, HeldOutWindows] = {}
    if held_out is not None and config.eval.tokens:
        stream = TokenStream(held_out, config.seed)
        contexts, num_tokens = fit_held_out(stream, config.eval.contexts, config.eval.tokens)
        windows = held_out_windows(stream, contexts, num_tokens)
    return Setting(config, plan, decoder, batches, tokenizer, train, held_out, windows, command)


def held_out_score(trainer: Trainer, setting: Setting, context: int) -> tuple[float, float]:
    """(nats per token, bits per byte) of the held-out text at one context. Collective."""
    windows = setting.windows[context]
    nats, labels = total_nats(trainer.model, windows, setting.plan, trainer.mesh, trainer.device)
    return nats / labels, bits_per_byte(nats, len(scored_bytes(windows, setting.tokenizer)))


def run(config: TrainConfig, command: str = "") -> bool:
    """One rank's part of a training run. Returns whether it came to its end, which an interrupted one does not.

    Raises:
        ValueError: something does not fit, before training.
        NotFiniteError: loss or gradient not finite; the last checkpoint stands.
        LostRankError: another rank stopped or failed.
    """
    launch = discover()
    joined = init_process_group(config.timeout_s, launch=launch, device=config.device)
    torch.manual_seed(config.seed)
    try:
        setting = resolve(config, launch.world_size, command, joined.device.type)
        if joined.staged and setting.plan.shard != "none":
            raise ValueError(
                f"ranks that share one GPU talk through gloo, which cannot shard CUDA tensors, got shard "
                f"{setting.plan.shard}; use shard none, or a GPU for each rank"
            )
        watchdog_s = config.timeout_s + 10 if joined.device.type == "cuda" and not joined.staged else None
        with Heartbeat(
            config.out / "heartbeats",
            launch.rank,
            launch.world_size,
            timeout_s=config.timeout_s,
            watchdog_s=watchdog_s,
        ) as heart:
            return _train(setting, joined.device, heart)
    finally:
        dist.destroy_process_group()


def _resume_step(config: TrainConfig, store: CheckpointStore) -> int | None:
    if config.resume is None:
        return None
    if config.resume == "latest":
        return store.latest()
    digits = config.resume.removeprefix("step_")
    if not digits.isdigit():
        raise ValueError(f"resume must be 'latest' or a checkpoint such as step_000100, got {config.resume!r}")
    return int(digits)


def _train(setting: Setting, device: torch.device, heart: Heartbeat) -> bool:
    config, rank = setting.config, dist.get_rank()
    store = CheckpointStore(config.out / "checkpoints", keep=config.keep)
    trainer = Trainer(config, setting.decoder, setting.plan, device)
    done, position = 0, None
    if config.resume is not None:
        meta = store.load(_resume_step(config, store), trainer.model, trainer.optimizer)
        done, position = int(meta["step"]), int(meta["position"])
    if rank == 0:
        (config.out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        (config.out / "plan.json").write_text(setting.plan.to_json() + "\n")
        (config.out / "model.json").write_text(setting.decoder.to_json() + "\n")
    path = config.out / "metrics.jsonl"
    metrics = first_on_rank_0(
        lambda: MetricsWriter(path, resume_step=done if config.resume is not None else None) if rank == 0 else True
    )
    total = setting.batches.num_steps
    saved = done
    began = time.perf_counter()
    stop_reason = ""
    meter = Meter(device)

    def batches() -> BatchLoader:
        return BatchLoader(
            TokenStream(setting.train, config.seed),
            setting.batches,
            step=min(done, total),
            position=position,
            data_rank=trainer.mesh.data_rank,
            data_size=trainer.mesh.data_size,
            prepare=trainer.prepare,
            num_workers=config.data_workers,
        )

    loader = batches()
    steps = steps_of(loader)
    with (
        ExitStack() as opened,
        InterruptFlag(announce="longspan: saving, then leaving" if rank == 0 else None) as interrupt,
        TrainProgress(total, start_step=done, enabled=rank == 0) as progress,
    ):
        opened.callback(lambda: loader.close())

        def save() -> None:
            meta: dict[str, Any] = {"step": done, "position": position, "config": config.to_dict()}
            store.save_async(done, trainer.model, trainer.optimizer, meta | {"plan": setting.plan.to_dict()})

        while done < total and not stop_reason:
            heart.beat(done + 1)
            micros = next(steps)
            try:
                figures = trainer.step(done, total, micros)
            except NotFiniteError:
                store.wait()  # the checkpoint under way is a good one
                raise
            done, position = done + 1, micros[-1][0].position
            shape = setting.batches.at(done - 1)
            rate, memory = meter.read(shape.rows * shape.length)
            if isinstance(metrics, MetricsWriter):
                _record(
                    metrics.step, done, **figures, tokens_per_s=rate, memory_bytes=memory, sequence_length=shape.length
                )
                progress.update(
                    done,
                    loss=figures["loss"],
                    tokens_per_s=rate,
                    memory_bytes=memory,
                    sequence_length=shape.length,
                    time_left_s=_time_left(setting, done, time.perf_counter() - began),
                )
            if config.eval.every and setting.windows and done % config.eval.every == 0 and done < total:
                context = min(setting.windows)
                loss, bits = held_out_score(trainer, setting, context)
                if isinstance(metrics, MetricsWriter):
                    _record(metrics.eval, done, loss=loss, sequence_length=context, bits_per_byte=bits)
            interrupted, elapsed_s = _agreed(interrupt.requested, time.perf_counter() - began)
            if interrupted:
                stop_reason = "interrupted"
            elif config.limit_s and elapsed_s > config.limit_s:
                stop_reason = "time limit"
            if stop_reason or (config.save_every and done % config.save_every == 0):
                save()
                saved = done
            later = _catch_up(setting, done, elapsed_s)
            if later > done and not stop_reason:
                if isinstance(metrics, MetricsWriter):
                    left_out = f"steps {done + 1} to {later} left out, to keep within {config.limit_s:g} s"
                    _record(metrics.event, done, left_out)
                loader.close()
                done = later
                loader = batches()
                steps = steps_of(loader)
        if saved != done:
            save()
        landed = store.wait()
        if stop_reason == "interrupted":
            if isinstance(metrics, MetricsWriter):
                _record(metrics.event, done, "interrupted")
                metrics.close()
                kept = f"checkpoint step_{done:06d} saved" if landed else "the checkpoint could not be saved"
                progress.message(f"interrupted at step {done}; {kept}; go on with --resume latest")
            dist.barrier()  # a launcher ends the others when the first of them leaves: not before the line above
            return False
    elapsed_s = time.perf_counter() - began
    scores = {context: held_out_score(trainer, setting, context) for context in sorted(setting.windows)}
    headline = [{"context": context, "model": bits} for context, (_, bits) in scores.items()]
    peaks = gathered(Meter(device).read(1)[1])
    if isinstance(metrics, MetricsWriter):
        for context, (loss, bits) in scores.items():
            _record(metrics.eval, done, loss=loss, sequence_length=context, bits_per_byte=bits)
        if stop_reason:
            _record(metrics.event, done, f"stopped after {elapsed_s:.0f} s ({stop_reason})")
        metrics.close()
    outcome = Outcome(done, elapsed_s, headline, [int(p) for p in peaks], stop_reason)
    finish(setting, trainer, outcome)
    return True


def _record(write: Callable[..., Any], step: int, *values: Any, **named: Any) -> None:
    """Writes to the metrics; a full disk costs the record and not the training."""
    try:
        write(step, *values, **named)
    except OSError as error:
        log.warning("metrics of step %d were not written: %s; training goes on", step, error)


def _time_left(setting: Setting, done: int, elapsed_s: float) -> float:
    """Estimated from tokens: later rows may be longer, and cost about as much a token."""
    shape = setting.batches.at(done - 1)
    seen = shape.position + shape.rows * shape.length
    left_s = elapsed_s * (setting.batches.num_tokens - seen) / max(1, seen)
    limit_s = setting.config.limit_s
    return min(left_s, max(0.0, limit_s - elapsed_s)) if limit_s else left_s


def _agreed(interrupted: bool, elapsed_s: float) -> tuple[bool, float]:
    """Whether any rank was interrupted, and the latest clock: the same answer on all ranks."""
    values = torch.tensor([float(interrupted), elapsed_s], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return bool(values[0]), float(values[1])


def _catch_up(setting: Setting, done: int, elapsed_s: float) -> int:
    """With a time limit, a length that has used its share of the time (by tokens) gives way to the next one.

    So that a slow machine, too, comes to the full length and to the end of the learning rate's decay.
    """
    limit_s = setting.config.limit_s
    if not limit_s:
        return done
    total, end, tokens = setting.batches.num_steps, 0, 0
    for stage in setting.batches.stages:
        end += stage.steps
        tokens += stage.steps * stage.rows * stage.length
        if done < end:
            return end if elapsed_s > limit_s * tokens / setting.batches.num_tokens and end < total else done
    return done


__all__ = ["NotFiniteError", "Setting", "run"]
