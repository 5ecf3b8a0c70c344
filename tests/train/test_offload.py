"""A plan's offload in the trainer: the steps of the plain run, AdamW on the host, checkpoints that fit either plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.model.decoder import DecoderLM
from longspan.model.huggingface import load_pretrained, save_pretrained
from longspan.model.offload import ActivationOffload
from longspan.plan.plan import Plan
from longspan.train.checkpoint import CheckpointStore
from longspan.train.config import ModelConfig, TrainConfig
from longspan.train.data.batches import Batch
from longspan.train.loop import Trainer
from tests.ranks import run_ranks

DECODER = ModelConfig(layers=3, width=32, heads=2).decoder(257, 64)


def trainer_of(plan: Plan) -> Trainer:
    with mock.patch.dict(ActivationOffload.__init__.__kwdefaults__, min_bytes=0):
        return Trainer(TrainConfig(seed=3), DECODER, plan, torch.device("cpu"))


def steps(trainer: Trainer, first: int, last: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, last):
        tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(step))
        batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], lengths=None, num_labels=64, position=0)
        found.append(trainer.step(step, 6, [(batch, None)]))
    return found


def whole(model: DecoderLM) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()  # type: ignore[operator]
            for name, value in model.state_dict().items()}  # fmt: skip


def one_rank(_rank: int, _world: int, folder: Path, plans: list[Plan]) -> Any:
    """The plain run; then, under each plan, two steps, a checkpoint, and the rest under the next plan."""
    want = steps(trainer_of(Plan().fit(1)), 0, 4)
    runs, trainer = [], trainer_of(plans[0].fit(1))
    for plan, other in zip(plans, plans[1:] + plans[:1], strict=True):
        store = CheckpointStore(folder / plan.offload)
        trainer = trainer_of(plan.fit(1))
        got = steps(trainer, 0, 2)
        store.save_async(2, trainer.model, trainer.optimizer, {})
        assert store.wait()
        resumed = trainer_of(other.fit(1))
        store.load(None, resumed.model, resumed.optimizer)
        saved, loaded = whole(trainer.model), whole(resumed.model)
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        got += steps(resumed, 2, 4)
        runs.append(got)
    assert trainer.stream is not None
    steps(trainer, 4, 5)
    with torch.no_grad():
        trainer.model(torch.zeros(1, 3, dtype=torch.int64))  # brings parameters to the device
    trainer.settle()
    save_pretrained(trainer.model, folder / "model")
    exported = load_pretrained(folder / "model", dtype=torch.float32, device="cpu").state_dict()
    same = [torch.equal(value, exported[name]) for name, value in whole(trainer.model).items()]
    state = {value.device.type for part in trainer.optimizer.state.values() for value in part.values()}
    return want, runs, all(same), state


def test_steps_checkpoints_and_export(tmp_path: Path) -> None:
    plans = [Plan(offload="activations", recompute="full"), Plan(offload="both", recompute="attention")]
    ((want, runs, same, state),) = run_ranks(one_rank, 1, tmp_path, plans)
    assert same and state == {"cpu"}
    for plan, got in zip(plans, runs, strict=True):
        for a, b in zip(want, got, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), plan
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4), plan
