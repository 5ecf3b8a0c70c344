"""Parts of the loop on ranks of their own: the largest gradient, evaluation, and a run on a slow clock."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longspan.context import run as handles
from longspan.plan.plan import Plan
from longspan.train import loop, session
from longspan.train.config import BatchConfig, EvalConfig, ModelConfig, TrainConfig
from longspan.train.data.corpus import CorpusConfig
from longspan.train.data.evaluation import HeldOutWindows
from longspan.train.evaluate import total_nats
from longspan.train.liveness import Heartbeat
from longspan.train.loop import Trainer, largest_gradient
from tests.longspan_cli import records, text_folder
from tests.ranks import run_ranks


def worst(rank: int, world: int) -> list[str]:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    said = []
    for first, last in ((1.0, 2.5), (math.inf, 3.0), (math.inf, math.nan)):
        for layer, value in zip(model, (first if rank == 0 else 0.0, 2.0, last if rank == 1 else 0.0), strict=True):
            layer.weight.grad = torch.full((2, 2), value)
        said.append(largest_gradient(model))  # type: ignore[arg-type]
    return said


def test_the_largest_gradient_is_one_that_is_no_number() -> None:
    assert run_ranks(worst, 2) == [["2.weight (2.5)", "0.weight (inf)", "2.weight (nan)"]] * 2


def evaluate(rank: int, world: int) -> list[int]:
    model = ModelConfig(layers=2, width=32, heads=2).decoder(257, 64)
    trainer = Trainer(TrainConfig(), model, Plan().fit(world).on("cpu"), torch.device("cpu"))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    windows = HeldOutWindows(tokens=tokens, labels=tokens, scored=np.zeros(128, np.int64), num_labels=128)
    gc.disable()  # nothing may need it
    held = []
    for _ in range(3):
        total_nats(trainer.model, windows, trainer.prepare, trainer.mesh, trainer.device)
        held.append(len(handles._TABLE))
    return held


def test_an_evaluation_leaves_no_handle_behind() -> None:
    assert run_ranks(evaluate, 2) == [[0, 0, 0]] * 2


def train_slowly(rank: int, world: int, out: str, data: str, step_s: float) -> bool:
    """A run whose clock moves by so much at every step."""
    dist.destroy_process_group()
    clock = itertools.count(0.0, step_s)
    config = TrainConfig(
        out=Path(out),
        data=CorpusConfig(paths=(data,)),
        model=ModelConfig(layers=1, width=32, heads=2),
        batch=BatchConfig(steps=100, tokens=256, length=64, start_length=16, warmup_fraction=0.9),
        eval=EvalConfig(tokens=0),
        prompt="",
        limit_s=100.0,
        data_workers=0,
    )
    with mock.patch.object(session, "time", SimpleNamespace(perf_counter=lambda: next(clock))):
        return session.run(config)


@pytest.mark.parametrize(
    ("step_s", "lengths"),
    [(20.0, [16, 16, 32, 32, 64, 64]), (30.0, [16, 16, 32, 64]), (45.0, [16, 16, 64]), (60.0, [16, 64])],
)
def test_a_slow_run_reaches_the_full_length(tmp_path: Path, step_s: float, lengths: list[int]) -> None:
    out, data = tmp_path / "run", text_folder(tmp_path / "text")
    assert run_ranks(train_slowly, 1, str(out), str(data), step_s) == [True]
    assert [record["sequence_length"] for record in records(out)] == lengths
    *left_out, stopped = [record["message"] for record in records(out, "event")]
    assert len(left_out) == len(set(lengths)) - 1 and all("left out" in message for message in left_out)
    assert left_out[-1].endswith("to 90 left out, to keep within 100 s") and "time limit" in stopped


def train_with_evaluation(rank: int, world: int, out: str, data: str) -> int:
    """A run whose evaluations take 1000 s and all else a second; how often the watchdog was armed."""
    dist.destroy_process_group()
    now_s, armed = [0.0], [0]

    def clock() -> float:
        now_s[0] += 1.0
        return now_s[0]

    def score(*_: object) -> tuple[float, float]:
        now_s[0] += 1000.0
        return 1.0, 1.0

    def watched(self: Heartbeat) -> contextlib.AbstractContextManager[None]:
        armed[0] += 1
        return contextlib.nullcontext()

    config = TrainConfig(
        out=Path(out),
        data=CorpusConfig(paths=(data,)),
        model=ModelConfig(layers=1, width=32, heads=2),
        batch=BatchConfig(steps=3, tokens=64, length=64),
        eval=EvalConfig(contexts=(16,), tokens=64, every=1),
        prompt="",
        data_workers=0,
    )
    with (
        mock.patch.object(loop, "time", SimpleNamespace(perf_counter=clock)),
        mock.patch.object(session, "held_out_score", score),
        mock.patch.object(Heartbeat, "watched", watched),
    ):
        session.run(config)
    return armed[0]


def test_steps_and_evaluations_are_watched_and_evaluations_do_not_slow_the_rate(tmp_path: Path) -> None:
    out, data = tmp_path / "run", text_folder(tmp_path / "text")
    assert run_ranks(train_with_evaluation, 1, str(out), str(data)) == [3 + 2]
    assert [record["tokens_per_s"] for record in records(out)] == [64.0] * 3
