"""Gemma 2 and 3 against transformers: small random models of odd sizes, logits, loss and every gradient in fp32."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from longspan.mixers.config import LinearScaling, RotaryConfig
from longspan.model import DecoderConfig, DecoderLM, load_pretrained, save_pretrained
from longspan.model.decoder import build
from longspan.model.hf_table import ARCHITECTURES
from longspan.model.huggingface import read_config
from tests.model.hf_oracle import VOCAB, assert_same_training, edit, logits, randomise, tokens, worst

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 30,
    "num_hidden_layers": 4,
    "intermediate_size": 37,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 5,
    "bos_token_id": None,
    "eos_token_id": None,
    # Its row would have no gradient in transformers.
    "pad_token_id": None,
    # Large enough that every part moves the logits by more than the tolerance.
    "initializer_range": 0.3,
}
# Caps so low that they bite.
GEMMA2 = SMALL | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 untied biases no caps": (
        "Gemma2",
        SMALL
        | {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": ("Gemma3Text", SMALL | {"rope_parameters": GEMMA3_ROPE, "layer_types": PATTERN}),
    "gemma3 all windows capped": ("Gemma3Text", SMALL | {"final_logit_softcapping": 4.0}),
}
NAMES = {"Gemma2": "Gemma2ForCausalLM", "Gemma3Text": "Gemma3ForCausalLM"}


def theirs(case: str, **changes: Any) -> Any:
    kind, values = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    return randomise(getattr(transformers, NAMES[kind]), config)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers_both_ways(case: str, tmp_path: Path) -> None:
    reference, name = theirs(case), NAMES[CASES[case][0]]
    reference.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert worst(ours(tokens()), logits(reference)) < 1e-5
    stored = ARCHITECTURES[name].names(ours.config)
    labels = tokens(seed=4)
    labels[0, 3:9] = -100
    expected = torch.nn.functional.cross_entropy(
        reference(tokens()).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert_same_training(ours, ours.loss(tokens(), labels)[0], reference, expected, stored)

    save_pretrained(ours, tmp_path / "ours")
    back, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert worst(logits(back.eval()), logits(reference)) < 1e-5
    again = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(again(tokens()), ours(tokens()))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 10}),
        ("gemma2", {"sliding_window": 99}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gemma3", {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": {"rope_theta": 21.0}}}),
        ("gemma3", {"rope_parameters": GEMMA3_ROPE | {"full_attention": {"rope_theta": 500.0}}}),
        ("gemma3", {"layer_types": [PATTERN[1], PATTERN[2], PATTERN[0], PATTERN[3]]}),
    ],
)
def test_what_the_config_says_moves_the_logits(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    assert worst(load_pretrained(tmp_path)(tokens()), logits(reference)) > 1e-3


def test_the_embeddings_factor_is_rounded_as_transformers_does(tmp_path: Path) -> None:
    theirs("gemma2").save_pretrained(tmp_path)
    low = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_pretrained(tmp_path, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    ours.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
    ours(tokens())
    assert torch.equal(seen[0], low.model.embed_tokens(tokens()))


def test_defaults_of_keys_that_configs_of_gemma_2_lack(tmp_path: Path) -> None:
    kept = ("vocab_size", "num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads")
    values: dict[str, Any] = {key: SMALL[key] for key in kept} | {"num_attention_heads": 8, "hidden_size": 32}
    expected = transformers.Gemma2Config(**values)
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"})
    )
    config = read_config(tmp_path)
    assert config.attention.head_dim == expected.head_dim and config.attention.kv_heads == expected.num_key_value_heads
    assert config.attention.softcap == expected.attn_logit_softcapping
    assert config.final_softcap == expected.final_logit_softcapping
    assert config.attention.scale == expected.query_pre_attn_scalar**-0.5
    assert config.windows == (expected.sliding_window, None) * 2
    assert config.tie_embeddings is expected.tie_word_embeddings


def test_keys_of_transformers_4_for_gemma_3(tmp_path: Path) -> None:
    reference = theirs("gemma3", layer_types=None, num_hidden_layers=7)
    reference.save_pretrained(tmp_path)
    edit(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=500.0,
        rope_local_base_freq=20.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
        cache_implementation="hybrid",
    )
    ours = load_pretrained(tmp_path)
    assert worst(ours(tokens()), logits(reference)) < 1e-5
    assert ours.config.windows == (5,) * 5 + (None, 5)
    assert ours.config.windowed_positions == RotaryConfig(theta=20.0, max_positions=131072)
    edit(tmp_path, rope_scaling=None, rope_theta=None, rope_local_base_freq=None)
    found = read_config(tmp_path)
    assert (found.positions.theta, found.windowed_positions.theta) == (1e6, 1e4)  # pyright: ignore


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "'hidden_activation' must be 'gelu_pytorch_tanh'"),
        ("gemma2", {"rope_local_base_freq": 3.0}, "rope_local_base_freq"),
        ("gemma2", {"something_new": 1}, "something_new"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"sliding_window": None}, "needs a 'sliding_window'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "got 'chunked_attention'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "each of 4 layers, got 1"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "both 'rope_scaling' and 'rope_para"),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "'rope_theta' = 10000.0"),
        ("gemma3", {"rope_theta": 77.0}, "two values for 'rope_theta'"),
        ("gemma3", {"layer_types": None, "_sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"num_hidden_layers": 3, "layer_types": PATTERN[:3]}, r"model\.layers\.3\.input_layernorm"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gemma2", {"embed_scale": None}, "an embedding scaled by the root of hidden size"),
        ("gemma2", {"wiring": "sequential"}, "sandwich wiring"),
        ("gemma2", {"windows": (3, None, 4, None)}, "one size of window"),
        ("gemma2", {"windowed_positions": RotaryConfig(theta=5.0)}, "one rotation for all layers"),
        (
            "gemma3",
            {"windowed_positions": RotaryConfig(scaling=LinearScaling(factor=2.0))},
            "no rope scaling in layers with a window",
        ),
    ],
)
def test_what_gemma_has_no_words_for_is_not_exported(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    theirs(case).save_pretrained(tmp_path / "theirs")
    values = read_config(tmp_path / "theirs").to_dict()
    changes = {key: list(v) if isinstance(v, tuple) else v for key, v in changes.items()}
    changed = {key: v if not isinstance(v, RotaryConfig) else asdict(v) for key, v in changes.items()}
    model = DecoderLM(DecoderConfig.from_dict(values | changed))
    with pytest.raises(ValueError, match=words):
        save_pretrained(model, tmp_path / "none", architecture=NAMES[CASES[case][0]])
    # Other architectures do not take it for one of theirs either.
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        save_pretrained(build(model.config, device="cpu"), tmp_path / "none")
