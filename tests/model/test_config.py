"""The decoder's config: JSON and back, and one clear line for what has no meaning."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from longspan.mixers.config import AttentionConfig, LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, MoeConfig, NormConfig

BASE = DecoderConfig(
    num_layers=3,
    hidden_size=20,
    vocab_size=31,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm_eps=1e-5),
    mlp=MlpConfig(inner_size=13),
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": LearnedPositionsConfig(max_positions=7), "norm": NormConfig(kind="layer"), "wiring": "parallel"},
        {
            "windows": (None, 5, None),
            "tie_embeddings": True,
            "mlp": MlpConfig(kind="gelu_tanh", inner_size=3, bias=True),
        },
        {
            "moe": MoeConfig(num_experts=4, experts_per_token=2, inner_size=5, balance="bias", capacity_factor=1.5),
            "dense_layers": (0, 2),
        },
        {"positions": RotaryConfig(theta=5e5, scaling=Llama3Scaling(factor=8.0))},
        {"positions": RotaryConfig(scaling=LinearScaling(factor=2.0))},
        {
            "windows": (3, None, 3),
            "windowed_positions": RotaryConfig(theta=50.0, scaling=LinearScaling(factor=2.0)),
            "embed_scale": 4.5,
            "final_softcap": 30.0,
            "norm": NormConfig(kind="rms_plus_one"),
            "wiring": "sandwich",
        },
        {"positions": RotaryConfig(scaling=YarnScaling(factor=2.0, original_max_positions=64, truncate=False))},
    ],
)
def test_json_round_trip(changes: dict[str, object]) -> None:
    config = dataclasses.replace(BASE, **changes)  # pyright: ignore[reportArgumentType]
    assert DecoderConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(DecoderConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("vocab_sise",), 3, "no key 'vocab_sise': did you mean 'vocab_size'"),
        (("attention", "heads"), 3, "attention has no key 'heads'"),
        (("positions", "kind"), "alibi", "kind of positions must be one of .*got 'alibi'"),
        (("positions", "scaling"), {"kind": "ntk"}, "kind of scaling must be one of .*got 'ntk'"),
        (("positions", "scaling"), {"kind": "linear"}, "scaling lacks the key 'factor'"),
        (("mlp",), 3, "mlp must be a JSON object, got 3"),
        (("mlp",), None, "mlp must be a JSON object, got None"),
        (("mlp", "kind"), "relu", "mlp kind must be swiglu"),
        (("num_layers",), "3", "num_layers of decoder config must be int, got '3'"),
        (("num_layers",), 2.5, "num_layers of decoder config must be int, got 2.5"),
        (("num_layers",), True, "num_layers of decoder config must be int, got True"),
        (("tie_embeddings",), "no", "tie_embeddings of decoder config must be bool, got 'no'"),
        (("windows",), [2.5, 1], "windows must be a list of whole numbers or null"),
        (("dense_layers",), [1.5], "dense_layers must be a list of whole numbers"),
        (("moe",), 3, "moe must be a JSON object, got 3"),
        (("moe",), {"num_experts": 4}, "moe lacks the key 'experts_per_token'"),
        (("windows",), 5, "windows must be a list of whole numbers or null"),
        (("num_layers",), 0, "num_layers must be positive, got 0"),
        (("windows",), [3], "windows must be empty or have one entry for each of the 3 layers"),
        (("windows",), [3, 0, None], "a window must be positive or None"),
        (("wiring",), "serial", "wiring must be sequential, parallel, sandwich or post, got 'serial'"),
        (("attention", "head_dim"), 5, "rotary positions need an even head_dim, got 5"),
        (("norm", "eps"), 0.0, "norm eps must be positive"),
        (("norm", "kind"), "batch", "norm kind must be rms, rms_plus_one or layer, got 'batch'"),
        (("attention", "qk_norm_kind"), "layer", "qk_norm_kind must be rms or rms_plus_one, got 'layer'"),
        (("final_softcap",), 0.0, "final_softcap must be positive, got 0"),
        (("embed_scale",), -1.0, "embed_scale must be positive, got -1"),
        (("windowed_positions",), {"kind": "rotary"}, "windowed_positions need layers with a window"),
        (("windowed_positions",), {"kind": "learned"}, "kind of windowed_positions must be one of"),
    ],
)
def test_refused_with_one_line(path: tuple[str, ...], value: object, words: str) -> None:
    values = json.loads(BASE.to_json())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=words) as caught:
        DecoderConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_config() -> None:
    with pytest.raises(ValueError, match="must be JSON, got an error at 1"):
        DecoderConfig.from_json("{")
    with pytest.raises(ValueError, match="lacks the key 'num_layers'"):
        DecoderConfig.from_json("{}")


def test_configs_and_the_package_load_without_torch() -> None:
    code = "import longspan.model, longspan.model.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
