"""Compiled blocks under a memory budget: the same step, less kept, attention never twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from longspan.context import run
from longspan.plan.plan import Plan
from tests.ranks import run_ranks
from tests.train.test_parity import CONFIG, micros


def keep(sizes: dict[int, int], x: torch.Tensor) -> torch.Tensor:
    """Notes the bytes of what is saved, each storage once."""
    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


def steps(rank: int, world: int) -> list[tuple[float, int, int]]:
    """(gradient norm, bytes kept, runs of attention) of a step by budget."""
    from longspan.train.config import TrainConfig
    from longspan.train.loop import Trainer

    runs = [0]

    class Counting(run.Worker):
        def __init__(self, *args) -> None:
            runs[0] += 1
            super().__init__(*args)

    run.Worker = Counting
    found = []
    for budget in (1.0, 0.3):
        plan = Plan(context=1, compile=True, activation_budget=budget).fit(world)
        trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), CONFIG, plan, torch.device("cpu"))
        kept: dict[int, int] = {}
        runs[0] = 0
        with saved_tensors_hooks(partial(keep, kept), lambda x: x):
            norm = trainer.step(0, 2, micros(plan, rank, 1, False))["gradient_norm"]
        found.append((norm, sum(kept.values()), runs[0]))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own, of torch.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_a_budget_keeps_less_and_attention_is_not_run_again() -> None:
    (norm, kept, runs), (norm_again, kept_less, runs_again) = run_ranks(steps, 1, timeout_s=300)[0]
    assert norm_again == pytest.approx(norm, rel=1e-5)
    assert kept_less < 0.9 * kept
    assert runs_again == runs == 2 * CONFIG.num_layers


def scores(rank: int, world: int) -> tuple[list[float], float, list[int]]:
    """Held-out losses by a compiled model, that of the plain one, and graphs run by a step before and after many."""
    from longspan.train.config import TrainConfig
    from longspan.train.data.evaluation import HeldOutWindows
    from longspan.train.loop import Trainer

    plan, config = Plan(context=1, compile=True).fit(world), replace(CONFIG, num_layers=1)
    tokens = torch.randint(0, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(1))

    def windows(length: int) -> HeldOutWindows:
        given, labels = tokens[:, :length], tokens[:, 1 : length + 1]
        return HeldOutWindows(
            tokens=given, labels=labels, scored=labels.flatten().numpy(), num_labels=int(labels.numel())
        )

    def graphs(trainer: Trainer) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.step(0, 2, micros(plan, rank, 1, False))
        return sum(event.name.startswith("Torch-Compiled Region") for event in profile.events() or ())

    plain = Trainer(TrainConfig(out=Path("unused"), seed=3), config, replace(plan, compile=False), torch.device("cpu"))
    want = plain.score(windows(13))[0]
    trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), config, plan, torch.device("cpu"))
    got = [trainer.score(windows(13))[0]]
    ran = [graphs(trainer)]
    for length in (12, 13, 12):
        trainer.score(windows(length))
    with torch.compiler.set_stance("fail_on_recompile"):
        got += [trainer.score(windows(12))[0] - trainer.score(windows(12))[0]]
        ran += [graphs(trainer)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.score(windows(12))
        ran += [sum(event.name.startswith("Torch-Compiled Region") for event in profile.events() or ())]
    return got, want, ran


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own, of torch.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_evaluations_are_compiled_once_for_every_length() -> None:
    (got, again), want, (first, later, of_score) = run_ranks(scores, 1, timeout_s=300)[0]
    assert got == pytest.approx(want, rel=1e-5) and again == 0
    assert first == later > 0 and of_score > 0
