"""Adapters: the paper's formula in float64, PEFT's own module in both directions, and a merge that changes nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longspan.mixers.config import AttentionConfig
from longspan.model import load_pretrained, save_pretrained
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, MoeConfig, NormConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.hf_adapter import CONFIG, TENSORS, load_adapter, save_adapter
from longspan.model.lora import TARGETS, LoraConfig, adapted_layers, apply_lora, init_lora, is_adapter, merge_lora
from longspan.model.shards import local_part
from tests.ranks import run_ranks

DECODER = DecoderConfig(
    num_layers=2,
    hidden_size=24,
    vocab_size=61,
    attention=AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=8),
    mlp=MlpConfig(inner_size=40),
)
TOKENS = torch.arange(2 * 11).reshape(2, 11) * 7 % 61
CONFIGS = [LoraConfig(rank=3, alpha=5), LoraConfig(rank=4, rslora=True, targets=("q", "v", "down"))]


def model_with(config: LoraConfig, seed: int = 3, *, trained: bool = True) -> DecoderLM:
    """A model with adapters; a trained one's B is not zero."""
    model = build(DECODER, device="cpu", seed=0)
    apply_lora(model, config)
    init_lora(model, seed)
    if trained:
        generator = torch.Generator().manual_seed(9)
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_b, std=0.3, generator=generator)
    return model


def test_a_mixture_has_adapters_on_its_attention_alone() -> None:
    moe = MoeConfig(num_experts=4, experts_per_token=2, inner_size=8)
    model = build(replace(DECODER, moe=moe), device="cpu", seed=0)
    with pytest.raises(ValueError, match="layer 0 has no gate"):
        apply_lora(model, LoraConfig(rank=2))
    assert not adapted_layers(model), "refused before anything was changed"
    apply_lora(model, LoraConfig(rank=2, targets=("q", "k", "v", "out")))
    assert len(adapted_layers(model)) == 4 * DECODER.num_layers


def off(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_is_the_papers_formula(config: LoraConfig) -> None:
    layer = adapted_layers(model_with(config))["blocks.1.mixer.q"]
    x = torch.randn(5, 24)
    w, a, b = (p.detach().double() for p in (layer.weight, layer.lora_a, layer.lora_b))
    scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
    assert off(layer(x), x.double() @ (w + scale * b @ a).T) < 1e-6


def test_it_starts_as_the_base_and_only_adapters_learn() -> None:
    model, base = model_with(CONFIGS[0], trained=False), build(DECODER, device="cpu", seed=0)
    assert torch.equal(model(TOKENS), base(TOKENS))
    loss, _ = model.loss(TOKENS, TOKENS)
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.{layer}.{target}.lora_{kind}" for layer in (0, 1) for target in TARGETS.values() for kind in "ab"
    }


def test_a_starts_as_pefts_does() -> None:
    layer = adapted_layers(model_with(LoraConfig(rank=70), trained=False))["blocks.0.mlp.down"]
    bound = 40**-0.5
    a = layer.lora_a.detach()
    assert not layer.lora_b.any() and a.abs().max() <= bound
    assert abs(float(a.mean())) < 0.05 * bound and abs(float(a.std()) / (bound / 3**0.5) - 1) < 0.05
    again = adapted_layers(model_with(LoraConfig(rank=70), trained=False))
    assert torch.equal(again["blocks.0.mlp.down"].lora_a, a)
    assert not torch.equal(again["blocks.1.mlp.down"].lora_a, a)
    other = adapted_layers(model_with(LoraConfig(rank=70), seed=4, trained=False))["blocks.0.mlp.down"]
    assert not torch.equal(other.lora_a, a)


def sharded(rank: int, world: int) -> dict[str, tuple[Any, Tensor]]:
    model = build(DECODER, device="meta")
    apply_lora(model, CONFIGS[0])
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    init_lora(model, 3)
    parts = {name: local_part(p.detach()) for name, p in model.named_parameters() if is_adapter(name)}
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
    return {name: (region, local) for name, (local, region) in parts.items()}


def test_a_shard_is_filled_as_the_whole() -> None:
    whole = dict(model_with(CONFIGS[0], trained=False).named_parameters())
    for parts in run_ranks(sharded, 2):
        assert parts
        for name, (region, local) in parts.items():
            assert torch.equal(whole[name].detach()[region], local)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_merge_changes_nothing(config: LoraConfig, tmp_path: Path) -> None:
    model = model_with(config)
    before = model(TOKENS)
    assert off(before, build(DECODER, device="cpu", seed=0)(TOKENS)) > 1e-2
    with pytest.raises(ValueError, match="merge_lora"):
        save_pretrained(model, tmp_path / "whole")
    merge_lora(model)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())
    assert off(model(TOKENS), before) < 1e-5
    save_pretrained(model, tmp_path / "whole")
    assert off(load_pretrained(tmp_path / "whole")(TOKENS), before) < 1e-5


# ---------------------------------------------------------------- PEFT


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_pretrained(build(DECODER, device="cpu", seed=0), tmp_path / "base", architecture="LlamaForCausalLM")
    return tmp_path / "base"


def theirs(base: Path, adapter: Path | None, config: LoraConfig | None = None) -> Any:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
        assert config is not None
        names = {"out": "o_proj"} | {name: f"{name}_proj" for name in TARGETS if name != "out"}
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank, lora_alpha=int(config.alpha), use_rslora=config.rslora, task_type="CAUSAL_LM",
                target_modules=[names[target] for target in config.targets],
            ),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_ours_with_equal_logits_and_gradients(config: LoraConfig, base: Path, tmp_path: Path) -> None:
    ours = model_with(config)
    save_adapter(ours, tmp_path / "adapter", config, base=str(base))
    other = theirs(base, tmp_path / "adapter")
    assert off(ours(TOKENS), other(TOKENS).logits) < 1e-5
    loss, count = ours.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    (loss / count).backward()
    other(TOKENS, labels=TOKENS).loss.backward()
    kinds = {"out": "self_attn.o_proj", **{n: f"self_attn.{n}_proj" for n in "qkv"}}
    kinds |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    given = dict(other.named_parameters())
    for layer in range(DECODER.num_layers):
        for target in config.targets:
            for kind in ("a", "b"):
                mine = ours.get_parameter(f"blocks.{layer}.{TARGETS[target]}.lora_{kind}").grad
                name = f"base_model.model.model.layers.{layer}.{kinds[target]}.lora_{kind.upper()}.default.weight"
                assert mine is not None and off(mine, given[name].grad) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_ours_reads_what_peft_writes(config: LoraConfig, base: Path, tmp_path: Path) -> None:
    other = theirs(base, None, config)
    for name, parameter in other.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(str(tmp_path / "adapter"))
    ours = load_pretrained(base)
    assert load_adapter(ours, tmp_path / "adapter") == config
    assert off(ours(TOKENS), other(TOKENS).logits) < 1e-5
    assert off(load_pretrained(base)(TOKENS), other(TOKENS).logits) > 1e-2  # what no adapter would give


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": -1}, "rank must be 0 or more"),
        ({"rank": 2, "alpha": 0}, "alpha must be positive"),
        ({"rank": 2, "dropout": 0.1}, "dropout must be 0"),
        ({"rank": 2, "targets": ("q", "head")}, "targets must be some of"),
        ({"rank": 2, "targets": ()}, "targets must be some of"),
        ({"alpha": 8}, "need a lora rank"),
    ],
)
def test_configs_that_mean_nothing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoraConfig(**options)


def test_models_that_take_no_adapter(tmp_path: Path) -> None:
    model = build(DECODER)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        apply_lora(model, LoraConfig())
    apply_lora(model, CONFIGS[0])
    with pytest.raises(ValueError, match="takes adapters once"):
        apply_lora(model, CONFIGS[0])
    gpt2 = DecoderConfig(
        num_layers=1,
        hidden_size=16,
        vocab_size=61,
        attention=AttentionConfig(num_heads=2, head_dim=8, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind="gelu_tanh", inner_size=32, bias=True),
        norm=NormConfig(kind="layer"),
        positions=LearnedPositionsConfig(max_positions=32),
    )
    with pytest.raises(ValueError, match="layer 0 has no gate"):
        apply_lora(build(gpt2), CONFIGS[0])
    model, config = build(gpt2, device="cpu"), LoraConfig(rank=2, targets=("q", "up"))
    apply_lora(model, config)
    with pytest.raises(ValueError, match="a matrix of its own in the Hugging Face model, got 'q'"):
        save_adapter(model, tmp_path / "adapter", config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA, got 'IA3'"),
        ({"r": None}, "numbers r and lora_alpha"),
        ({"bias": "all"}, "got 'all'"),
        ({"use_dora": True}, "use_dora of .* is not understood"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern of .* is not understood"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights 'pissa'"),
        ({"r": 5}, "must have shape \\(5, 24\\)"),
    ],
)
def test_adapters_that_are_not_understood(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_adapter(model_with(CONFIGS[0]), tmp_path, CONFIGS[0])
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=says):
        load_adapter(build(DECODER, device="cpu"), tmp_path)


def test_adapters_of_some_layers_are_refused(tmp_path: Path) -> None:
    save_adapter(model_with(CONFIGS[0]), tmp_path, CONFIGS[0])
    tensors = load_file(tmp_path / TENSORS)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"a difference at .*layers\.1"):
        load_adapter(build(DECODER, device="cpu"), tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(ValueError, match="an adapter is a folder with"):
        load_adapter(build(DECODER, device="cpu"), tmp_path)
