"""Experts under the trainer: loss, auxiliary loss, gradients and biases of any plan are those of one process."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.model.config import DecoderConfig, MoeConfig, NormConfig
from longspan.model.decoder import build
from longspan.model.huggingface import read_config
from longspan.plan.plan import Plan
from longspan.train.config import ModelConfig, TrainConfig
from tests.longspan_cli import forked, losses, records, train
from tests.ranks import run_ranks
from tests.train.test_axes import named
from tests.train.test_parity import CONFIG, compare, micros, one_rank, rows

MOE = MoeConfig(
    num_experts=5, experts_per_token=2, inner_size=16, shared_inner_size=8, balance="aux", aux_coef=0.5, bias_speed=0.25
)
# A wide spread of initial weights, so that experts are far from evenly loaded.
SPARSE = dataclasses.replace(CONFIG, num_layers=3, moe=MOE, dense_layers=(1,), init_std=0.3)
PLANS = [
    (2, Plan(data=2)),
    (2, Plan(context=2, shard="zero2")),
    (4, Plan(data=2, context=2, shard="zero3", recompute="attention", mlp_tile=8)),
]


def balanced(balance: Any) -> DecoderConfig:
    return dataclasses.replace(SPARSE, moe=dataclasses.replace(MOE, balance=balance))


def reference(config: DecoderConfig) -> tuple[float, float, dict[str, torch.Tensor]]:
    """One process, all rows at once: cross-entropy and auxiliary loss per label, and every gradient."""
    model = build(config, device="cpu", seed=3)
    cross_entropy, count, aux = model.losses(*rows(False))
    assert aux is not None
    ((cross_entropy + aux) / count).backward()
    return (
        (cross_entropy / count).item(),
        (aux / count).item(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("balance", ["aux", "aux_pooled"])
@pytest.mark.parametrize(("world", "plan"), PLANS, ids=lambda x: str(x) if isinstance(x, int) else None)
def test_loss_and_every_gradient_equal_one_process(world: int, plan: Plan, balance: str) -> None:
    config = balanced(balance)
    loss, _, grads = reference(config)
    compare(run_ranks(one_rank, world, plan.fit(world), config, 1, False, False), loss, grads)


def of_micros(config: DecoderConfig, plan: Plan, num_micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    """As ``reference``, but for each micro-batch, the union of those of all ranks: it has a balance of its own."""
    model, (tokens, labels) = build(config, device="cpu", seed=3), rows(False)
    runs = torch.arange(len(tokens)).view(plan.row_ranks, num_micro, -1)
    nats = 0.0
    for micro in range(num_micro):
        part = runs[:, micro].flatten()
        cross_entropy, _, aux = model.losses(tokens[part], labels[part])
        ((cross_entropy + (0 if aux is None else aux)) / labels.numel()).backward()
        nats += cross_entropy.item()
    return nats / labels.numel(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


AXES = [
    (2, Plan(context=1, expert=2), 1),
    (3, Plan(context=1, expert=3, recompute="full"), 1),
    (4, Plan(context=2, expert=2, shard="zero3", recompute="attention"), 1),
    (6, Plan(context=1, data=3, expert=2, shard="zero2"), 1),
    (4, Plan(context=1, expert=2, tensor=2), 1),
    (2, Plan(context=1, tensor=2), 1),
    (2, Plan(context=1, pipeline=2), 3),
    (4, Plan(context=1, pipeline=2, expert=2), 3),
    (8, Plan(context=1, pipeline=2, expert=2, tensor=2), 3),
]


@pytest.mark.parametrize(
    ("world", "plan", "num_micro"), AXES, ids=lambda x: named(x) if isinstance(x, Plan) else str(x)
)
def test_experts_over_all_axes(world: int, plan: Plan, num_micro: int) -> None:
    results = run_ranks(one_rank, world, plan.fit(world), SPARSE, num_micro, False, False)
    compare(results, *of_micros(SPARSE, plan, num_micro))


def test_experts_between_sandwich_norms() -> None:
    config = dataclasses.replace(SPARSE, wiring="sandwich", norm=NormConfig(kind="rms_plus_one"))
    plan = Plan(context=1, expert=2, tensor=2)
    results = run_ranks(one_rank, 4, plan.fit(4), config, 1, False, False)
    compare(results, *of_micros(config, plan, 1))


def forgetful(rank: int, world: int) -> Any:
    """A rank whose counts are its own alone."""
    from longspan.train import loop

    loop.SequenceContext.total = lambda self, x: x  # type: ignore[method-assign]
    return one_rank(rank, world, Plan(context=2), SPARSE, 1, False, False)


def test_the_comparison_bites() -> None:
    _, _, grads = reference(SPARSE)
    got = run_ranks(forgetful, 2)[0][2]
    name = "blocks.0.mlp.router.weight"
    assert (got[name][1] - grads[name]).abs().max() > 1e-3 * grads[name].abs().max()


def some_steps(rank: int, world: int, plans: list[Plan]) -> Any:
    from longspan.train.loop import Trainer

    results = []
    for plan in plans:
        trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), balanced("bias"), plan, torch.device("cpu"))
        figures = [trainer.step(step, 3, micros(plan, rank, 3, False)) for step in range(3)]
        results.append((figures, {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}))
    return results


def test_biases_move_alike_on_all_ranks_by_the_load_of_a_whole_step() -> None:
    (((figures, expected),),) = run_ranks(some_steps, 1, [Plan().fit(1)])
    assert "aux_loss" not in figures[0]
    assert expected["blocks.0.mlp.selection_bias"].any() and not expected["expert_load"].any()
    plans = [
        Plan(context=2),
        Plan(data=2, context=1, recompute="full"),
        Plan(context=1, expert=2),
        Plan(context=1, pipeline=2),
    ]
    for results in run_ranks(some_steps, 2, plans):
        for _, got in results:
            assert not got.pop("expert_load").any()
            assert got
            for name, value in got.items():  # of a pipeline's rank, those of its layers
                assert torch.equal(value, expected[name]), name


def test_the_auxiliary_loss_is_a_figure_of_its_own() -> None:
    loss, aux, _ = reference(SPARSE)
    trained = run_ranks(one_step, 2)
    assert trained[0] == trained[1]
    assert trained[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert trained[0]["aux_loss"] == pytest.approx(aux, rel=1e-5)


def one_step(rank: int, world: int) -> Any:
    from longspan.train.loop import Trainer

    plan = Plan(context=2)
    trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), SPARSE, plan, torch.device("cpu"))
    return trainer.step(0, 1, micros(plan, rank, 1, False))


EXPERTS = ("--model.experts", "4", "--model.expert-inner", "32")


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    forked(*train(out, *EXPERTS, "--model.balance", "aux_pooled")).good()
    assert all(math.isfinite(record["loss"]) and record["aux_loss"] > 0 for record in records(out))
    # Reads as a Qwen3-MoE.
    assert read_config(out / "model").moe == MoeConfig(
        num_experts=4, experts_per_token=2, inner_size=32, balance="aux_pooled"
    )


def test_biases_go_on_from_a_checkpoint_and_are_not_exported(tmp_path: Path) -> None:
    out, options = tmp_path / "run", (*EXPERTS, "--model.balance", "bias", "--model.bias-speed", "0.1")
    said = forked(*train(out, *options, "--save-every", "3")).good()
    assert "a choice without a bias" in said.out and not (out / "model").exists()
    whole = losses(out)
    forked(*train(out, *options, "--resume", "step_000003")).good()
    assert losses(out) == whole


def test_options_of_experts_need_experts() -> None:
    with pytest.raises(ValueError, match="expert_inner is of a mixture of experts, got 3 without one"):
        ModelConfig(expert_inner=3)
    config = ModelConfig(experts=4, expert_inner=3, shared_inner=2).decoder(257, 64)
    assert config.moe == MoeConfig(num_experts=4, experts_per_token=2, inner_size=3, shared_inner_size=2, balance="aux")
