"""The training loop: one for any model and plan.

Every rank runs the same program. Rows are drawn by the data axis, each row's sequence is split over the context axis,
parameters are held as the plan says. The loss of a step is the sum over all its labels divided by their global number,
so that neither the split of rows, of sequences nor of micro-batches changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan.attention import masks
from longspan.context.build import Built
from longspan.context.sequence import LayerKind, SequenceContext, build_layer
from longspan.hardware.devices import peak_memory_bytes
from longspan.layout.mesh import Mesh, make_mesh
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build, init_weights
from longspan.model.huggingface import load_into
from longspan.plan.plan import Plan
from longspan.train.config import OptimConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.evaluate import make_context, reduce_sums
from longspan.train.parallel import parallelise


class NotFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the optimiser step was not taken."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Runs in the data worker: attention schedules for a packed batch's mask, once for all layers of one kind."""

    kinds: tuple[LayerKind, ...]
    context_size: int
    context_rank: int
    method: str
    layout: str | None

    def __call__(self, batch: Batch) -> dict[LayerKind, Built]:
        if batch.lengths is None:
            return {}
        mask = masks.documents(batch.lengths, causal=True)
        return {
            kind: build_layer(mask, kind, self.context_size, self.context_rank, self.method, self.layout)
            for kind in self.kinds
        }


def layer_kinds(config: DecoderConfig) -> tuple[LayerKind, ...]:
    """The different kinds of attention layer of a model."""
    attention = config.attention
    return tuple(
        dict.fromkeys(
            (attention.num_heads, attention.kv_heads, config.window(layer)) for layer in range(config.num_layers)
        )
    )


def make_model(
    config: DecoderConfig, plan: Plan, mesh: Mesh, device: torch.device, seed: int, init: Path | None
) -> DecoderLM:
    """A model made on the meta device, split by the plan, of which each rank fills only its own part."""
    model = build(config, device="meta", dtype=torch.float32)
    parallelise(model, plan, mesh)
    model.to_empty(device=device)
    if init is None:
        init_weights(model, seed)
    else:
        load_into(model, init)
    return model


def make_optimizer(model: DecoderLM, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


class Trainer:
    """A model under a plan, and one optimiser step at a time. Collective throughout."""

    def __init__(self, config: TrainConfig, decoder: DecoderConfig, plan: Plan, device: torch.device) -> None:
        plan = plan.on(device.type)
        self.config, self.plan, self.device = config, plan, device
        self.world = dist.get_world_size()
        self.mesh = make_mesh(plan.data, plan.context, shard=plan.shard != "none", device_type=device.type)
        self.model = make_model(decoder, plan, self.mesh, device, config.seed, config.init)
        self.optimizer = make_optimizer(self.model, config.optim)
        self._contexts: dict[int, SequenceContext] = {}
        self._packed: SequenceContext | None = None

    @property
    def prepare(self) -> Prepare:
        """What the data worker runs on each batch."""
        return Prepare(
            layer_kinds(self.model.config),
            self.mesh.context_size,
            self.mesh.context_rank,
            self.plan.method,
            None if self.plan.layout == "auto" else self.plan.layout,
        )

    def context(self, batch: Batch, built: dict[LayerKind, Built]) -> SequenceContext:
        """The batch's mask over the context ranks."""
        if batch.lengths is None:
            length = batch.tokens.shape[1]
            if length not in self._contexts:
                self._contexts[length] = make_context(length, self.plan, self.mesh, self.device)
            return self._contexts[length]
        mask, positions = masks.documents(batch.lengths, causal=True), batch.positions().numpy()
        if self._packed is None:
            layout = None if self.plan.layout == "auto" else self.plan.layout
            self._packed = SequenceContext(
                mask, self.mesh.context_group, method=self.plan.method, layout=layout, device=self.device
            )
        self._packed.renew(mask, positions, built)
        return self._packed

    def gradients(self, micros: list[tuple[Batch, dict[LayerKind, Built]]]) -> float:
        """Adds the gradient of the mean loss of a step's micro-batches to the parameters; returns the mean loss."""
        labels = sum(batch.num_labels for batch, _ in micros)
        # Ranks that share a sequence hold the same batch: count it once.
        (total,) = reduce_sums([labels / self.mesh.context_size])
        total = max(1.0, round(total))
        nats = 0.0
        for index, (batch, built) in enumerate(micros):
            ctx = self.context(batch, built)
            self.model.set_requires_gradient_sync(index == len(micros) - 1)  # type: ignore[attr-defined]
            tokens, wanted = (ctx.local(x).to(self.device) for x in (batch.tokens, batch.labels))
            loss, _ = self.model.loss(tokens, wanted, ctx)
            # FSDP averages gradients over all ranks; the loss is a sum over them.
            (loss * (self.world / total)).backward()
            nats += float(loss.detach())
        (nats,) = reduce_sums([nats])
        return nats / total

    def step(self, step: int, num_steps: int, micros: list[tuple[Batch, dict[LayerKind, Built]]]) -> dict[str, float]:
        """One optimiser step. Raises NotFiniteError before the update where loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(micros)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise NotFiniteError(
                f"the loss of step {step + 1} is {loss:g} and the gradient's norm {norm.item():g}: stopped before the "
                f"optimiser step; the largest gradient is in {largest_gradient(self.model)}"
            )
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
        rate = self.config.optim.rate(step, num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {"loss": loss, "gradient_norm": norm.item(), "learning_rate": rate}


def largest_gradient(model: DecoderLM) -> str:
    """Name and size of the largest gradient over all ranks, NaN counting as largest. Collective."""
    names, sizes = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        size = local.detach().abs().max().double().cpu() if local.numel() else torch.zeros((), dtype=torch.float64)
        names.append(name)
        sizes.append(size)
    values = torch.stack(sizes)
    unknown = values.isnan()
    values = torch.where(unknown, torch.tensor(float("inf"), dtype=torch.float64), values)
    both = torch.stack([values, unknown.double()])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    worst = int((both[1] if both[1].any() else both[0]).argmax())  # not by size alone: an inf is as large as a NaN
    size = "nan" if both[1, worst] else f"{float(both[0, worst]):g}"
    return f"{names[worst]} ({size})"


def steps_of(loader: Iterator[tuple[Batch, Any]]) -> Iterator[list[tuple[Batch, Any]]]:
    """The loader's micro-batches, gathered by step."""
    micros: list[tuple[Batch, Any]] = []
    for batch, built in loader:
        micros.append((batch, built or {}))
        if batch.micro == batch.num_micro - 1:
            yield micros
            micros = []


class Meter:
    """Tokens per second and peak memory, over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._last_s = device, time.perf_counter()

    def read(self, num_tokens: int) -> tuple[float, int]:
        """(tokens/s since the last reading, this rank's peak memory in bytes)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        rate = num_tokens / max(1e-9, now - self._last_s)
        self._last_s = now
        return rate, peak_memory_bytes(self.device)


def gathered(value: Tensor | float) -> list[float]:
    """A number of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, float(value))
    return values
