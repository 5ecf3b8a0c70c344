"""The whole configuration of a training run: one frozen dataclass, from which the command line is generated."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model.config import Balance, DecoderConfig, MlpConfig, MoeConfig
from longspan.model.lora import LoraConfig
from longspan.plan.plan import Plan
from longspan.train.data.batches import BatchPlan, Packing, warmup_plan
from longspan.train.data.corpus import CorpusConfig
from longspan.train.profiling import MOST_STEPS, profiled_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder from scratch: RMSNorm, rotary positions, grouped attention with QK-norm, SwiGLU; std 1/sqrt(width).

    Args:
        layers, width, heads: as usual; the head dim is width / heads.
        kv_heads: KV heads; 0 for as many as heads.
        inner: inner width of the MLP; 0 for 8/3 of the width, rounded up to a multiple of 32.
        tie: the head shares the embedding's matrix.
        experts: swiglu experts in the place of every layer's MLP; 0 for none.
        experts_per_token: experts that a token goes to.
        expert_inner: inner width of one expert; 0 for that of the MLP.
        shared_inner: inner width of an expert that all tokens go through besides; 0 for none.
        balance: "aux": an auxiliary loss in each layer; "aux_pooled": one over all layers, as transformers has it;
            "bias": a bias on the router's choice and no loss.
        aux_coef, bias_speed: weight of the auxiliary loss, step of the bias.
        config: a JSON file with a whole DecoderConfig, in place of the fields above.
    """

    layers: int = 2
    width: int = 256
    heads: int = 4
    kv_heads: int = 0
    inner: int = 0
    tie: bool = False
    rope_theta: float = 10000.0
    experts: int = 0
    experts_per_token: int = 2
    expert_inner: int = 0
    shared_inner: int = 0
    balance: Balance = "aux"
    aux_coef: float = 0.01
    bias_speed: float = 0.001
    config: Path | None = None

    def __post_init__(self) -> None:
        if self.config is not None and dataclasses.replace(self, config=None) != ModelConfig():
            raise ValueError(
                f"a model is given by a file or by single options, got --model.config {self.config} and other --model "
                "options; change the file, or leave one of the two out"
            )
        default = {item.name: item.default for item in dataclasses.fields(ModelConfig)}
        for name in ("experts_per_token", "expert_inner", "shared_inner", "balance", "aux_coef", "bias_speed"):
            if not self.experts and getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name} is of a mixture of experts, got {getattr(self, name)} without one; give --model.experts"
                )

    def decoder(self, vocab_size: int, max_length: int) -> DecoderConfig:
        """The full config. Raises ValueError where the fields do not fit each other."""
        if self.config is not None:
            try:
                found = DecoderConfig.from_json(self.config.read_text(encoding="utf-8"))
            except OSError as error:
                raise ValueError(f"model config {self.config} cannot be read: {error.strerror}") from None
            if found.vocab_size < vocab_size:
                raise ValueError(
                    f"the model's vocabulary must hold the tokenizer's {vocab_size} tokens, got {found.vocab_size}"
                )
            return found
        if min(self.layers, self.width, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"layers, width and heads must be positive and heads must divide width, got {self.layers}, "
                f"{self.width} and {self.heads}; change --model.width or --model.heads"
            )
        inner = self.inner or 32 * math.ceil(self.width * 8 / 3 / 32)
        return DecoderConfig(
            num_layers=self.layers,
            hidden_size=self.width,
            vocab_size=vocab_size,
            attention=AttentionConfig(
                num_heads=self.heads,
                head_dim=self.width // self.heads,
                num_kv_heads=self.kv_heads or self.heads,
                qk_norm_eps=1e-6,
            ),
            mlp=MlpConfig(inner_size=inner),
            moe=self._moe(inner),
            positions=RotaryConfig(theta=self.rope_theta, max_positions=max_length),
            tie_embeddings=self.tie,
            init_std=self.width**-0.5,
        )

    def _moe(self, inner: int) -> MoeConfig | None:
        if not self.experts:
            return None
        return MoeConfig(
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            inner_size=self.expert_inner or inner,
            shared_inner_size=self.shared_inner,
            balance=self.balance,
            aux_coef=self.aux_coef,
            bias_speed=self.bias_speed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How many tokens a step takes, in rows of which length.

    Args:
        steps: optimiser steps.
        tokens: tokens of a step over all ranks, a multiple of every shorter length; one row where rows are longer.
        length: tokens of a row (the sequence that context parallelism splits).
        start_length: length warm-up: rows start this long and double up to ``length``; 0 for none.
        warmup_fraction: part of the steps with rows shorter than ``length``.
        packing: "stream": rows run over document ends under a causal mask; "documents": a token sees its own document.
        micro_rows: most rows a rank computes at once; 0 for all, and for 1 with a pipeline.
    """

    steps: int = 100
    tokens: int = 16384
    length: int = 2048
    start_length: int = 0
    warmup_fraction: float = 0.5
    packing: Packing = "stream"
    micro_rows: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.tokens, self.length) < 1:
            raise ValueError(
                f"steps, tokens and length of a batch must be at least 1, got {self.steps}, {self.tokens} and "
                f"{self.length}; raise the one below"
            )

    def plan(self) -> BatchPlan:
        """The shapes of all steps. Raises ValueError where they do not fit."""
        return warmup_plan(
            steps=self.steps,
            start_length=self.start_length or self.length,
            length=self.length,
            tokens=self.tokens,
            fraction=self.warmup_fraction,
            packing=self.packing,
            micro_rows=self.micro_rows or None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, and its learning rate over the steps.

    Args:
        schedule: after ``warmup`` steps of linear warm-up: "cosine" to ``final`` x lr, or "wsd" (constant, then linear
            to ``final`` x lr over the last ``decay`` fraction of the steps).
        clip: largest norm of the gradient over all parameters; 0 for no clipping.
    """

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: int = 10
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    final: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or self.weight_decay < 0 or self.clip < 0 or self.warmup < 0:
            raise ValueError(f"lr and eps must be positive, weight_decay, clip and warmup 0 or more, got {self}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 < self.decay <= 1 and 0 <= self.final <= 1):
            raise ValueError(
                f"beta1 and beta2 must lie in [0, 1), decay in (0, 1] and final in [0, 1], got {self.beta1}, "
                f"{self.beta2}, {self.decay} and {self.final}; change the one outside"
            )

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, num_steps - self.warmup)
            return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        left = (num_steps - step) / max(1.0, self.decay * num_steps)
        return self.lr * (self.final + (1 - self.final) * min(1.0, max(0.0, left)))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Held-out evaluation.

    Args:
        contexts: lengths of context at which the same tokens are scored at the end.
        tokens: number of scored tokens.
        every: steps between evaluations during training, at the shortest context; 0 for the end only.
    """

    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 16384
    every: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.every < 0:
            raise ValueError(f"tokens and every must be 0 or more, got {self.tokens} and {self.every}")
        if self.tokens and (not self.contexts or min(self.contexts) < 2):
            raise ValueError(
                f"contexts must be lengths of at least 2 tokens, got {self.contexts}; set tokens to 0 for no evaluation"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run.

    Args:
        out: the run's folder: config, metrics, checkpoints, the exported model and the report.
        init: a Hugging Face checkpoint to continue from, in place of ``model``.
        lora: with a rank, adapters are trained and the weights of ``init`` stay.
        freeze: parameters that stay as they are: beginnings of names, such as "embed" or "blocks.0-3".
        tokenizer: "bytes", a tokenizer.json, or a folder with one (and its chat template).
        plan_file: a plan in JSON, in place of ``plan``.
        save_every: steps between checkpoints; 0 for one at the end.
        keep: checkpoints that stay.
        resume: "latest", or "step_000100", or None to start.
        tensorboard: a folder for TensorBoard's event files (with the extra longspan[tensorboard]); the option alone, or
            "auto": ``tensorboard`` in the run's folder.
        profile: FIRST:COUNT, steps (from 1) that torch's profiler traces on every rank, into ``profile`` of the run's
            folder; the option alone, or "auto": 3:3.
        prompt: of the completion sampled at the end; empty for none.
        limit_s: training stops (and evaluates) after so many seconds; 0 for no limit.
        timeout_s: a collective that takes longer fails, and the silent rank is named.
    """

    out: Path = Path("runs/train")
    data: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: str = "bytes"
    model: ModelConfig = field(default_factory=ModelConfig)
    init: Path | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: tuple[str, ...] = ()
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    plan: Plan = field(default_factory=Plan)
    plan_file: Path | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    save_every: int = 0
    keep: int = 2
    resume: str | None = None
    tensorboard: str | None = None
    profile: str | None = None
    prompt: str = "def "
    device: Literal["auto", "cpu", "cuda"] = "auto"
    limit_s: float = 0.0
    timeout_s: float = 120.0
    data_workers: Annotated[Literal[0, 1], tyro.conf.arg(help="1: batches are drawn in a process of their own.")] = 1

    def __post_init__(self) -> None:
        if self.save_every < 0 or self.limit_s < 0 or self.seed < 0:
            raise ValueError(
                f"save_every, limit_s and seed must be 0 or more, got {self.save_every}, {self.limit_s} and {self.seed}"
            )
        if self.plan_file is not None and self.plan != Plan():
            raise ValueError(
                f"a plan is given by a file or by single options, got --plan-file {self.plan_file} and --plan options; "
                "change the file, or leave one of the two out"
            )
        if self.init is not None and self.model != ModelConfig():
            raise ValueError(
                f"the model is that of the checkpoint, got --init {self.init} and --model options; leave one of the "
                "two out"
            )
        if self.lora.rank and self.init is None:
            raise ValueError(
                f"adapters are trained beside the weights of a checkpoint, got --lora.rank {self.lora.rank} without "
                "--init; give one, or leave --lora out"
            )
        if self.lora.rank and self.freeze:
            raise ValueError(
                f"with adapters all else is frozen, got --lora.rank {self.lora.rank} and --freeze "
                f"{' '.join(self.freeze)}; choose --lora.targets instead"
            )
        if self.eval.every and not (self.data.held_out and self.eval.tokens):
            raise ValueError(
                f"evaluation during training needs held-out text and tokens to score, got every {self.eval.every} with "
                f"held_out {self.data.held_out:g} and {self.eval.tokens} tokens; leave out --eval.every or raise them"
            )
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}: the last checkpoint always stays")
        if self.profiled is not None and self.profiled.stop - 1 > self.batch.steps:
            raise ValueError(
                f"steps {self.profiled.start} to {self.profiled.stop - 1} are to be profiled, got a run of "
                f"{self.batch.steps} steps; say --profile 1:{min(MOST_STEPS, self.batch.steps)}, or raise --batch.steps"
            )
        if self.timeout_s < 2:
            raise ValueError(f"timeout_s must be at least 2 (ranks answer every second), got {self.timeout_s}")

    @property
    def profiled(self) -> range | None:
        """The steps to be profiled."""
        return None if self.profile is None else profiled_steps(self.profile)

    @property
    def tensorboard_folder(self) -> Path | None:
        if self.tensorboard is None:
            return None
        return self.out / "tensorboard" if self.tensorboard == "auto" else Path(self.tensorboard)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json and the report."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))
