"""Adapters and partly frozen models on every axis: checkpoints go on under other plans, and what is exported is, bit by
bit, what one rank exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longspan.model.decoder import build
from longspan.model.hf_adapter import TENSORS, save_adapter
from longspan.model.huggingface import save_pretrained
from longspan.model.lora import LoraConfig
from longspan.plan.plan import Plan
from longspan.train.checkpoint import CheckpointStore
from tests.ranks import run_ranks
from tests.train.test_axes import DEEP
from tests.train.test_axes_tuned import ALONE, EARLY, LORA, Tuning, options
from tests.train.test_parity import micros

PLANS = [
    Plan(context=1, tensor=2, pipeline=2),
    Plan(context=1, pipeline=4),
    Plan(context=2, tensor=2, shard="zero3"),
    Plan(context=1, pipeline=2, data=2, shard="zero2", pipeline_schedule="zero_bubble"),
]
FILES = {"lora": TENSORS, "freeze": "model.safetensors"}


def make_trainer(plan: Plan, folder: str, tuning: Tuning, seed: int) -> Any:
    from longspan.train.config import OptimConfig, TrainConfig
    from longspan.train.loop import Trainer

    optim = OptimConfig(warmup=0, clip=0.1)
    config = TrainConfig(out=Path("unused"), seed=seed, init=Path(folder) / "model", optim=optim, **options(tuning))
    return Trainer(config, DEEP, plan, torch.device("cpu"))


def save(trainer: Any, path: Path, tuning: Tuning) -> None:
    if isinstance(tuning, LoraConfig):
        save_adapter(trainer.model, path, tuning, base="there")
    else:
        save_pretrained(trainer.model, path)


def through_all_plans(rank: int, world: int, folder: str, tuning: Tuning) -> list[tuple[float, float]]:
    """A step under each plan in turn, each going on from the checkpoint of the one before it, and an export of each."""
    outcomes, store = [], CheckpointStore(Path(folder) / "checkpoints", keep=9)
    for index, plan in enumerate(PLANS):
        trainer = make_trainer(plan, folder, tuning, 3 + index)  # but for the first, its adapters are overwritten
        if index:
            store.load(index - 1, trainer.model, trainer.optimizer, trainer.model.boxes())
        num_micro = {1: 1, 4: 6}.get(plan.pipeline, 3)
        figures = trainer.step(index, len(PLANS), micros(plan, rank, num_micro, False))
        store.save_async(index, trainer.model, trainer.optimizer, {}, trainer.model.boxes())
        assert store.wait()
        outcomes.append((figures["loss"], figures["gradient_norm"]))
        save(trainer, Path(folder) / f"exported_{index}", tuning)
    return outcomes


def through_one(rank: int, world: int, folder: str, tuning: Tuning) -> list[tuple[float, float]]:
    """The same steps on one rank; and what it exports of the others' checkpoints."""
    trainer, outcomes = make_trainer(ALONE, folder, tuning, 3), []
    for index in range(len(PLANS)):
        figures = trainer.step(index, len(PLANS), micros(ALONE, rank, 1, False))
        outcomes.append((figures["loss"], figures["gradient_norm"]))
    store = CheckpointStore(Path(folder) / "checkpoints", keep=9)
    for index in range(len(PLANS)):
        store.load(index, trainer.model, trainer.optimizer)
        save(trainer, Path(folder) / f"alone_{index}", tuning)
    return outcomes


@pytest.mark.parametrize("tuning", [LORA, pytest.param(EARLY, marks=pytest.mark.slow)], ids=["lora", "freeze"])
def test_a_run_goes_on_under_another_plan(tmp_path: Path, tuning: Tuning) -> None:
    save_pretrained(build(DEEP, device="cpu", seed=3), tmp_path / "model")
    split = run_ranks(through_all_plans, 4, str(tmp_path), tuning)
    (alone,) = run_ranks(through_one, 1, str(tmp_path), tuning)
    for outcomes in split:
        for got, wanted in zip(outcomes, alone, strict=True):
            assert got == pytest.approx(wanted, rel=2e-5)
    file = FILES["lora" if tuning is LORA else "freeze"]
    before: dict[str, torch.Tensor] = {}
    for index in range(len(PLANS)):
        got, wanted = (load_file(tmp_path / f"{who}_{index}" / file) for who in ("exported", "alone"))
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted), index
        assert not before or any(not torch.equal(before[name], got[name]) for name in got)  # a step was taken
        before = got
