"""Axes, and products of them, through NCCL on GPUs of one host: the loss, norm and every gradient of one process."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from longspan.model.config import DecoderConfig, MoeConfig
from longspan.plan.plan import Plan
from tests.ranks import run_ranks
from tests.train.test_axes import AXES, DEEP, PAIRS, named
from tests.train.test_parity import compare, one_rank, reference

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()


def through_nccl(rank: int, world: int, folder: str, plan: Plan, config: DecoderConfig, num_micro: int) -> Any:
    dist.destroy_process_group()
    # Torch's own: autograd's thread makes a context when it first multiplies.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    torch.cuda.set_device(rank)
    store = FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world)
    return one_rank(rank, world, plan, config, num_micro, False, False, device=f"cuda:{rank}")


def found(plan: Plan, tmp_path: Path, config: DecoderConfig, num_micro: int) -> list[Any]:
    world = plan.data * plan.expert * plan.context * plan.tensor * plan.pipeline
    if world > GPUS:
        pytest.skip(f"{world} GPUs are needed, and there are {GPUS}")
    plan = replace(plan, precision="fp32").fit(world)
    return run_ranks(through_nccl, world, str(tmp_path), plan, config, num_micro)


def holds(plan: Plan, tmp_path: Path, config: DecoderConfig = DEEP) -> None:
    compare(found(plan, tmp_path, config, 6 if plan.pipeline > 2 else 3), *reference(config, False))


@pytest.mark.parametrize("plan", AXES.values(), ids=named)
def test_each_axis(plan: Plan, tmp_path: Path) -> None:
    holds(replace(plan, context=max(plan.context, 1)), tmp_path)


HYBRID = Plan(data=2, context=2, shard="zero3", replicas=2)
FOUR = [*PAIRS, HYBRID, Plan(context=1, tensor=4), Plan(context=1, pipeline=4)]


@pytest.mark.parametrize("plan", FOUR, ids=named)
def test_four_ranks(plan: Plan, tmp_path: Path) -> None:
    holds(plan, tmp_path)


SCHEDULES = ["gpipe", "interleaved", "zero_bubble", "zbv"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipeline_schedules(schedule: Any, tmp_path: Path) -> None:
    untied = replace(DEEP, tie_embeddings=schedule != "zbv")
    holds(Plan(context=1, pipeline=2, pipeline_schedule=schedule), tmp_path, untied)


MIXTURE = replace(DEEP, moe=MoeConfig(num_experts=5, experts_per_token=2, inner_size=16))


@pytest.mark.parametrize("plan", [Plan(context=1, expert=2), Plan(context=1, expert=2, tensor=2)], ids=named)
def test_experts(plan: Plan, tmp_path: Path) -> None:
    """Beside one rank, whose own gradients tests/train/test_moe.py compares with the formula."""
    results = found(plan, tmp_path, MIXTURE, 1)
    alone = run_ranks(one_rank, 1, Plan(context=1, precision="fp32").fit(1), MIXTURE, 1, False, False)
    loss, _, grads = alone[0]
    compare(results, loss, {name: grad for name, (_, grad) in grads.items()})
