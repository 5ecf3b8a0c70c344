"""A plan is data: how a model's training is split over devices, written by a person or by a planner.

Frozen, JSON-serialisable and edited by hand; trainer and server execute it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from longspan.context.choose import check_layout_name
from longspan.context.methods import builder, check_name
from longspan.model.recompute import Recompute

Shard = Literal["none", "zero2", "zero3"]
Precision = Literal["auto", "fp32", "bf16", "pure_bf16"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "looped_bfs", "zero_bubble", "zbv", "dualpipev"]
V_SHAPED = ("zbv", "dualpipev")  # first and last stage are on one rank
SPLIT_BACKWARD = ("zero_bubble", *V_SHAPED)  # gradients of weights come after those of inputs, in idle time
SEVERAL_STAGES = ("interleaved", "looped_bfs", "zero_bubble", *V_SHAPED)
Offload = Literal["none", "activations", "layers", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the devices share the work.

    Args:
        data: ranks that draw different rows.
        context: ranks that share each sequence; 0 stands for all ranks that ``data`` leaves.
        tensor: ranks that share every weight (heads, inner channels, vocabulary) and, between split parts, tokens.
        pipeline: ranks that share the layers.
        expert: ranks that share the experts; they draw different rows, as data ranks do.
        pipeline_schedule: order of micro-batches: "gpipe" (arXiv:1811.06965), "1f1b" (arXiv:2006.09503), "interleaved"
            (arXiv:2104.04473), "looped_bfs" (arXiv:2211.05953), "zero_bubble" (arXiv:2401.10241), "zbv"
            (arXiv:2405.15362), "dualpipev".
        stages: pipeline stages of each rank: 1 for "gpipe" and "1f1b", 2 for "zbv" and "dualpipev"; 0 for the usual.
        shard: who holds parameters, gradients and optimiser state: "none" (every rank all of it), "zero2" (gradients
            and optimiser state split over data x context), "zero3" (parameters too).
        replicas: copies of what is sharded, each over an equal part of the data ranks (HSDP); 1 for one copy.
        recompute: activation checkpointing: "none", "full" (each block), "attention" (each block but its attention,
            whose output is kept: LightSeq).
        method, layout: context-parallel method, as "usp:4" or "ulysses+burst" too, and token layout. Method "auto" is
            the one with the least estimated time where the run runs, and layout "auto" is then chosen with it; a
            method that is named has its own layout.
        precision: "bf16" computes in bf16, and keeps weights and optimiser state in fp32; "pure_bf16" keeps these in
            bf16 too, rounded by chance (8 bytes a parameter with its gradient, not 18); "fp32"; "auto" is bf16 on CUDA
            and fp32 elsewhere.
        mlp_tile: tokens that an MLP mixes at a time; 0 for all.
        compile: blocks through torch.compile, which fuses norms, rotations and activations; seconds to a minute at the
            first step of every shape.
        activation_budget: share (above 0, up to 1) of what compiled blocks would keep for the backward that they may
            keep: the compiler chooses what is cheapest to compute again. Below 1 with ``compile`` alone.
        offload: what is in host memory: "activations" (what ``recompute`` keeps of each block), "layers" (parameters of
            blocks but for those at work, gradients, optimiser state; one rank), or "both".
        offload_gib: most host memory for activations, in GiB; 0 for no limit. What finds no room stays on the device.
    """

    data: int = 1
    context: int = 0
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    pipeline_schedule: PipelineSchedule = "1f1b"
    stages: int = 0
    shard: Shard = "none"
    replicas: int = 1
    recompute: Recompute = "none"
    method: str = "auto"
    layout: str = "auto"
    precision: Precision = "auto"
    mlp_tile: int = 0
    compile: bool = False
    activation_budget: float = 1.0
    offload: Offload = "none"
    offload_gib: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "expert", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"a plan's {name} must be at least 1, got {getattr(self, name)}; leave it out for 1")
        for name in ("context", "mlp_tile", "stages", "offload_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"a plan's {name} must be 0 or more, got {getattr(self, name)}; leave it out")
        choices = {
            "shard": Shard,
            "recompute": Recompute,
            "precision": Precision,
            "pipeline_schedule": PipelineSchedule,
            "offload": Offload,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"a plan's {name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}; pick one"
                )
        self._check_sharding()
        self._check_stages()
        self._check_compile()
        self._check_offload()
        if self.method != "auto":
            check_name(self.method)
        if self.layout != "auto":
            check_layout_name(self.layout)

    def _check_sharding(self) -> None:
        if self.replicas > 1 and self.shard == "none":
            raise ValueError(
                f"replicas are copies of sharded weights, got {self.replicas} with shard none; set shard to zero2 or "
                "zero3"
            )
        if self.data % self.replicas:
            raise ValueError(
                f"a plan's replicas must divide data, got {self.replicas} for data {self.data}; change one"
            )

    def _check_compile(self) -> None:
        if self.compile and (self.tensor > 1 or self.expert > 1 or self.offload != "none"):
            raise ValueError(
                f"blocks are compiled whole and where they lie, got compile with tensor {self.tensor}, expert "
                f"{self.expert} and offload {self.offload!r}; leave compile or these out"
            )
        if self.compile and self.pipeline > 1 and self.pipeline_schedule in SPLIT_BACKWARD:
            raise ValueError(
                f"compiled blocks have one backward, which a pipeline by {self.pipeline_schedule} takes in two parts, "
                f"got compile with pipeline {self.pipeline}; use 1f1b or interleaved, or leave compile out"
            )
        if self.compile and self.recompute != "none":
            raise ValueError(
                f"compiled blocks are recomputed by activation_budget, got compile with recompute {self.recompute}; "
                "set recompute to none, and activation_budget to 0.6, say"
            )
        if not 0 < self.activation_budget <= 1 or (self.activation_budget < 1 and not self.compile):
            raise ValueError(
                f"activation_budget is a share of what compiled blocks keep, got {self.activation_budget} with compile "
                f"{self.compile}; take a number above 0 and up to 1, and set compile"
            )

    def _check_offload(self, world: int = 1) -> None:
        if self.moves_activations and self.recompute == "none":
            raise ValueError(
                f"a plan that offloads activations keeps few of them, got offload {self.offload!r} with recompute "
                "'none'; set recompute to full or attention"
            )
        if self.moves_activations and self.pipeline > 1:
            raise ValueError(
                f"activations are offloaded of one micro-batch at a time, got offload {self.offload!r} with pipeline "
                f"{self.pipeline}; leave one of the two out"
            )
        if self.streams_layers and (self.shard != "none" or world > 1):
            raise ValueError(
                f"a plan that offloads layers runs on one rank, got offload {self.offload!r} with shard "
                f"{self.shard!r} for {world} ranks; set shard to none and start 1 rank, or set offload to activations"
            )
        if self.streams_layers and self.precision == "pure_bf16":
            raise ValueError(
                f"a plan that offloads layers keeps fp32 weights on the host, got offload {self.offload!r} with "
                "precision pure_bf16; set precision to bf16, or offload to activations"
            )
        if self.offload_gib and not self.moves_activations:
            raise ValueError(
                f"a plan's offload_gib is for activations, got {self.offload_gib} with offload {self.offload!r}; leave "
                "it out, or set offload to activations or both"
            )

    def _check_stages(self) -> None:
        schedule, several = self.pipeline_schedule, self.pipeline_schedule in SEVERAL_STAGES
        if self.pipeline == 1 and self.stages > 1:
            raise ValueError(f"stages are of a pipeline, got {self.stages} with pipeline 1; leave stages out")
        fits = self.stages == 2 if schedule in V_SHAPED else (self.stages > 1) == several
        if self.pipeline > 1 and self.stages and not fits:
            number = "2 stages" if schedule in V_SHAPED else "several stages" if several else "one stage"
            raise ValueError(
                f"a pipeline by {schedule} has {number} on a rank, got {self.stages}; leave stages out for the usual "
                "number"
            )

    def axes(self) -> dict[str, int]:
        """Sizes of the axes in use, data and context always among them."""
        names = ("data", "context", "tensor", "pipeline", "expert")
        return {name: getattr(self, name) for name in names if name in names[:2] or getattr(self, name) > 1}

    @property
    def row_ranks(self) -> int:
        """Ranks that draw different rows."""
        return self.data * self.expert

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of each rank, the usual number resolved."""
        return self.stages or (2 if self.pipeline > 1 and self.pipeline_schedule in SEVERAL_STAGES else 1)

    def fit(self, world: int) -> Plan:
        """The plan with ``context`` resolved. Raises ValueError where axes or method do not fit ``world`` ranks."""
        fixed = self.data * self.tensor * self.pipeline * self.expert
        context = self.context or max(1, world // fixed)
        if fixed * context != world:
            axes = " x ".join(
                f"{name} {size}" for name, size in dataclasses.replace(self, context=context).axes().items()
            )
            raise ValueError(
                f"a plan's axes must multiply to the number of ranks, got {axes} for {world} ranks; change the plan or "
                f"start {fixed * context} ranks"
            )
        if self.method != "auto":
            builder(self.method, context)  # refuses a degree that does not divide the ranks
        self._check_offload(world)
        return dataclasses.replace(self, context=context)

    @property
    def moves_activations(self) -> bool:
        return self.offload in ("activations", "both")

    @property
    def streams_layers(self) -> bool:
        return self.offload in ("layers", "both")

    def on(self, device_type: str) -> Plan:
        """The plan with ``precision`` resolved for a kind of device."""
        if self.precision != "auto":
            return self
        return dataclasses.replace(self, precision="bf16" if device_type == "cuda" else "fp32")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_dict(values: Any) -> Plan:
        """Inverse of ``to_dict``. Raises ValueError on an unknown key, with the nearest known one."""
        if not isinstance(values, dict):
            raise ValueError(f"a plan must be a JSON object, got {type(values).__name__}; write it with to_json")
        known = {item.name: item for item in dataclasses.fields(Plan)}
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise ValueError(
                    f"unknown key {key!r} in a plan"
                    + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
                )
            kind = type(known[key].default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(
                    f"a plan's {key} must be {kind.__name__}, got {value!r} ({type(value).__name__}); change it"
                )
        return Plan(**values)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of ``to_json``. Raises ValueError on text that is not JSON, and as ``from_dict``."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON, got an error at character {error.pos}: {error.msg}") from None
        return Plan.from_dict(values)

    @staticmethod
    def read(path: str | Path) -> Plan:
        """The plan in a file. Raises ValueError naming the file."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"plan file {path}: {error}") from None
