"""Pipeline parallelism: a rank's stages, run by the schedules of torch.distributed.pipelining.

A stage is some layers (of L layers and S stages the first L mod S have one more), the first with the embedding, the
last with norm, head and loss. Where head and embedding are tied, both stages hold the matrix and their gradients are
added.

Micro-batches of a step have equal shapes and each its own mask; a stage meets them in order, in whatever schedule. The
stages are made anew for every shape of micro-batch, which costs milliseconds and no memory: lengths may change from
step to step.

Stages before the first that has something to train need no backward: they keep no activations, and neither they nor
that one compute a gradient of their input. In place of one they send zeros, as torch's schedules want some gradient.

Sent for a micro-batch of n local tokens of width c: n·c elements from stage to stage forward, as many back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from longspan.context.sequence import SequenceContext
from longspan.hardware.transfers import upload
from longspan.layout.mesh import Axis
from longspan.layout.weights import share
from longspan.mixers.contract import Context
from longspan.model.decoder import DecoderLM
from longspan.model.part import Layers
from longspan.plan.plan import V_SHAPED, Plan
from longspan.train.data.batches import BatchPlan
from longspan.train.precision import compute_dtype
from longspan.train.profiling import span

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Micro(NamedTuple):
    """One micro-batch on one rank: its local tokens (b, l) and labels (b, l), and their context."""

    tokens: Tensor
    labels: Tensor
    ctx: Context

    @classmethod
    def of(cls, ctx: SequenceContext, tokens: Tensor, labels: Tensor, device: torch.device) -> Micro:
        """This rank's part, on its device, of the rows of whole sequences on the host."""
        return cls(upload(ctx.local(tokens), device), upload(ctx.local(labels), device), ctx)


def ranks_of_stages(plan: Plan) -> list[int]:
    """The pipeline rank of every stage: round by round, or, for V-shaped schedules, there and back."""
    there = list(range(plan.pipeline))
    if plan.pipeline_schedule in V_SHAPED:
        return there + there[::-1]
    return there * plan.stages_per_rank


class Stage(nn.Module):
    """One stage as torch's schedules call it: states (ids before the first layer) to states (the loss after the last).

    It holds the very modules of the rank's model that it runs, and is what FSDP2 wraps; ``begin`` gives it a step's
    micro-batches.
    """

    def __init__(self, model: DecoderLM, index: int, layers: range) -> None:
        super().__init__()
        self.index, self.layers = index, layers
        first, last = layers.start == 0, layers.stop == model.config.num_layers
        self.embed = model.embed if first or (last and model.config.tie_embeddings) else None
        self.embed_positions = model.embed_positions if first else None
        self.blocks = Layers(zip(layers, model.blocks.of(layers), strict=True))
        self.norm, self.head = (model.norm, model.head) if last else (None, None)
        self._model = (model,)  # in a tuple, for it is no part of the stage
        self._micros: list[Micro] = []
        self._scale, self.aux = 1.0, 0.0  # aux: the auxiliary losses of the micro-batches since begin

    @property
    def model(self) -> DecoderLM:
        return self._model[0]

    def begin(self, micros: Sequence[Micro], scale: float) -> None:
        self._micros, self._scale, self.aux = list(micros), scale, 0.0

    def forward(self, x: Tensor) -> Tensor:
        _, labels, ctx = self._micros.pop(0)
        x, aux = self.model.stage(x, ctx, self.layers, labels)
        if aux is None:
            return x
        self.aux += float(aux.detach())
        return _WithAux.apply(x, aux, self._scale)  # type: ignore[no-any-return]


class _WithAux(torch.autograd.Function):
    """States, with ``scale`` as the gradient of this stage's auxiliary loss: it needs no way to the last stage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, aux: Tensor, scale: float) -> Tensor:
        ctx.aux = aux.new_tensor(scale)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.aux, None


class _Joined(torch.autograd.Function):
    """``out``, and zeros as the gradient of ``x``, of which it is made and which wants none."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(ctx.shape, dtype=ctx.dtype)


class _Stage(PipelineStage):
    """Torch's, which computes no gradients that nobody wants, with the trainer's named ranges around its work (only
    some of torch's schedules have their own)."""

    first_trained = 0  # the first stage of all with something to train

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._graphs: dict[int, Any] = {}

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage_index > self.first_trained:
            return super().forward_maybe_with_nosync(*args, **kwargs)
        # Outside of FSDP's hooks, which then see inputs without gradient, as in a first stage.
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and self.stage_index == self.first_trained):
            out = super().forward_maybe_with_nosync(*(x.detach() for x in args), **kwargs)
        return _Joined.apply(out, *args) if grad and not self.is_first else out

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with span("forward"):
            out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        # Torch below 2.13 drops the graph after the gradients of inputs, and those of weights then miss our functions.
        if isinstance(out, Tensor) and out.requires_grad:
            self._graphs[fwd_chunk_id] = get_gradient_edge(out)
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        with span("backward"):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self._graphs.pop(bwd_chunk_id, None)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        with span("backward"):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._graphs.pop(bwd_chunk_id, None)


def stage_layers(num_layers: int, plan: Plan) -> list[range]:
    """The layers of every stage."""
    count = plan.pipeline * plan.stages_per_rank
    return [share(num_layers, count, index) for index in range(count)]


def check_micros(plan: Plan, batches: BatchPlan) -> None:
    """Raises ValueError where some step's micro-batches do not suit the plan's pipeline."""
    if plan.pipeline == 1:
        return
    schedule, stages = plan.pipeline_schedule, plan.pipeline * plan.stages_per_rank
    for shape in batches.stages:
        micros = batches.num_micro(shape.rows, plan.row_ranks)
        if shape.rows % (plan.row_ranks * micros):
            raise ValueError(
                f"micro-batches of a pipeline must have equally many rows, got {shape.rows} rows in "
                f"{plan.row_ranks * micros} of them; change --batch.tokens or --batch.micro-rows"
            )
        if schedule in ("1f1b", "dualpipev") and micros < stages:
            raise ValueError(
                f"a pipeline by {schedule} needs a micro-batch for each of its {stages} stages, got {micros}; raise "
                "--batch.tokens, lower --batch.micro-rows, or use gpipe"
            )
        if schedule in ("interleaved", "zero_bubble") and micros % max(1, micros // plan.pipeline):
            raise ValueError(
                f"a pipeline by {schedule} takes micro-batches in equal rounds, got {micros} for {plan.pipeline} "
                f"ranks; make it a multiple of {plan.pipeline}"
            )


class Pipeline:
    """The stages of one rank, and a step through them. Collective.

    Args:
        stages: this rank's, sharded.
        dtype: of the states that go from stage to stage.
    """

    def __init__(self, stages: Sequence[Stage], plan: Plan, axis: Axis, device: torch.device) -> None:
        self.stages, self.axis, self.device = stages, axis, device
        self.ranks = ranks_of_stages(plan)
        trained: list[Any] = [None] * axis.size
        own = [stage.index for stage in stages if any(p.requires_grad for p in stage.parameters())]
        dist.all_gather_object(trained, own, group=axis.group)
        self.first_trained = min(index for there in trained for index in there)
        self.schedule = SCHEDULES[plan.pipeline_schedule]
        self.dtype = compute_dtype(plan.precision)
        self._made: tuple[tuple[int, ...], PipelineScheduleSingle | PipelineScheduleMulti] | None = None
        self._scale = 1.0

    def step(self, micros: Sequence[Micro], scale: float) -> tuple[float, float]:
        """Adds the gradients of ``scale`` x the summed losses of the micro-batches; returns the sum of the
        cross-entropies, on the rank of the last stage, elsewhere 0, and of this rank's auxiliary losses. Collective."""
        shape = (*micros[0].tokens.shape, len(micros))
        if self._made is None or self._made[0] != shape:
            self._made = shape, self._make(micros[0].tokens, len(micros))
        for stage in self.stages:
            stage.begin(micros, scale)
        self._scale, losses = scale, []
        arguments = (torch.cat([micro.tokens for micro in micros]),) if self._holds(0) else ()
        last = {"target": torch.zeros(len(micros), device=self.device), "losses": losses}
        self._made[1].step(*arguments, return_outputs=False, **(last if self._holds(-1) else {}))
        nats = sum(float(loss.detach()) for loss in losses) / scale
        return nats, sum(stage.aux for stage in self.stages)

    @torch.no_grad()
    def loss(self, micro: Micro) -> float:
        """The summed loss of one micro-batch, forward only, on the rank of the last stage; elsewhere 0. Collective."""
        x = micro.tokens
        for stage in self.stages:
            before, after = stage.index - 1, stage.index + 1
            if before >= 0 and self.ranks[before] != self.axis.rank:
                x = self._states(micro.tokens, stage, self.device).detach()
                dist.recv(x, group=self.axis.group, group_src=self.ranks[before])
            stage.begin([micro], 1.0)
            x = stage(x)
            if after < len(self.ranks) and self.ranks[after] != self.axis.rank:
                dist.send(x, group=self.axis.group, group_dst=self.ranks[after])
        return float(x) if self._holds(-1) else 0.0

    def _holds(self, stage: int) -> bool:
        return self.ranks[stage] == self.axis.rank

    def _make(self, tokens: Tensor, num_micro: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        made = []
        for stage in self.stages:
            first, last = stage.index == 0, stage.index == len(self.ranks) - 1
            loss = torch.empty((), device="meta")
            made.append(
                _Stage(
                    stage,
                    stage.index,
                    len(self.ranks),
                    self.device,
                    input_args=tokens.to("meta") if first else self._states(tokens, stage, torch.device("meta")),
                    output_args=loss if last else self._states(tokens, stage, torch.device("meta")),
                    group=self.axis.group,
                )
            )
            made[-1].first_trained = self.first_trained
        several = issubclass(self.schedule, PipelineScheduleMulti)
        return self.schedule(made if several else made[0], num_micro, loss_fn=self._loss, scale_grads=False)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        del target
        return output * self._scale

    def _states(self, tokens: Tensor, stage: Stage, device: torch.device) -> Tensor:
        rows, length = tokens.shape
        split, width = stage.model.part.split, stage.model.config.hidden_size
        return torch.empty(rows, split.tokens(length), width, dtype=self.dtype, device=device, requires_grad=True)
