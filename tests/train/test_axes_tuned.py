"""Adapters and frozen parameters on every axis: the loss, the norm and every gradient of one process, the same adapters
to begin with, what is frozen stays, and three optimiser steps go as on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from longspan.layout.weights import whole
from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, MoeConfig, NormConfig
from longspan.model.decoder import build
from longspan.model.freeze import matches
from longspan.model.huggingface import save_pretrained
from longspan.model.lora import LoraConfig, adapted_layers, apply_lora, init_lora
from longspan.model.shards import fill, local_part
from longspan.plan.plan import Plan
from tests.ranks import run_ranks
from tests.train.test_axes import AXES, DEEP, joined, named
from tests.train.test_parity import compare, micros, rows

STEPS = 3
LORA = LoraConfig(rank=3, alpha=5)
HALF = LoraConfig(rank=5, rslora=True, targets=("k", "out", "down"))
EARLY = ("embed", "blocks.0-2")  # on two stages the whole of the first
LATE = ("norm", "head", "blocks.3-4")  # the whole of the second, through which the first is trained
SOME = ("head", "blocks.3-4.mlp", "blocks.*.mixer.q", "blocks.*.norm_mlp")
Tuning = LoraConfig | tuple[str, ...]
UNTIED = replace(DEEP, tie_embeddings=False)
GPT2 = replace(
    DEEP,
    attention=AttentionConfig(num_heads=4, head_dim=6, qkv_bias=True, out_bias=True),
    mlp=MlpConfig(kind="gelu_tanh", inner_size=41, bias=True),
    norm=NormConfig(kind="layer"),
    positions=LearnedPositionsConfig(max_positions=64),
)
ALONE = Plan(context=1)


def given_b(shape: tuple[int, ...], name: str) -> Tensor:
    """The whole B of an adapter: at its beginning, which is 0, A would have no gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name)))) * 0.1


def options(tuning: Tuning) -> dict[str, Any]:
    return {"lora": tuning} if isinstance(tuning, LoraConfig) else {"freeze": tuning}


def tuned_rank(
    rank: int, world: int, plan: Plan, config: DecoderConfig, tuning: Tuning, folder: str, num_micro: int, steps: int
) -> Any:
    """The initial adapters, a first gradient, and the losses of some steps."""
    from longspan.train.config import OptimConfig, TrainConfig
    from longspan.train.loop import Trainer

    optim = OptimConfig(warmup=0, clip=0.1, lr=1e-2)
    asked = TrainConfig(out=Path("unused"), seed=3, init=Path(folder), optim=optim, **options(tuning))
    trainer = Trainer(asked, config, plan, torch.device("cpu"))
    model, boxes = trainer.model, trainer.model.boxes()
    parameters, first = dict(model.named_parameters()), {}
    for name, parameter in parameters.items():
        local, region = local_part(parameter.detach(), boxes.get(name))
        first[name] = region, local.clone()
        if name.endswith(".lora_b"):
            shape = boxes[name].shape if name in boxes else tuple(parameter.shape)
            fill(parameter, given_b(shape, name).__getitem__, boxes.get(name))
    batches = micros(plan, rank, num_micro, False)
    loss = trainer.gradients(batches)
    norm, grads = float(trainer.gradient_norm()), {}
    for name, parameter in parameters.items():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if (grad := parameter.grad) is not None:
            part = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
            grads[name] = (boxes.get(name, whole(tuple(part.shape))), part)
    losses = [trainer.step(step, STEPS, batches)["loss"] for step in range(steps)]
    for name, parameter in parameters.items():
        if steps and not parameter.requires_grad:
            assert torch.equal(local_part(parameter.detach())[0], first[name][1]), name
    return (loss, norm, grads), first, losses


def tuned_ranks(rank: int, world: int, plan: Plan, config: DecoderConfig, tunings: list[Tuning], *others: Any) -> Any:
    return [tuned_rank(rank, world, plan, config, tuning, *others) for tuning in tunings]


def expected(config: DecoderConfig, tuning: Tuning) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients of one process and the plain model, adapters merged into its weights by the formula; and the
    values before B was given."""
    model = build(config, device="cpu", seed=3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights: dict[str, Tensor] = dict(start)
    leaves: dict[str, Tensor] = {}
    if isinstance(tuning, LoraConfig):
        adapted = build(config, device="cpu", seed=3)
        apply_lora(adapted, tuning)
        init_lora(adapted, 3)
        scaling = tuning.alpha / (tuning.rank**0.5 if tuning.rslora else tuning.rank)
        for name, layer in adapted_layers(adapted).items():
            start |= {
                f"{name}.lora_{kind}": p.detach().clone() for kind, p in (("a", layer.lora_a), ("b", layer.lora_b))
            }
            a = start[f"{name}.lora_a"].clone().requires_grad_()
            b = given_b(tuple(layer.lora_b.shape), f"{name}.lora_b").requires_grad_()
            leaves |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scaling * b @ a
    else:
        for name in weights:
            if not any(matches(pattern, name) for pattern in tuning):
                leaves[name] = weights[name] = weights[name].clone().requires_grad_()
    tokens, labels = rows(False)
    logits = functional_call(model, weights, (tokens,))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, grads, strict=True)), start


def assert_tuned(
    folder: Path, plan: Plan, *tunings: Tuning, config: DecoderConfig = DEEP, num_micro: int = 3, steps: int = STEPS
) -> None:
    world = plan.data * plan.expert * plan.context * plan.tensor * plan.pipeline
    save_pretrained(build(config, device="cpu", seed=3), folder / "model")
    others = (config, list(tunings), str(folder / "model"))
    of_ranks = run_ranks(tuned_ranks, world, plan, *others, num_micro, steps)
    alone = run_ranks(tuned_ranks, 1, ALONE, *others, 1, steps)[0] if steps else []
    for index, tuning in enumerate(tunings):
        results = [found[index] for found in of_ranks]
        loss, grads, start = expected(config, tuning)
        compare([each[0] for each in results], loss, grads)
        for _, first, losses in results:
            for name, (region, local) in first.items():
                assert torch.equal(local, start[name][region]), name
            if steps:
                assert losses == pytest.approx(alone[index][2], rel=1e-5) and losses[-1] < losses[0]


@pytest.mark.parametrize("tuning", [LORA, EARLY], ids=["lora", "freeze"])
@pytest.mark.parametrize("plan", [AXES["tensor"], AXES["pipeline"]], ids=named)
def test_one_axis(tmp_path: Path, plan: Plan, tuning: Tuning) -> None:
    assert_tuned(tmp_path, joined(plan), tuning)


@pytest.mark.parametrize("plan", [AXES["tensor"], AXES["pipeline"]], ids=named)
def test_other_parts(tmp_path: Path, plan: Plan) -> None:
    """Biases, learned positions, adapters on some matrices. Without a rotation a bias of k has no gradient."""
    assert_tuned(tmp_path, joined(plan), HALF, ("embed_positions", "blocks.*.mixer.k", "blocks.3-4.mlp"), config=GPT2)


def test_kv_heads_held_by_all(tmp_path: Path) -> None:
    """Two KV heads on three ranks, each of which uses some rows of B."""
    assert_tuned(tmp_path, Plan(context=1, tensor=3), LORA, steps=0)


def test_adapters_split_and_staged(tmp_path: Path) -> None:
    assert_tuned(tmp_path, joined(AXES["tensor"], AXES["pipeline"]), LORA)


PRODUCTS = [
    *(joined(AXES[a], AXES[b]) for a in ("tensor", "pipeline") for b in ("data", "context")),
    Plan(data=2, context=1, tensor=2, shard="zero3", recompute="full"),
    Plan(data=2, context=1, pipeline=2, shard="zero3"),
    Plan(context=2, tensor=2, recompute="attention", mlp_tile=8),
    Plan(context=2, pipeline=2, recompute="attention"),
    Plan(context=1, tensor=4),
    Plan(context=1, pipeline=4),
    Plan(context=1, pipeline=2, pipeline_schedule="zero_bubble", recompute="full"),
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PRODUCTS, ids=named)
def test_products(tmp_path: Path, plan: Plan) -> None:
    assert_tuned(tmp_path, plan, LORA, EARLY, num_micro=6 // plan.data if plan.pipeline > 1 else 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        Plan(data=2, context=1, tensor=2, pipeline=2, shard="zero2"),
        Plan(data=2, context=2, tensor=2, shard="zero3", replicas=2),
        Plan(data=2, context=2, pipeline=2, shard="zero3", replicas=2),
    ],
    ids=named,
)
def test_triples(tmp_path: Path, plan: Plan) -> None:
    assert_tuned(tmp_path, plan, LORA, EARLY)


SCHEDULES = ["zero_bubble", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gpipe", "interleaved", "looped_bfs"))]
SCHEDULES += [pytest.param(x, marks=pytest.mark.slow) for x in ("zbv", "dualpipev")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(tmp_path: Path, schedule: Any) -> None:
    plan = Plan(context=1, pipeline=2, pipeline_schedule=schedule)
    assert_tuned(tmp_path, plan, LORA, EARLY, LATE, SOME, config=UNTIED, num_micro=6, steps=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [Plan(context=1, expert=2, tensor=2), Plan(context=1, expert=2, pipeline=2)], ids=named
)
def test_mixtures(tmp_path: Path, plan: Plan) -> None:
    moe = MoeConfig(num_experts=5, experts_per_token=2, inner_size=12)
    adapters = replace(LORA, targets=("q", "k", "v", "out"))
    config = replace(UNTIED, moe=moe)
    assert_tuned(tmp_path, plan, adapters, EARLY, ("blocks.*.mlp",), config=config)


def hooked_rank(rank: int, world: int, schedule: Any) -> dict[int, tuple[bool, bool]]:
    """Whether a gradient of each layer's input was wanted, and whether the layer was run with gradient."""
    from longspan.train.config import TrainConfig
    from longspan.train.loop import Trainer

    plan = Plan(context=1, pipeline=2, pipeline_schedule=schedule)
    asked = TrainConfig(out=Path("unused"), seed=3, freeze=EARLY)
    trainer = Trainer(asked, UNTIED, plan, torch.device("cpu"))
    seen: dict[int, tuple[bool, bool]] = {}

    def note(layer: int, args: Any, out: Any) -> None:
        seen[layer] = args[0].requires_grad, out[0].requires_grad

    for name, block in trainer.model.blocks.named_children():
        block.register_forward_hook(lambda _, args, out, layer=int(name): note(layer, args, out))
    trainer.gradients(micros(plan, rank, 6, False))
    return seen


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_frozen_beginning_needs_no_backward(schedule: Any) -> None:
    first, second = run_ranks(hooked_rank, 2, schedule)
    assert first | second == {layer: (layer > 3, layer > 2) for layer in range(5)}


def deaf_rank(rank: int, world: int, *others: Any) -> Any:
    from longspan.train import loop

    loop.sum_over = lambda group, parameters: None
    return tuned_rank(rank, world, *others)


def test_the_comparison_bites(tmp_path: Path) -> None:
    """Tensor ranks that do not add up the halves of adapters that all of them hold do not pass."""
    save_pretrained(build(DEEP, device="cpu", seed=3), tmp_path / "model")
    results = run_ranks(deaf_rank, 2, joined(AXES["tensor"]), DEEP, LORA, str(tmp_path / "model"), 1, 0)
    with pytest.raises(AssertionError):
        compare([each[0] for each in results], *expected(DEEP, LORA)[:2])
