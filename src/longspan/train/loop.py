"""The training loop: one for any model and plan.

Every rank runs the same program. Rows are drawn by the data axis, each row's sequence is split over the context axis,
parameters are held as the plan says. The loss of a step is the sum over all its labels divided by their global number,
so that neither the split of rows, of sequences nor of micro-batches changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.hardware.devices import peak_memory_bytes
from longspan.layout.mesh import Mesh, make_mesh
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build, init_weights
from longspan.model.huggingface import load_into
from longspan.plan.plan import Plan
from longspan.train.config import OptimConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.evaluate import make_context, reduce_sums
from longspan.train.parallel import parallelise, stream
from longspan.train.prepare import Prepared, make_prepare


class NotFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the optimiser step was not taken."""


def make_model(
    config: DecoderConfig, plan: Plan, mesh: Mesh, device: torch.device, seed: int, init: Path | None
) -> DecoderLM:
    """A model made on the meta device, split by the plan, of which each rank fills only its own part.

    One whose layers are streamed is filled on the host.
    """
    model = build(config, device="meta", dtype=torch.float32)
    parallelise(model, plan, mesh)
    model.to_empty(device="cpu" if plan.streams_layers else device)
    if init is None:
        init_weights(model, seed)
    else:
        load_into(model, init)
    return model


def make_optimizer(model: DecoderLM, config: OptimConfig, *, on_host: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. `on_host`: torch's fused kernel, which reads memory once."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=on_host or None)


class Trainer:
    """A model under a plan, and one optimiser step at a time. Collective throughout."""

    def __init__(self, config: TrainConfig, decoder: DecoderConfig, plan: Plan, device: torch.device) -> None:
        plan = plan.on(device.type)
        self.config, self.plan, self.device = config, plan, device
        self.world = dist.get_world_size()
        self.mesh = make_mesh(plan.data, plan.context, shard=plan.shard != "none", device_type=device.type)
        self.model = make_model(decoder, plan, self.mesh, device, config.seed, config.init)
        self.stream = stream(self.model, plan, device)
        self.optimizer = make_optimizer(self.model, config.optim, on_host=self.stream is not None)
        self.prepare = make_prepare(decoder, plan, self.mesh, device)
        self._contexts: dict[tuple[int, int], SequenceContext] = {}
        self._packed: SequenceContext | None = None
        self._chosen: set[tuple[str, ...]] = set()
        self._notes: list[str] = []

    def notes(self) -> list[str]:
        """What was chosen since the last call, in words: layout and method, when they are new to this run."""
        notes, self._notes = self._notes, []
        return notes

    def context(self, batch: Batch, prepared: Prepared | None) -> SequenceContext:
        """The batch's mask over the context ranks; ``prepared`` where the data worker has done so."""
        if batch.lengths is None:
            rows, length = batch.tokens.shape
            if (rows, length) not in self._contexts:
                self._contexts[rows, length], prepared = make_context(
                    length, self.prepare, self.mesh, self.device, rows=rows
                )
                self._note(prepared)
            return self._contexts[rows, length]
        mask, positions = masks.documents(batch.lengths, causal=True), batch.positions().numpy()
        prepared = prepared or self.prepare.of(mask)
        self._note(prepared)
        if self._packed is None:
            self._packed = SequenceContext(
                mask, self.mesh.context_group, method=self.plan.method, layout=prepared.layout, device=self.device
            )
        self._packed.renew(mask, positions, prepared.built, prepared.layout)
        return self._packed

    def _note(self, prepared: Prepared) -> None:
        if prepared.why and prepared.names not in self._chosen:
            self._chosen.add(prepared.names)
            self._notes.append(prepared.why)

    def gradients(self, micros: list[tuple[Batch, Prepared | None]]) -> float:
        """Adds the gradient of the mean loss of a step's micro-batches to the parameters; returns the mean loss."""
        labels = sum(batch.num_labels for batch, _ in micros)
        # Ranks that share a sequence hold the same batch: count it once.
        (total,) = reduce_sums([labels / self.mesh.context_size])
        total = max(1.0, round(total))
        nats = 0.0
        for index, (batch, prepared) in enumerate(micros):
            ctx = self.context(batch, prepared)
            if self.stream is None:
                self.model.set_requires_gradient_sync(index == len(micros) - 1)  # type: ignore[attr-defined]
            tokens, wanted = (ctx.local(x).to(self.device) for x in (batch.tokens, batch.labels))
            loss, _ = self.model.loss(tokens, wanted, ctx)
            # FSDP averages gradients over all ranks; the loss is a sum over them.
            (loss * (self.world / total)).backward()
            nats += float(loss.detach())
        self.settle()
        (nats,) = reduce_sums([nats])
        return nats / total

    def settle(self) -> None:
        """Parameters and gradients are those to save, export and update, wherever the plan keeps them."""
        if self.stream is not None:
            self.stream.flush()

    def step(self, step: int, num_steps: int, micros: list[tuple[Batch, Prepared | None]]) -> dict[str, float]:
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
    for batch, prepared in loader:
        micros.append((batch, prepared))
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
