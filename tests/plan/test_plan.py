"""The plan: JSON round trip, fitting a world, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.plan.plan import Plan


def test_round_trip() -> None:
    plan = Plan(data=2, context=3, shard="zero3", recompute="attention", method="zigzag", precision="bf16")
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json('{"activation_budget": 1}') == Plan()


def test_context_takes_the_ranks_that_are_left() -> None:
    assert Plan().fit(4).context == 4
    assert Plan(data=2).fit(6).context == 3
    assert Plan(data=2, context=2).fit(4) == Plan(data=2, context=2)


@pytest.mark.parametrize(
    ("values", "world", "words"),
    [
        ({"data": 3}, 4, "got data 3 x context 1 for 4 ranks"),
        ({"data": 2, "context": 4}, 4, "start 8 ranks"),
        ({"tensor": 2, "context": 1}, 3, "tensor 2"),
        ({"offload": "layers"}, 2, "offload 'layers' with shard 'none' for 2 ranks; .* start 1 rank"),
        ({"method": "usp:3"}, 4, "must divide the 4 ranks, got '3'"),
    ],
)
def test_a_plan_that_does_not_fit_the_world(values: dict, world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**values).fit(world)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "JSON object"),
        (json.dumps({"contxt": 2}), "did you mean 'context'"),
        (json.dumps({"context": "2"}), "context must be int"),
        (json.dumps({"context": True}), "context must be int"),
        (json.dumps({"activation_budget": True}), "activation_budget must be float"),
        (json.dumps({"shard": "zero1"}), "one of none, zero2, zero3"),
        (json.dumps({"data": 0}), "at least 1"),
        (json.dumps({"offload": "all"}), "offload must be one of none, activations, layers, both, got 'all'"),
        (json.dumps({"offload": "both"}), "got offload 'both' with recompute 'none'; set recompute to full"),
        (
            json.dumps({"offload": "layers", "shard": "zero3"}),
            "got offload 'layers' with shard 'zero3' for 1 ranks; set shard to none",
        ),
        (json.dumps({"offload": "layers", "offload_gib": 3}), "offload_gib is for activations, got 3"),
        (json.dumps({"compile": True, "tensor": 2}), "compiled whole and where they lie, got compile with tensor 2"),
        (
            json.dumps({"compile": True, "pipeline": 2, "pipeline_schedule": "zero_bubble"}),
            "by zero_bubble takes in two parts, got compile with pipeline 2; use 1f1b",
        ),
        (json.dumps({"compile": True, "recompute": "full"}), "got compile with recompute full"),
        (json.dumps({"replicas": 2}), "copies of sharded weights, got 2 with shard none"),
        (json.dumps({"data": 3, "replicas": 2, "shard": "zero2"}), "replicas must divide data, got 2 for data 3"),
        (json.dumps({"stages": 2}), "stages are of a pipeline, got 2 with pipeline 1"),
        (json.dumps({"pipeline": 2, "stages": 2}), "by 1f1b has one stage on a rank, got 2"),
        (json.dumps({"pipeline": 2, "pipeline_schedule": "zbv", "stages": 3}), "by zbv has 2 stages on a rank, got 3"),
        (json.dumps({"offload_gib": -3}), "offload_gib must be 0 or more, got -3"),
        (json.dumps({"method": "rign"}), "unknown context-parallel method 'rign'; known: auto, ring"),
        (json.dumps({"method": "ulysses+brust"}), "unknown context-parallel method 'brust'"),
        (json.dumps({"method": "ring:2"}), "takes no degree"),
        (json.dumps({"method": "usp:two"}), "got 'two'; name a divisor"),
        (json.dumps({"layout": "zigzga"}), "unknown layout 'zigzga'; known: contiguous, zigzag"),
    ],
)
def test_bad_plans_are_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Plan.from_json(text)
    assert "\n" not in str(error.value)
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="plan file"):
        Plan.read(file)


def test_precision_follows_the_device_unless_it_is_said() -> None:
    assert Plan().on("cuda").precision == "bf16"
    assert Plan().on("cpu").precision == "fp32"
    assert Plan(precision="fp32").on("cuda").precision == "fp32"
