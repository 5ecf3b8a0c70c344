"""Every axis, pairs and triples of axes have the loss, the norm and every gradient of one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from longspan.mixers.config import AttentionConfig, LinearScaling, RotaryConfig
from longspan.model.config import LearnedPositionsConfig, MlpConfig, NormConfig
from longspan.model.encoder_config import EncoderConfig, TokensConfig
from longspan.plan.plan import Plan
from longspan.train.parallel import check_plan
from tests.ranks import RankError, run_ranks
from tests.train.test_parity import CONFIG, assert_parity, compare, one_rank, reference

# Five layers, 61 words, 40 inner channels: nothing divides by 3, little by 2.
DEEP = replace(CONFIG, num_layers=5)
AXES = {
    "data": Plan(data=2, shard="zero2"),
    "context": Plan(context=2),
    "tensor": Plan(tensor=2),
    "pipeline": Plan(pipeline=2),
}


def joined(*plans: Plan) -> Plan:
    """One plan with what the plans say differently from the default."""
    changes = {k: v for plan in plans for k, v in plan.to_dict().items() if v != getattr(Plan(), k)}
    return replace(Plan(), **({"context": 1} | changes))


def named(plan: Plan) -> str:
    return "-".join(f"{k}={v}" for k, v in plan.to_dict().items() if v != getattr(Plan(), k))


PAIRS = [joined(AXES[a], AXES[b]) for a, b in combinations(AXES, 2)]
WIDE = [Plan(context=1, tensor=3), Plan(context=1, tensor=4), Plan(context=1, pipeline=3), Plan(context=1, pipeline=4)]
VARIANTS = [
    Plan(data=2, context=2, shard="zero2", replicas=2, recompute="attention"),
    Plan(data=2, context=1, tensor=2, shard="zero3", recompute="full"),
    Plan(data=2, context=1, pipeline=2, shard="zero3"),
    Plan(context=2, tensor=2, recompute="attention", mlp_tile=8),
    Plan(context=2, pipeline=2, recompute="attention"),
]


@pytest.mark.parametrize("plan", [*PAIRS, *WIDE, VARIANTS[0]], ids=named)
def test_axes_at_world_4(plan: Plan) -> None:
    world = plan.data * plan.context * plan.tensor * plan.pipeline
    assert_parity(plan, world, DEEP, num_micro={1: 1, 4: 6}.get(plan.pipeline, 3))


@pytest.mark.slow
@pytest.mark.parametrize("plan", VARIANTS[1:], ids=named)
def test_variants_at_world_4(plan: Plan) -> None:
    test_axes_at_world_4(plan)


TRIPLES = [joined(*(AXES[a] for a in axes)) for axes in combinations(AXES, 3)]


@pytest.mark.parametrize("plan", TRIPLES[:3], ids=named)
def test_triples_at_world_8(plan: Plan) -> None:
    assert_parity(plan, 8, DEEP, num_micro=3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", TRIPLES[3:], ids=named)
def test_other_triples_at_world_8(plan: Plan) -> None:
    assert_parity(plan, 8, DEEP, num_micro=3)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "looped_bfs", "zero_bubble", "zbv", "dualpipev"])
def test_pipeline_schedules(schedule: Any) -> None:
    untied = replace(DEEP, tie_embeddings=schedule not in ("zbv", "dualpipev"))
    assert_parity(Plan(context=1, pipeline=2, pipeline_schedule=schedule), 2, untied, num_micro=6)


@pytest.mark.parametrize("plan", [joined(AXES["tensor"], AXES["context"]), joined(AXES["pipeline"], AXES["context"])])
def test_packed_documents(plan: Plan) -> None:
    """Every micro-batch in a pipeline has its own mask."""
    assert_parity(plan, 4, DEEP, num_micro=3, documents=True)


BIASED = replace(
    DEEP,
    attention=AttentionConfig(num_heads=5, head_dim=6, num_kv_heads=5, qkv_bias=True, out_bias=True),
    mlp=MlpConfig(kind="gelu", inner_size=41, bias=True),
    norm=NormConfig(kind="layer"),
    tie_embeddings=False,
    windows=(None, 9, None, 9, 9),
)
LEARNED = replace(
    DEEP, positions=LearnedPositionsConfig(max_positions=64), tie_embeddings=False, wiring="parallel"
)  # no bias of k: without a rotation its gradient is zero


POST = replace(BIASED, wiring="post")


@pytest.mark.parametrize(
    "config", [BIASED, LEARNED, POST], ids=["biases, layer norms, windows", "learned, parallel", "post"]
)
@pytest.mark.parametrize("plan", [Plan(context=1, tensor=2), Plan(context=1, tensor=2, pipeline=2)], ids=named)
def test_other_parts(plan: Plan, config: Any) -> None:
    assert_parity(plan, plan.tensor * plan.pipeline, config, num_micro=3)


# All that Gemma 2 and 3 have, at once; caps so low that they bite.
GEMMA = replace(
    DEEP,
    attention=AttentionConfig(
        num_heads=4, head_dim=6, num_kv_heads=2, qk_norm_eps=1e-6, qk_norm_kind="rms_plus_one", scale=0.5, softcap=1.5
    ),
    mlp=MlpConfig(kind="geglu_tanh", inner_size=41),
    norm=NormConfig(kind="rms_plus_one"),
    positions=RotaryConfig(theta=500.0, scaling=LinearScaling(factor=8.0)),
    wiring="sandwich",
    windows=(9, 9, None, 9, None),
    init_std=0.1,
    windowed_positions=RotaryConfig(theta=20.0),
    embed_scale=24**0.5,
    final_softcap=1.0,
)


@pytest.mark.parametrize("plan", [*AXES.values(), joined(AXES["tensor"], AXES["pipeline"])], ids=named)
def test_gemma(plan: Plan) -> None:
    assert_parity(plan, 4 if plan.pipeline * plan.tensor == 4 else 2, GEMMA, num_micro=3)


def test_gemma_streamed() -> None:
    assert_parity(Plan(context=1, offload="both", recompute="attention"), 1, GEMMA)


@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_gemma_recomputed_in_packed_documents(recompute: Any) -> None:
    plan = replace(AXES["context"], shard="zero3", recompute=recompute)
    assert_parity(plan, 2, GEMMA, num_micro=3, documents=True)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(7, 1), (6, 3), (10, 5), (9, 3)])
def test_heads_that_do_not_divide(num_heads: int, num_kv_heads: int) -> None:
    attention = AttentionConfig(num_heads=num_heads, head_dim=6, num_kv_heads=num_kv_heads, qk_norm_eps=1e-6)
    assert_parity(Plan(context=1, tensor=4), 4, replace(CONFIG, attention=attention))


def deaf_rank(rank: int, world: int) -> Any:
    from longspan.train import loop

    loop.sum_over = lambda group, parameters: None
    return one_rank(rank, world, Plan(context=1, tensor=2), CONFIG, 1, False, False)


def uncapped_rank(rank: int, world: int) -> Any:
    from longspan.model import loss

    chunk = loss._chunk
    loss._chunk = lambda logits, target, softcap, *others: chunk(logits, target, None, *others)
    return one_rank(rank, world, Plan(context=1, tensor=2), GEMMA, 1, False, False)


@pytest.mark.parametrize(("one", "config"), [(deaf_rank, CONFIG), (uncapped_rank, GEMMA)], ids=["deaf", "uncapped"])
def test_the_comparison_bites(one: Any, config: Any) -> None:
    """Tensor ranks that do not add up what they hold together do not pass, nor do those that forget a softcap."""
    with pytest.raises(AssertionError):
        compare(run_ranks(one, 2), *reference(config, False))


@pytest.mark.parametrize(
    ("plan", "config", "message"),
    [
        (Plan(tensor=5), CONFIG, "a query head for every rank, got 4 heads"),
        (Plan(pipeline=4), CONFIG, "a layer for every stage, got 3 layers for 4 stages"),
        (Plan(pipeline=2, pipeline_schedule="zbv"), DEEP, "untie"),
        (Plan(tensor=5), GEMMA, "a query head for every rank, got 4 heads"),
        (Plan(pipeline=2, pipeline_schedule="dualpipev"), GEMMA, "untie"),
        (Plan(expert=2), GEMMA, "an expert for every rank, got 0 experts"),
    ],
)
def test_a_model_that_does_not_fit_a_plan_is_refused(plan: Plan, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(plan, config)


@pytest.mark.parametrize("plan", [Plan(context=1), *AXES.values()], ids=named)
def test_encoders_are_refused(plan: Plan) -> None:
    config = EncoderConfig(
        num_layers=2,
        hidden_size=8,
        inputs=TokensConfig(vocab_size=7),
        attention=CONFIG.attention,
        mlp=CONFIG.mlp,
        head="masked_lm",
    )
    with pytest.raises(ValueError, match=r"plans are for decoders, .* got EncoderConfig; train an encoder by its own"):
        check_plan(plan, config)


def logits_rank(rank: int, world: int) -> None:
    from longspan.layout.tensor_parallel import TensorSplit
    from longspan.model.decoder import build
    from longspan.model.part import ModelPart

    model = build(CONFIG, device="cpu", part=ModelPart(split=TensorSplit(rank, world, torch.distributed.group.WORLD)))
    model(torch.zeros(1, 3, dtype=torch.int64))


def test_logits_of_a_split_vocabulary_are_refused() -> None:
    with pytest.raises(RankError, match="logits need the whole vocabulary"):
        run_ranks(logits_rank, 2)
