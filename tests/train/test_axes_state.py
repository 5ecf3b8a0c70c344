"""Checkpoints, exports, imports and evaluation are the same whatever axes a model is split along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.model.huggingface import load_pretrained, save_pretrained
from longspan.plan.plan import Plan
from longspan.train.checkpoint import CheckpointStore
from longspan.train.data.evaluation import HeldOutWindows
from longspan.train.manifest import CheckpointError
from tests.ranks import run_ranks
from tests.train.test_axes import DEEP
from tests.train.test_parity import micros, rows

PLANS = [
    Plan(context=1, tensor=2, pipeline=2),
    Plan(data=2, context=2, shard="zero3"),
    Plan(context=1, tensor=4),
    Plan(context=1, pipeline=2, data=2, shard="zero2", pipeline_schedule="zero_bubble"),
]


def make_trainer(plan: Plan, seed: int, init: Path | None = None) -> Any:
    from longspan.train.config import OptimConfig, TrainConfig
    from longspan.train.loop import Trainer

    config = TrainConfig(out=Path("unused"), seed=seed, init=init, optim=OptimConfig(warmup=0, clip=0.1))
    return Trainer(config, DEEP, plan, torch.device("cpu"))


def through_all_plans(rank: int, world: int, folder: str) -> list[tuple[float, float]]:
    """A step under each plan in turn, each going on from the checkpoint of the one before it, and an export of each."""
    outcomes = []
    for index, plan in enumerate(PLANS):
        trainer = make_trainer(plan, seed=3 if index == 0 else 4 + index)
        store = CheckpointStore(Path(folder) / "checkpoints", keep=9)
        if index:
            store.load(index - 1, trainer.model, trainer.optimizer, trainer.model.boxes())
        figures = trainer.step(index, len(PLANS), micros(plan, rank, 3 if plan.pipeline > 1 else 1, False))
        store.save_async(index, trainer.model, trainer.optimizer, {}, trainer.model.boxes())
        assert store.wait()
        outcomes.append((figures["loss"], figures["gradient_norm"]))
        save_pretrained(trainer.model, Path(folder) / f"model_{index}")
    return outcomes


def test_a_run_goes_on_under_another_plan(tmp_path: Path) -> None:
    alone = run_ranks(through_one, 1)[0]
    for outcomes in run_ranks(through_all_plans, 4, str(tmp_path)):
        for got, expected in zip(outcomes, alone[0], strict=True):
            assert got == pytest.approx(expected, rel=2e-5)
    for index, expected in enumerate(alone[1]):
        got = dict(load_pretrained(tmp_path / f"model_{index}").named_parameters())
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name].detach() - value).abs().max() <= 2e-4 * value.abs().max(), (index, name)


def through_one(rank: int, world: int) -> Any:
    trainer, outcomes, states = make_trainer(Plan(context=1), seed=3), [], []
    for index in range(len(PLANS)):
        figures = trainer.step(index, len(PLANS), micros(Plan(context=1), rank, 1, False))
        outcomes.append((figures["loss"], figures["gradient_norm"]))
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})  # no FSDP on one rank
    return outcomes, states


def import_and_evaluate(rank: int, world: int, folder: str) -> list[float]:
    from longspan.train.evaluate import total_nats

    found = []
    tokens, labels = rows(False)
    for plan in PLANS:
        trainer = make_trainer(plan, seed=9, init=Path(folder))
        windows = HeldOutWindows(
            tokens=tokens, labels=labels, scored=tokens.flatten().numpy(), num_labels=labels.numel()
        )
        nats, count = total_nats(
            trainer.model, windows, trainer.prepare, trainer.mesh, trainer.device, trainer.pipeline
        )
        assert count == labels.numel()
        found.append(nats)
    return found


def test_import_and_evaluation(tmp_path: Path) -> None:
    from longspan.model.decoder import build

    model = build(DEEP, device="cpu", seed=8)
    save_pretrained(model, tmp_path / "model")
    tokens, labels = rows(False)
    expected = float(model.loss(tokens, labels)[0].detach())
    for found in run_ranks(import_and_evaluate, 4, str(tmp_path / "model")):
        assert found == pytest.approx([expected] * len(PLANS), rel=1e-5)


def load_deeper(rank: int, world: int, folder: str) -> str:
    trainer = make_trainer(PLANS[0], seed=3)
    store = CheckpointStore(Path(folder), keep=9)
    store.save_async(0, trainer.model, None, {}, trainer.model.boxes())
    store.wait()
    from dataclasses import replace

    from longspan.train import loop

    deeper = loop.Trainer(trainer.config, replace(DEEP, num_layers=6), PLANS[0], torch.device("cpu"))
    with pytest.raises(CheckpointError) as caught:
        store.load(0, deeper.model, None, deeper.model.boxes())
    return str(caught.value)


def test_another_architecture_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for said in run_ranks(load_deeper, 4, str(tmp_path)):
        assert "blocks.5." in said and "is in the model and not in the checkpoint" in said
