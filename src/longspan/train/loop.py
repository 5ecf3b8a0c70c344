"""The training loop: one for any model and plan.

Every rank runs the same program. Rows are drawn by the data axis, each row's sequence is split over the context axis,
parameters are held as the plan says. The loss of a step is the sum over all its labels divided by their global number,
so that neither the split of rows, of sequences nor of micro-batches changes the gradient.

`loss` is the cross-entropy alone. A model whose experts are balanced by an auxiliary loss has that as well, `aux_loss`,
per label and with its coefficient: the sum of both is what is minimised. It compares the experts' load within one
micro-batch over all ranks, so that other micro-batches give another auxiliary loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.hardware.devices import peak_memory_bytes
from longspan.hardware.transfers import Reading
from longspan.layout.mesh import Mesh, make_mesh
from longspan.layout.tensor_parallel import sum_over
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build, init_weights
from longspan.model.freeze import freeze
from longspan.model.huggingface import load_into
from longspan.model.lora import apply_lora, init_lora
from longspan.model.moe import is_expert
from longspan.model.part import ALL, ModelPart
from longspan.plan.plan import Plan
from longspan.train.adamw import round_step, take_back
from longspan.train.config import OptimConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.data.evaluation import HeldOutWindows
from longspan.train.evaluate import make_context, make_handles, reduce_sums, total_nats
from longspan.train.parallel import check_plan, expert_split, master_weights, parallelise, stream, tensor_split
from longspan.train.pipeline import Micro, Pipeline, Stage, ranks_of_stages, stage_layers
from longspan.train.prepare import Prepared, make_prepare
from longspan.train.profiling import span


class NotFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the optimiser step was not taken."""


def outline(decoder: DecoderConfig, config: TrainConfig, part: ModelPart = ALL) -> DecoderLM:
    """The model on the meta device, with what of it is trained. Raises ValueError for a part that it does not have."""
    model = build(decoder, device="meta", dtype=torch.float32, part=part)
    if config.lora.rank:
        apply_lora(model, config.lora)
    if config.freeze:
        whole = model if part.layers is None else build(decoder, device="meta")
        freeze(model, config.freeze, [name for name, _ in whole.named_parameters()])
    return model


def make_model(
    decoder: DecoderConfig, config: TrainConfig, plan: Plan, mesh: Mesh, device: torch.device
) -> tuple[DecoderLM, Pipeline | None]:
    """This rank's part of a model, made on the meta device and split by the plan, of which each rank fills only its own
    part; and its pipeline, where there is one. One whose layers are streamed is filled on the host."""
    ranks, layers = ranks_of_stages(plan), stage_layers(decoder.num_layers, plan)
    mine = [index for index, rank in enumerate(ranks) if rank == mesh.pipeline.rank]
    part = ModelPart(
        layers=tuple(layer for index in mine for layer in layers[index]),
        first=mine[0] == 0,
        last=mine[-1] == len(ranks) - 1,
        split=tensor_split(mesh),
        experts=expert_split(mesh),
    )
    model = outline(decoder, config, part)
    if plan.precision == "pure_bf16":
        model.to(torch.bfloat16)
    stages = [] if plan.pipeline == 1 else [Stage(model, index, layers[index]) for index in mine]
    for root in stages or [model]:
        parallelise(root, plan, mesh)
        root.to_empty(device="cpu" if plan.streams_layers else device)
    if stages and model.expert_load is not None:  # the model's own, of no stage
        model.expert_load = torch.empty_like(model.expert_load, device=device)
    if config.init is None:
        init_weights(model, config.seed)
    else:
        load_into(model, config.init)
        init_lora(model, config.seed)
    return model, Pipeline(stages, plan, mesh.pipeline, device) if stages else None


def make_optimizer(model: DecoderLM, config: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over what is trained, with weight decay on matrices only. `fused`: torch's one kernel for a step.

    A rank that has nothing to train, as an early one of a pipeline may, gets an empty one."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not is_expert(name)]
    # Apart, for they may be on a mesh of their own.
    experts = [p for name, p in trained if is_expert(name)]
    others = [p for _, p in trained if p.ndim <= 1]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in ((decayed, config.weight_decay), (experts, config.weight_decay), (others, 0.0))
        if some
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups or [{"params": []}], lr=config.lr, betas=betas, eps=config.eps, fused=fused or None)


class Trainer:
    """A model under a plan, and one optimiser step at a time. Collective throughout."""

    def __init__(self, config: TrainConfig, decoder: DecoderConfig, plan: Plan, device: torch.device) -> None:
        plan = plan.on(device.type)
        check_plan(plan, decoder)
        self.config, self.plan, self.device = config, plan, device
        self.mesh = make_mesh(
            plan.data,
            plan.context,
            tensor=plan.tensor,
            pipeline=plan.pipeline,
            expert=plan.expert,
            shard=plan.shard != "none",
            replicas=plan.replicas,
            device_type=device.type,
        )
        self.model, self.pipeline = make_model(decoder, config, plan, self.mesh, device)
        self.stream = stream(self.model, plan, device)
        self.masters = master_weights(self.model, plan, self.mesh)
        fused = self.masters is None and (device.type == "cuda" or self.stream is not None)
        self.optimizer = make_optimizer(self.model, config.optim, fused=fused)
        self.prepare = make_prepare(decoder, plan, self.mesh, device)
        self._contexts: dict[tuple[int, int], SequenceContext] = {}
        self._packed: dict[int, SequenceContext] = {}
        self._score_contexts: dict[int, SequenceContext] = {}
        self._last_context: SequenceContext | None = None
        self._chosen: set[tuple[str, ...]] = set()
        self._notes: list[str] = []

    def notes(self) -> list[str]:
        """What was chosen since the last call, in words: layout and method, when they are new to this run."""
        notes, self._notes = self._notes, []
        return notes

    def context(self, batch: Batch, prepared: Prepared | None) -> SequenceContext:
        """The batch's mask over the context ranks; ``prepared`` where the data worker has done so.

        Without a pipeline, packed batches share one: the backward of the batch before must be over.
        """
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
        place = 0 if self.pipeline is None else batch.micro
        if place not in self._packed:
            self._packed[place] = SequenceContext(
                mask,
                self.mesh.context.group,
                method=self.plan.method,
                layout=prepared.layout,
                device=self.device,
                tokens_group=self.mesh.tokens.group,
            )
        self._packed[place].renew(mask, positions, prepared.built, prepared.layout)
        return self._packed[place]

    def _note(self, prepared: Prepared) -> None:
        if prepared.why and prepared.names not in self._chosen:
            self._chosen.add(prepared.names)
            self._notes.append(prepared.why)

    def gradients(self, micros: list[tuple[Batch, Prepared | None]]) -> float:
        """Adds the gradient of the mean loss of a step's micro-batches to the parameters; returns the mean loss.

        The auxiliary loss is in the gradient, not in what is returned.
        """
        nats, total = self._backward(micros)
        if self.masters is not None:
            self.masters.settle()
        return self._losses(nats.tolist(), total)["loss"]

    def _backward(self, micros: list[tuple[Batch, Prepared | None]]) -> tuple[Tensor, float]:
        """As `gradients`, which may still be those of working copies; returns this rank's part of the cross-entropy
        and the auxiliary loss in nats, (2,), and the number of labels of all ranks. A GPU may still be at work: nothing
        has waited for it."""
        mesh, labels = self.mesh, sum(batch.num_labels for batch, _ in micros)
        # Ranks that share a sequence or its layers hold the same batch: count it once.
        with span("agreement"):
            (total,) = reduce_sums([labels / (mesh.context.size * mesh.tensor.size * mesh.pipeline.size)])
        total = max(1.0, round(total))
        # FSDP averages gradients over the token ranks; the loss is a sum over them.
        scale = mesh.tokens.size / total
        if self.pipeline is not None:
            with span("data"):
                ready = [self._micro(*given) for given in micros]
            nats = torch.tensor(self.pipeline.step(ready, scale), dtype=torch.float64)
        else:
            nats = torch.zeros(2, dtype=torch.float64, device=self.device)
            for index, given in enumerate(micros):
                if isinstance(self.model, FSDPModule):
                    self.model.set_requires_gradient_sync(index == len(micros) - 1)
                if self.masters is not None:
                    self.masters.work()
                with span("data"):
                    micro = self._micro(*given)
                with span("forward"):
                    loss, _, aux = self.model.losses(*micro)
                with span("backward"):
                    ((loss if aux is None else loss + aux) * scale).backward()
                nats += torch.stack([x.detach().double() for x in (loss, loss * 0 if aux is None else aux)])
                if self.masters is not None and len(micros) > 1:
                    self.masters.settle()  # sums are in fp32
        self.settle()
        with span("gradient sums"):
            self._sum_shared()
        return nats, total

    def _losses(self, nats: list[float], total: float) -> dict[str, float]:
        """`loss` and, where the model has one, `aux_loss`, per label."""
        cross_entropy, aux = nats
        cross_entropy, aux = reduce_sums([cross_entropy / self.mesh.tensor.size, aux])
        moe = self.model.config.moe
        has_aux = moe is not None and moe.balance in ("aux", "aux_pooled")
        return {"loss": cross_entropy / total, **({"aux_loss": aux / total} if has_aux else {})}

    def _micro(self, batch: Batch, prepared: Prepared | None) -> Micro:
        self._last_context = ctx = self.context(batch, prepared)
        make_handles(ctx, self.prepare, self.model.config.attention)
        return Micro.of(ctx, batch.tokens, batch.labels, self.device)

    def _sum_shared(self) -> None:
        """Adds up gradients of what tensor ranks, or the ends of a pipeline, hold together, each having its addend."""
        model, mesh = self.model, self.mesh
        if mesh.expert.size > 1:
            # FSDP has taken their mean over fewer ranks than the loss is a mean over.
            for name, parameter in model.named_parameters():
                if is_expert(name) and isinstance(parameter.grad, DTensor):
                    parameter.grad.to_local().div_(mesh.expert.size)
        if mesh.tensor.size > 1:
            split = model.boxes()
            shared = [p for name, p in model.named_parameters() if p.requires_grad and name not in split]
            sum_over(mesh.tensor.group, shared)
        if mesh.ends is not None and model.config.tie_embeddings and model.embed is not None:
            sum_over(mesh.ends, [p for p in model.embed.parameters() if p.requires_grad])

    def score(self, windows: HeldOutWindows) -> tuple[float, int]:
        """(nats, labels) of held-out windows, over all ranks. Collective."""
        if self.masters is not None:
            self.masters.work()
        found = total_nats(
            self.model, windows, self.prepare, self.mesh, self.device, self.pipeline, self._score_contexts
        )
        if self.masters is not None:
            self.masters.settle()
        return found

    def gradient_norm(self, nats: Tensor | None = None) -> Tensor:
        """Euclidean norm of the gradient of all parameters of all ranks, each counted once; NaN too where the ``nats``
        of some rank are not finite. Collective."""
        model, mesh, split = self.model, self.mesh, self.model.boxes()
        grads: dict[int, list[Tensor]] = {}  # by the number of ranks that hold the same
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            twice = name == "embed.weight" and mesh.ends is not None and model.config.tie_embeddings
            sharers = mesh.expert_parameters if is_expert(name) else mesh.parameters
            copies = sharers.size(0) * (1 if name in split else mesh.tensor.size) * (2 if twice else 1)
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            grads.setdefault(copies, []).append(local)
        squares = [_square_sum(same) / copies for copies, same in grads.items()]
        if not squares:  # nothing is trained here
            squares.append(torch.zeros((), device=self.device))
        if nats is not None:
            squares.append(0 * nats.sum().to(squares[0]))
        total = torch.stack(squares).sum().to(self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total.sqrt().to(squares[0].device)

    def settle(self) -> None:
        """Parameters and gradients are those to save, export and update, wherever the plan keeps them."""
        if self.stream is not None:
            self.stream.flush()

    def step(self, step: int, num_steps: int, micros: list[tuple[Batch, Prepared | None]]) -> dict[str, float]:
        """One optimiser step. Raises NotFiniteError before the update where loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        nats, total = self._backward(micros)
        rate = self.config.optim.rate(step, num_steps)
        with span("gradient norm"):
            norm = self.gradient_norm(nats)
            reading = Reading(torch.cat([nats.to(norm.device), norm.double()[None]]))
        with span("optimizer"):
            self._update(rate, norm)
        with span("agreement"):
            # The one time that the host waits for a GPU, which has the optimiser's work meanwhile.
            *local, size = reading.wait()
            losses = self._losses(local, total)
        loss = losses["loss"]
        if not math.isfinite(size):
            self._take_back()
            raise NotFiniteError(
                f"the loss of step {step + 1} is {loss:g} and the gradient's norm {size:g}: stopped before the "
                f"optimiser step; the largest gradient is in {largest_gradient(self.model)}"
            )
        if self.masters is not None:
            self.masters.drop_gradients()
        self.model.balance(self._last_context)
        return {**losses, "gradient_norm": size, "learning_rate": rate}

    def _update(self, rate: float, norm: Tensor) -> None:
        """The optimiser's step, which changes nothing where the norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clip, wide = self.config.optim.clip, norm.double()
        # 1 where nothing is clipped; NaN where the norm is not finite.
        factor = (clip / wide.clamp(min=clip) if clip > 0 else 1.0) + 0 * wide
        if self.masters is not None:
            self.masters.update(self.optimizer, factor)
        elif self.plan.precision == "pure_bf16":
            round_step(self.optimizer, factor, self.config.seed)
        elif math.isfinite(size := float(wide)):  # torch's own must know before it begins
            if 0 < clip < size:
                for group in self.optimizer.param_groups:
                    torch.nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
            self.optimizer.step()

    def _take_back(self) -> None:
        """After an update that changed nothing."""
        if self.masters is not None:
            self.masters.take_back(self.optimizer)
        elif self.plan.precision == "pure_bf16":
            take_back(self.optimizer, lambda parameter: parameter.grad)


def _square_sum(tensors: list[Tensor]) -> Tensor:
    """Sum of all squares, in fp32 at least whatever the tensors are in."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def largest_gradient(model: DecoderLM) -> str:
    """Name and size of the largest gradient over all ranks, NaN counting as largest. Collective."""
    worst = ("", 0.0)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if grad is not None and grad.numel():
            worst = max(worst, (name, float(grad.detach().abs().max())), key=lambda found: _badness(found[1]))
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, worst)
    name, size = max(of_all, key=lambda found: _badness(found[1]))
    return f"{name} ({size:g})"


def _badness(size: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(size) else (False, size)


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
        """(tokens/s since the last reading, this rank's peak memory in bytes). A GPU may be at the optimiser's work: it
        is not waited for, and what is left of it falls into the next reading."""
        now = time.perf_counter()
        rate = num_tokens / max(1e-9, now - self._last_s)
        self._last_s = now
        return rate, peak_memory_bytes(self.device)


def gathered(value: Tensor | float) -> list[float]:
    """A number of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, float(value))
    return values
