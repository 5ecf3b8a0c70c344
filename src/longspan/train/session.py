"""A whole training run on one rank: data, model, loop, checkpoints, and what is left behind at the end.

``run`` is what every rank executes, however it was started (alone, by ``--ranks``, torchrun or Slurm). Everything is
written below ``config.out``: config.json, plan.json, model.json, metrics.jsonl, checkpoints/, model/ (for Hugging Face)
and report.html.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from longspan.train.checkpoint import CheckpointStore
from longspan.train.config import TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.data.evaluation import bits_per_byte, scored_bytes
from longspan.train.data.loader import BatchLoader, DataWorkerError
from longspan.train.data.stream import TokenStream
from longspan.train.finish import Outcome, finish
from longspan.train.holdings import holdings
from longspan.train.launch import Joined, discover, init_process_group
from longspan.train.liveness import Heartbeat, InterruptFlag
from longspan.train.loop import Meter, NotFiniteError, Trainer, gathered, steps_of
from longspan.train.manifest import step_name
from longspan.train.metrics import MetricsWriter
from longspan.train.profiling import StepProfile, span
from longspan.train.progress import TrainProgress, say
from longspan.train.records import Records
from longspan.train.setting import Setting, first_on_rank_0, patient_group, resolve
from longspan.train.tensorboard import Board
from longspan.train.utilisation import Utilisation


def held_out_score(trainer: Trainer, setting: Setting, context: int) -> tuple[float, float | None]:
    """(nats per token, bits per byte) of the held-out text at one context; no bits of conversations. Collective."""
    windows = setting.windows[context]
    nats, labels = trainer.score(windows)
    if setting.train.labelled:
        return nats / labels, None
    return nats / labels, bits_per_byte(nats, len(scored_bytes(windows, setting.tokenizer)))


def run(config: TrainConfig, command: str = "") -> bool:
    """One rank's part of a training run. Returns whether it came to its end, which an interrupted one does not.

    Raises:
        ValueError: something does not fit, before training.
        NotFiniteError: loss or gradient not finite; the last good step is saved.
        DataWorkerError: a process that draws batches died; the last step is saved.
        SaveError: a checkpoint could not be written for another reason than the disk.
        LostRankError: another rank stopped or failed.
    """
    launch = discover()
    joined = init_process_group(config.timeout_s, launch=launch, device=config.device)
    torch.manual_seed(config.seed)
    try:
        setting = resolve(config, launch.world_size, command, joined.device.type, patient_group())
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
            return _train(setting, joined, heart)
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


def _begin(setting: Setting, store: CheckpointStore, trainer: Trainer) -> tuple[int, int | None, Records]:
    """Steps done and tokens used up so far (None: where the plan puts them), and the run's records. Collective."""
    config, out = setting.config, setting.config.out
    done, position = 0, None
    if config.resume is not None:
        meta = store.load(_resume_step(config, store), trainer.model, trainer.optimizer, trainer.model.boxes())
        setting.check_base(meta)
        done, position = int(meta["step"]), int(meta["position"])
    if done > setting.batches.num_steps:
        raise ValueError(
            f"the checkpoint has {done} steps done, got a run of {setting.batches.num_steps}; raise --batch.steps, or "
            "resume an earlier checkpoint"
        )

    def records() -> Records:
        if dist.get_rank() != 0:
            return Records()
        writer = MetricsWriter(out / "metrics.jsonl", resume_step=done if config.resume is not None else None)
        (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        (out / "plan.json").write_text(setting.plan.to_json() + "\n")
        (out / "model.json").write_text(setting.decoder.to_json() + "\n")
        if (folder := config.tensorboard_folder) is None:
            return Records(writer)
        board = Board(folder, step=done, tokens=position or 0)
        board.text(
            done, {"config": config.to_dict(), "plan": setting.plan.to_dict(), "model": setting.decoder.to_dict()}
        )
        return Records(writer, board)

    return done, position, first_on_rank_0(records, setting.group)


def _train(setting: Setting, joined: Joined, heart: Heartbeat) -> bool:
    device = joined.device
    config, total, first = setting.config, setting.batches.num_steps, dist.get_rank() == 0
    store = CheckpointStore(config.out / "checkpoints", keep=config.keep)
    trainer = Trainer(config, setting.decoder, setting.plan, device)
    done, position, records = _begin(setting, store, trainer)
    saved, tokens, stop_reason, lost = done, 0, "", ""
    began, before_s, meter = time.perf_counter(), 0.0, Meter(device)
    whole_rows = config.batch.packing == "stream" and not (config.lora.rank or config.freeze or setting.train.labelled)
    utilisation = Utilisation(
        setting.decoder,
        setting.plan,
        device,
        world=dist.get_world_size(),
        known=whole_rows and not joined.staged,
    )

    def batches() -> BatchLoader:
        return BatchLoader(
            TokenStream(setting.train, config.seed),
            setting.batches,
            step=done,
            position=position,
            data_rank=trainer.mesh.rows_rank,
            data_size=trainer.mesh.rows_size,
            prepare=trainer.prepare,
            num_workers=config.data_workers,
        )

    def save() -> None:
        meta: dict[str, Any] = {"step": done, "position": position, "config": config.to_dict()}
        meta |= {"plan": setting.plan.to_dict()}
        if setting.base:  # adapters alone are saved: they mean nothing beside other weights
            meta["base"] = setting.base
        records.flush()
        with span("checkpoint"):
            store.save_async(done, trainer.model, trainer.optimizer, meta, trainer.model.boxes())

    def draw_ahead() -> list[tuple[Batch, Any]]:
        nonlocal lost
        try:
            with span("data"):
                return next(steps)
        except DataWorkerError as error:  # the other ranks are told with the clock, and all save
            lost = str(error)
            return []

    def tell(note: str) -> None:
        if note:
            records.event(done, note)
            progress.message(note)

    loader = batches()
    steps = steps_of(loader)
    profile = StepProfile(config.profiled, config.out / "profile", dist.get_rank(), device, done=done)
    with (
        ExitStack() as opened,
        InterruptFlag(announce="longspan: saving, then leaving" if first else None) as interrupt,
        TrainProgress(total, start_step=done, enabled=first) as progress,
    ):
        opened.callback(lambda: loader.close())
        opened.callback(profile.close)
        for note in (*setting.notes, profile.missed()):
            tell(note)
        micros = next(steps) if done < total else []
        while done < total and not stop_reason:
            heart.beat(done + 1)
            profile.begin(done + 1)
            try:
                with heart.watched():
                    figures = trainer.step(done, total, micros)
            except NotFiniteError:
                if saved != done:
                    save()  # parameters and optimiser are still those of the last good step
                store.wait()
                raise
            shape = setting.batches.at(done)
            done, position = done + 1, micros[-1][0].position
            rate, memory = meter.read(shape.rows * shape.length)
            waited_s = loader.waited_s
            micros = draw_ahead() if done < total else []
            waited_s = loader.waited_s - waited_s
            with span("agreement"):
                interrupted, starved, elapsed_s, memory = _agreed(
                    interrupt.requested, bool(lost), time.perf_counter() - began, memory
                )
            warming_up, step_s, before_s = before_s == 0.0, elapsed_s - before_s, elapsed_s
            tokens += shape.rows * shape.length
            shown = {"tokens_per_s": rate, "memory_bytes": memory, "sequence_length": shape.length}
            share = utilisation.of(rate, shape.length)
            records.step(done, tokens=position, **figures, **shown, **share, data_wait_s=waited_s)
            for note in trainer.notes():
                tell(note)
            left_s = _time_left(setting, done, tokens, elapsed_s)
            progress.update(done, loss=figures["loss"], **shown, time_left_s=left_s)
            if interrupted:
                stop_reason = "interrupted"
            elif starved:
                stop_reason = "no data"
            elif config.limit_s and elapsed_s > config.limit_s and done < total:
                stop_reason = "time limit"
            if stop_reason or (config.save_every and done % config.save_every == 0):
                save()
                saved = done
            if stop_reason:
                break
            if config.eval.every and setting.windows and done % config.eval.every == 0 and done < total:
                shortest = min(setting.windows)
                with heart.watched(), span("evaluation"):
                    score = held_out_score(trainer, setting, shortest)
                records.eval(done, position, {shortest: score})
                meter.read(0)  # the next step's rate is not the evaluation's
            if taken := profile.end():
                tell(taken)
                meter.read(0)
            next_s = elapsed_s + step_s
            if warming_up and next_s <= config.limit_s:
                next_s = elapsed_s  # a first step is mostly warm-up; no forecast, while there is time for another
            later = _catch_up(setting, done, next_s)
            if later > done:
                left_out = f"steps {done + 1} to {later} left out, to keep within {config.limit_s:g} s"
                records.event(done, left_out)
                loader.close()
                done = later
                loader = batches()
                steps = steps_of(loader)
                micros = next(steps)
        tell(profile.finish())
        if saved != done:
            save()
        kept = f"checkpoint {step_name(done)} saved" if store.wait() else "the checkpoint could not be saved"
        if stop_reason == "interrupted":
            records.event(done, "interrupted")
            records.close()
            progress.message(f"interrupted at step {done}; {kept}; go on with --resume latest")
            dist.barrier()  # a launcher ends the others when the first of them leaves: not before the line above
            return False
        if stop_reason == "no data":
            records.event(done, "a data worker died")
            records.close()
            raise DataWorkerError(f"{_first_words(lost)} ({kept})")
    elapsed_s = time.perf_counter() - began
    outcome = Outcome(steps=done, tokens=position or 0, elapsed_s=elapsed_s, stop_reason=stop_reason)
    _conclude(setting, trainer, records, outcome)
    return True


def _conclude(setting: Setting, trainer: Trainer, records: Records, outcome: Outcome) -> None:
    """The last evaluation, at every context, and what is left behind. Collective."""
    scores = {context: held_out_score(trainer, setting, context) for context in sorted(setting.windows)}
    records.eval(outcome.steps, outcome.tokens, scores)
    if outcome.stop_reason:
        records.event(outcome.steps, f"stopped after {outcome.elapsed_s:.0f} s ({outcome.stop_reason})")
    records.close()
    peaks = [int(peak) for peak in gathered(Meter(trainer.device).read(1)[1])]
    headline = [{"context": context, "model": bits} for context, (_, bits) in scores.items() if bits is not None]
    if setting.train.labelled and dist.get_rank() == 0:
        for loss, _ in scores.values():
            say(f"held-out loss of the assistant's tokens: {loss:.3f} nats a token", sys.stdout)
    finish(setting, trainer, replace(outcome, headline=headline, peak_bytes=peaks, held=holdings(trainer)))


def _time_left(setting: Setting, done: int, tokens: int, elapsed_s: float) -> float:
    """Estimated from the tokens of this session: later rows may be longer, and cost about as much a token."""
    shape = setting.batches.at(done - 1)
    left = setting.batches.num_tokens - shape.position - shape.rows * shape.length
    left_s, limit_s = elapsed_s * left / tokens, setting.config.limit_s
    return min(left_s, max(0.0, limit_s - elapsed_s)) if limit_s else left_s


def _agreed(interrupted: bool, starved: bool, elapsed_s: float, memory: int) -> tuple[bool, bool, float, int]:
    """Whether any rank was interrupted or has no data, the latest clock, the fullest memory: the same on all ranks."""
    values = torch.tensor([float(interrupted), float(starved), elapsed_s, float(memory)], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return bool(values[0]), bool(values[1]), float(values[2]), int(values[3])


def _first_words(words: str) -> str:
    """What the first rank with something to say has said, and which rank it is; the same on all ranks."""
    said = [""] * dist.get_world_size()
    dist.all_gather_object(said, words)
    rank = next(rank for rank, text in enumerate(said) if text)
    return f"rank {rank}: {said[rank]}" if len(said) > 1 else said[rank]


def _catch_up(setting: Setting, done: int, next_s: float) -> int:
    """With a time limit, lengths whose share of the time (by tokens) one more step would overrun (its end is at
    ``next_s``) give way to the next one.

    So that a slow machine, too, comes to the full length and to the end of the learning rate's decay.
    """
    limit_s = setting.config.limit_s
    total, end, tokens = setting.batches.num_steps, 0, 0
    for stage in setting.batches.stages:
        end += stage.steps
        tokens += stage.steps * stage.rows * stage.length
        if limit_s and done < end < total and next_s > limit_s * tokens / setting.batches.num_tokens:
            done = end
    return done


__all__ = ["NotFiniteError", "Setting", "run"]
