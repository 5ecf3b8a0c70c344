"""What a run is made of: configuration, plan, model and data, resolved and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from longspan.attention import masks
from longspan.context.build import resolve as resolve_schedule
from longspan.model.config import DecoderConfig, LearnedPositionsConfig
from longspan.model.hf_adapter import layer_names
from longspan.model.hf_files import fingerprint
from longspan.model.hf_table import architectures_of
from longspan.model.huggingface import read_config
from longspan.plan.plan import Plan
from longspan.train.checkpoint import PARTIAL
from longspan.train.config import EvalConfig, TrainConfig
from longspan.train.data.batches import BatchPlan
from longspan.train.data.corpus import Corpus, load_splits
from longspan.train.data.evaluation import (
    HeldOutWindows,
    conversation_windows,
    fit_held_out,
    held_out_windows,
    scored_bytes,
)
from longspan.train.data.stream import TokenStream
from longspan.train.data.tokenizers import Tokenizer, load_tokenizer
from longspan.train.loop import outline
from longspan.train.parallel import check_plan
from longspan.train.pipeline import check_micros
from longspan.train.tensorboard import check_tensorboard

_T = TypeVar("_T")
_READING = timedelta(hours=12)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made of, resolved and the same on all ranks.

    Attributes:
        group: gloo, for what may take long on one rank (`patient_group`).
        base: with adapters, the fingerprint of the weights that they are beside; else "".
        not_exported: why the model cannot be written for Hugging Face; "" where it can.
        notes: what was left out of what was asked for, for the metrics, the terminal and the report.
    """

    config: TrainConfig
    plan: Plan
    decoder: DecoderConfig
    batches: BatchPlan
    tokenizer: Tokenizer
    train: Corpus
    held_out: Corpus | None
    windows: dict[int, HeldOutWindows]
    command: str
    group: dist.ProcessGroup
    base: str
    not_exported: str
    notes: tuple[str, ...]

    def check_base(self, meta: Mapping[str, Any]) -> None:
        """Refuses to go on from a checkpoint whose adapters are beside other weights, or are scaled otherwise."""
        if not self.base:
            return
        if meta.get("base") != self.base:
            raise ValueError(
                f"the checkpoint holds adapters and was written beside the weights of {meta['config']['init']}, got "
                f"--init {self.config.init}, which has others; give the same weights"
            )
        if (kept := meta["config"]["lora"]) != (asked := self.config.to_dict()["lora"]):
            changed = next(name for name in kept if kept[name] != asked[name])
            raise ValueError(
                f"a run goes on with its own adapters, got lora {changed} {asked[changed]} for a checkpoint with "
                f"{kept[changed]}; leave it as it was"
            )


def patient_group() -> dist.ProcessGroup:
    """A gloo group that waits for hours: reading data takes longer than a collective may. Collective."""
    group = dist.new_group(backend="gloo", timeout=_READING)
    assert isinstance(group, dist.ProcessGroup)
    return group


def first_on_rank_0(fn: Callable[[], _T], group: dist.ProcessGroup) -> _T:
    """``fn()`` on rank 0 and then, when its files are there, on the others, which all wait for each other. The first
    ValueError, or as one what the file system refused, is raised on all ranks."""
    value, problem = _attempt(fn) if dist.get_rank() == 0 else (None, None)
    outcome = [problem]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is None and dist.get_rank() != 0:
        value, problem = _attempt(fn)
    # Nobody goes on to a collective of the default group, whose time-out is short, before all are here.
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    for message in problems:
        if message is not None:
            raise ValueError(message)
    assert value is not None
    return value


def _attempt(fn: Callable[[], _T]) -> tuple[_T | None, str | None]:
    try:
        return fn(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def make_folder(folder: Path) -> None:
    """A folder for results. Raises ValueError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made ({error.strerror}); choose another --out") from None


def check_folder(config: TrainConfig) -> bool:
    """Refuses a run's folder that cannot be made, or that holds another run. Before anything is written."""
    make_folder(config.out)
    metrics, checkpoints = config.out / "metrics.jsonl", (config.out / "checkpoints").glob("step_*")
    if config.resume is None and any(not path.name.endswith(PARTIAL) for path in checkpoints):
        raise ValueError(
            f"the run's folder {config.out} already holds a run; go on with --resume latest, or choose another --out"
        )
    if config.resume is None and metrics.is_file() and metrics.stat().st_size:
        # It may also be under way, before its first save: another run must not write beside it.
        raise ValueError(
            f"the run's folder {config.out} already holds the metrics of a run without a checkpoint; choose another "
            "--out, or remove the folder"
        )
    if (folder := config.tensorboard_folder) is not None and dist.get_rank() == 0:  # the one that writes
        check_tensorboard(folder, resumes=config.resume is not None)
    return True


def resolve(
    config: TrainConfig, world: int, command: str, device_type: str, group: dist.ProcessGroup | None = None
) -> Setting:
    """Reads data and checks that everything fits, before anything is computed. Collective.

    Raises ValueError, on all ranks, for whatever does not fit.
    """
    group = patient_group() if group is None else group
    plan = Plan.read(config.plan_file) if config.plan_file is not None else config.plan
    plan = plan.fit(world).on(device_type)
    batches = config.batch.plan()
    if plan.pipeline > 1 and not config.batch.micro_rows:
        batches = replace(batches, micro_rows=1)
    batches.check(plan.row_ranks)
    check_micros(plan, batches)
    if min(stage.length for stage in batches.stages) < plan.context:
        raise ValueError(
            f"a sequence must have a token for every rank that shares it, got rows of "
            f"{min(stage.length for stage in batches.stages)} tokens on {plan.context} ranks; use longer rows"
        )
    resolve_schedule(
        masks.causal(batches.max_length), plan.context, plan.method, None if plan.layout == "auto" else plan.layout
    )
    first_on_rank_0(lambda: check_folder(config), group)
    tokenizer = load_tokenizer(config.tokenizer)
    decoder = _decoder(config, tokenizer, batches.max_length)
    check_plan(plan, decoder)
    check_positions(decoder, batches.max_length, "rows", "--batch.length")
    outline(decoder, config)
    base = ""
    if config.lora.rank and config.init is not None:
        layer_names(decoder, config.lora.targets)
        base = fingerprint(config.init)
    train, held_out = first_on_rank_0(
        lambda: load_splits(config.data, tokenizer, config.out / "tokens", max_tokens=batches.max_length),
        group,
    )
    windows, notes = _windows(config, held_out, tokenizer, plan.context)
    for context in windows:
        check_positions(decoder, context, "evaluation contexts", "--eval.contexts")
    if train.skipped:
        notes.insert(0, "documents left out: " + ", ".join(f"{n} {why}" for why, n in sorted(train.skipped.items())))
    if not_exported := why_not_exported(decoder):
        notes.append(f"the model is not exported: {not_exported}")
    return Setting(
        config, plan, decoder, batches, tokenizer, train, held_out, windows, command, group, base, not_exported,
        tuple(notes),
    )  # fmt: skip


def _decoder(config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> DecoderConfig:
    if config.init is None:
        return config.model.decoder(tokenizer.vocab_size, max_length)
    decoder = read_config(config.init)
    if decoder.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the checkpoint {config.init} has {decoder.vocab_size} tokens, but tokenizer {config.tokenizer} has "
            f"{tokenizer.vocab_size}; give the checkpoint's own --tokenizer"
        )
    return decoder


def check_positions(decoder: DecoderConfig, length: int, what: str, option: str) -> None:
    """Refuses sequences beyond learned positions. Packed documents too: they may be as long as a row."""
    positions = decoder.positions
    if isinstance(positions, LearnedPositionsConfig) and length > positions.max_positions:
        raise ValueError(
            f"the model has learned {positions.max_positions} positions, got {what} of {length} tokens; "
            f"set {option} to {positions.max_positions} at most"
        )


def why_not_exported(decoder: DecoderConfig) -> str:
    """Why no Hugging Face architecture can hold the model; "" where one can. To be known before training, not after."""
    reasons: list[str] = []
    for architecture in architectures_of(decoder).values():
        try:
            architecture.write(decoder)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return ""
    return "; ".join(dict.fromkeys(reasons))


def _windows(
    config: TrainConfig, held_out: Corpus | None, tokenizer: Tokenizer, num_ranks: int
) -> tuple[dict[int, HeldOutWindows], list[str]]:
    """The held-out windows by context, and what a small held-out text has no room for."""
    asked = config.eval
    if not asked.tokens:
        return {}, []
    if held_out is None:
        return {}, ["no evaluation: nothing is held out (--data.held-out 0)"]
    if held_out.labelled:
        if asked.contexts != EvalConfig().contexts:
            raise ValueError(
                f"conversations are scored whole, each alone, got contexts {asked.contexts}: leave out --eval.contexts"
            )
        window = conversation_windows(held_out, asked.tokens)
        if window.tokens.shape[1] < num_ranks:
            raise ValueError(
                f"a conversation must have a token for each of {num_ranks} ranks that share it, got held-out ones of "
                f"{window.tokens.shape[1]} at most: use fewer ranks"
            )
        return {window.tokens.shape[1]: window}, [
            f"{window.num_labels:,} tokens of {len(window.tokens):,} held-out conversations are scored"
        ]
    stream = TokenStream(held_out, config.seed)
    contexts, num_tokens = fit_held_out(stream, asked.contexts, asked.tokens)
    windows = held_out_windows(stream, contexts, num_tokens)
    if not scored_bytes(windows[contexts[0]], tokenizer):
        raise ValueError(
            f"the {num_tokens} held-out tokens that are scored must have text, got separators only; hold out more text"
        )
    notes = []
    if left_out := [context for context in asked.contexts if context not in contexts]:
        lengths = ", ".join(f"{context:,}" for context in left_out)
        notes.append(f"no evaluation at context {lengths}: the held-out text has {stream.epoch_tokens:,} tokens")
    if num_tokens < asked.tokens:
        notes.append(f"{num_tokens:,} of {asked.tokens:,} tokens are scored: the held-out text has no more")
    return windows, notes
