"""Patterns over the names of parameters, and what they freeze."""

from __future__ import annotations

import pytest
import torch

from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.freeze import freeze, matches
from longspan.model.part import ModelPart

DECODER = DecoderConfig(
    num_layers=12,
    hidden_size=8,
    vocab_size=31,
    attention=AttentionConfig(num_heads=1, head_dim=8),
    mlp=MlpConfig(inner_size=16),
)


def frozen(model: DecoderLM) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("embed", "embed.weight", True),
        ("embed", "embed_positions.weight", False),
        ("embed*", "embed_positions.weight", True),
        ("blocks.0-3", "blocks.3.mlp.up.weight", True),
        ("blocks.0-3", "blocks.4.mlp.up.weight", False),
        ("blocks.1", "blocks.11.mlp.up.weight", False),
        ("blocks.1-1", "blocks.1.mlp.up.weight", True),
        ("blocks.*.mlp", "blocks.7.mlp.up.weight", True),
        ("blocks.*.mlp", "blocks.7.mixer.q.weight", False),
        ("mlp", "blocks.7.mlp.up.weight", False),
        ("*.bias", "norm.bias", True),
        ("norm.weight.more", "norm.weight", False),
        ("blocks.0-", "blocks.0.mlp.up.weight", False),
    ],
)
def test_a_pattern_is_the_beginning_of_a_name(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) == expected


def test_what_is_frozen_gets_no_gradient() -> None:
    model = build(DECODER, device="cpu")
    names = freeze(model, ["embed, blocks.0-9", "blocks.10.mixer"])
    assert set(names) == frozen(model) and len(names) == len(set(names))
    assert frozen(model) == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("embed.", *(f"blocks.{layer}." for layer in range(10)), "blocks.10.mixer."))
    }
    tokens = torch.arange(7)[None]
    model.loss(tokens, tokens)[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen(model)


def test_patterns_are_of_the_whole_of_which_a_model_is_a_part() -> None:
    names = [name for name, _ in build(DECODER).named_parameters()]
    first = build(DECODER, part=ModelPart(layers=(0, 1), last=False))
    last = build(DECODER, part=ModelPart(layers=(2, 3), first=False))
    patterns = ["embed", "blocks.0-1", "blocks.3"]
    assert set(freeze(first, patterns, names)) == frozen(first) == {name for name, _ in first.named_parameters()}
    assert set(freeze(last, patterns, names)) == frozen(last)
    assert frozen(last) == {name for name, _ in last.named_parameters() if name.startswith("blocks.3.")}
    with pytest.raises(ValueError, match="got 'embed'"):
        freeze(last, patterns)
    with pytest.raises(ValueError, match="got 'blcoks'"):
        freeze(last, ["blcoks"], names)


def test_nothing_asked_for_freezes_nothing() -> None:
    model = build(DECODER)
    assert freeze(model, ()) == () and not frozen(model)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["embed", "blcoks.0"], "got 'blcoks.0'; names begin with embed, blocks, norm, head"),
        (["blocks.12-20"], "must match a parameter, got 'blocks.12-20'"),
        (["embed,"], "got ''"),
        (["*"], "got all 111 frozen"),
    ],
)
def test_what_is_refused(patterns: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("*", r"\*")):
        freeze(build(DECODER), patterns)
