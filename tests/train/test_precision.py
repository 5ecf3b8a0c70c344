"""Working copies stand in for master weights, and their gradients add up in the masters' dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longspan.plan.plan import Plan
from longspan.train.precision import MasterWeights
from tests.ranks import run_ranks
from tests.train.test_parity import CONFIG, micros, one_rank, reference


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)


def test_copies_take_the_places_and_give_them_back() -> None:
    model = Tied()
    masters = dict(model.named_parameters())
    weights = MasterWeights(model, torch.bfloat16, keep_frozen=True)
    seen = []
    for step in range(2):
        weights.work()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert model.first.weight is model.second.weight and not model.second.bias.requires_grad
        assert torch.equal(model.first.weight, masters["first.weight"].bfloat16())
        x = torch.full((1, 3), 1.0 + 2.0**-7 * step, dtype=torch.bfloat16)
        model.first(x).sum().backward()
        seen.append(x.float().expand(3, 3))
        weights.settle()
        assert dict(model.named_parameters()) == masters
    # 1 + (1 + 2^-7) has more digits than bf16 holds.
    torch.testing.assert_close(masters["first.weight"].grad, seen[0] + seen[1], rtol=0, atol=0)
    with torch.no_grad():
        masters["first.weight"].add_(1)
    weights.work()
    assert torch.equal(model.first.weight, masters["first.weight"].bfloat16())


def test_one_rank_in_bf16_is_near_fp32_and_two_ranks_agree() -> None:
    """Without FSDP on one rank, with it on two: the same rounding of weights."""
    loss, grads = reference(CONFIG, False)
    plan = Plan(precision="bf16")
    alone = run_ranks(one_rank, 1, plan.fit(1), CONFIG, 1, False, False)[0]
    split = run_ranks(one_rank, 2, replace(plan, data=2).fit(2), CONFIG, 1, False, False)[0]
    for got_loss, _, got in (alone, split):
        assert abs(got_loss - loss) <= 1e-3 * loss
        for name, expected in grads.items():
            assert (got[name][1] - expected).norm() <= 3e-2 * expected.norm(), name
            assert got[name][1].dtype == torch.float32


def diverging(rank: int, world: int) -> None:
    from longspan.train.config import TrainConfig
    from longspan.train.loop import NotFiniteError, Trainer

    plan = Plan(context=1, precision="bf16").fit(world)
    stopped, fresh = (
        Trainer(TrainConfig(out=Path("unused"), seed=3), CONFIG, plan, torch.device("cpu")) for _ in range(2)
    )
    for num_micro in (1, 2):
        batches = micros(plan, rank, num_micro, False)
        before = {name: p.detach().clone() for name, p in stopped.model.named_parameters()}
        gain = dict(stopped.model.named_parameters())["norm.weight"]
        with torch.no_grad():
            gain.fill_(float("inf"))
        with pytest.raises(NotFiniteError, match="stopped before the optimiser step; the largest gradient is in"):
            stopped.step(num_micro, 9, batches)
        with torch.no_grad():
            gain.copy_(before["norm.weight"])
        for name, p in stopped.model.named_parameters():
            assert torch.equal(p, before[name]) and p.grad is not None and p.grad.dtype == torch.float32
        assert stopped.step(num_micro, 9, batches) == fresh.step(num_micro, 9, batches)
    for p, q in zip(stopped.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_diverges_leaves_masters_and_their_gradients() -> None:
    run_ranks(diverging, 1)


def norms(rank: int, world: int) -> list[float]:
    """The gradient's norm by itself, beside finite losses, and where the last rank's loss is not finite."""
    from longspan.train.config import TrainConfig
    from longspan.train.loop import Trainer

    plan = Plan(data=2, context=1, precision="fp32").fit(world)
    trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), CONFIG, plan, torch.device("cpu"))
    trainer.gradients(micros(plan, rank, 1, False))
    lost = torch.tensor([float("inf") if rank == world - 1 else 1.0, 0.0], dtype=torch.float64)
    return [float(trainer.gradient_norm(nats)) for nats in (None, torch.full_like(lost, 3.0), lost)]


def test_a_loss_that_is_not_finite_on_one_rank_stops_the_step_on_all() -> None:
    for alone, beside, lost in run_ranks(norms, 2):
        assert alone == beside > 0 and lost != lost


def pure(rank: int, world: int, plan: Plan, num_micro: int) -> Any:
    """Losses of four steps in pure bf16, and this rank's parameters after them."""
    from longspan.train.config import OptimConfig, TrainConfig
    from longspan.train.loop import Trainer

    config = TrainConfig(out=Path("unused"), seed=3, optim=OptimConfig(lr=0.01, warmup=0))
    trainer = Trainer(config, CONFIG, plan, torch.device("cpu"))
    batches = micros(plan, rank, num_micro, False)
    losses = [trainer.step(step, 9, batches)["loss"] for step in range(4)]
    state = [value for each in trainer.optimizer.state.values() for key, value in each.items() if key != "step"]
    assert {x.dtype for x in (*trainer.model.parameters(), *state)} == {torch.bfloat16}
    assert all(not parameter.is_meta for parameter in trainer.model.parameters())
    return losses, {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }


@pytest.mark.parametrize(
    "plan",
    [
        Plan(context=1),
        Plan(data=2, context=1),
        Plan(context=2, shard="zero3"),
        Plan(context=1, tensor=2),
        Plan(context=1, pipeline=2),
        pytest.param(Plan(data=2, context=1, tensor=2, shard="zero2"), marks=pytest.mark.slow),
    ],
)
def test_weights_and_moments_in_bf16_learn_alike_and_stay_alike(plan: Plan) -> None:
    """Like fp32 they learn; and ranks that hold the same weight keep the same, whose chance must be one."""
    world = plan.data * plan.context * plan.tensor * plan.pipeline
    wide = run_ranks(steps_in_fp32, 1)[0]
    found = run_ranks(pure, world, replace(plan, precision="pure_bf16").fit(world), 3 if plan.pipeline > 1 else 1)
    for losses, parameters in found:
        assert losses == found[0][0]
        assert losses == pytest.approx(wide, rel=0.01), "and not those of the first step"
        for name, value in parameters.items():
            if plan.pipeline == 1 and (plan.tensor == 1 or value.ndim == 1):
                assert torch.equal(value, found[0][1][name]), name
    assert wide[3] < 0.97 * wide[0]


def steps_in_fp32(rank: int, world: int) -> list[float]:
    from longspan.train.config import OptimConfig, TrainConfig
    from longspan.train.loop import Trainer

    config = TrainConfig(out=Path("unused"), seed=3, optim=OptimConfig(lr=0.01, warmup=0))
    plan = Plan(context=1, precision="fp32")
    trainer = Trainer(config, CONFIG, plan, torch.device("cpu"))
    return [trainer.step(step, 9, micros(plan, rank, 1, False))["loss"] for step in range(4)]


def test_layers_on_the_host_are_not_in_bf16() -> None:
    with pytest.raises(
        ValueError, match="keeps fp32 weights on the host, got offload 'layers' with precision pure_bf16"
    ):
        Plan(precision="pure_bf16", offload="layers")


def compiled(rank: int, world: int, plan: Plan) -> list[float]:
    from longspan.train.config import TrainConfig
    from longspan.train.loop import Trainer

    found = []
    for compile_blocks in (False, True):
        plan = replace(plan, compile=compile_blocks).fit(world)
        trainer = Trainer(TrainConfig(out=Path("unused"), seed=3), CONFIG, plan, torch.device("cpu"))
        found += [trainer.step(step, 2, micros(plan, rank, 1, False))["loss"] for step in range(2)]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own, of torch.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_blocks_are_the_same_blocks(world: int) -> None:
    plan = Plan() if world == 1 else Plan(context=2, shard="zero3")
    for losses in run_ranks(compiled, world, plan, timeout_s=300):
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
