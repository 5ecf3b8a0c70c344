"""Compiled blocks under a memory budget: the same step, less kept, attention never twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from longspan.context import run
from longspan.plan.plan import Plan
from tests.ranks import run_ranks
from tests.train.test_parity import CONFIG, micros


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

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
            return x

        runs[0] = 0
        with saved_tensors_hooks(keep, lambda x: x):
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
