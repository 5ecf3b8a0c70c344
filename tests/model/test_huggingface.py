"""Import and export against transformers: small random models of odd sizes, logits in fp32, both ways."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from longspan.mixers.config import Llama3Scaling, YarnScaling
from longspan.model import DecoderConfig, DecoderLM, load_pretrained, save_pretrained
from longspan.model.huggingface import read_config

VOCAB = 61
NUM_TOKENS = 23
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "intermediate_size": 37,
    "bos_token_id": None,
    "eos_token_id": None,
    # Large enough that every part moves the logits by more than the tolerance.
    "initializer_range": 0.3,
}
LLAMA = SMALL | {"hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
QWEN3 = SMALL | {"hidden_size": 22, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
QWEN2 = SMALL | {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
# transformers' grouped products want sizes of whole 16 bytes.
MIXTRAL = LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 36}
QWEN3_MOE = QWEN3 | {"hidden_size": 28, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_layer": 3,
    "n_embd": 33,
    "n_head": 3,
    "n_positions": 29,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3_ROPE = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN_ROPE = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_ROPE_2 = rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=2.0, mscale=0.7,
    mscale_all_dim=1.2, truncate=False,
)  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama tied biases": ("Llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama multi-head theta": ("Llama", LLAMA | {"num_key_value_heads": 4, **rope("default")}),
    "llama linear": ("Llama", LLAMA | rope("linear", factor=3.0)),
    "llama llama3": ("Llama", LLAMA | {"head_dim": 16} | LLAMA3_ROPE),
    "llama yarn": ("Llama", LLAMA | {"head_dim": 16} | YARN_ROPE),
    "llama yarn mscale": ("Llama", LLAMA | {"head_dim": 16} | YARN_ROPE_2),
    "mistral window": ("Mistral", LLAMA | {"sliding_window": 5, "hidden_size": 30, "num_key_value_heads": 1}),
    "mistral full": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen3": ("Qwen3", QWEN3 | {"attention_bias": True}),
    "qwen3 windows tied": (
        "Qwen3",
        QWEN3 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", QWEN2),
    "qwen2 windows tied": (
        "Qwen2",
        QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", MIXTRAL | {"output_router_logits": True, "router_aux_loss_coef": 0.3}),
    "mixtral window": ("Mixtral", MIXTRAL | {"sliding_window": 5}),
    "qwen3 moe": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3 moe some dense": (
        "Qwen3Moe",
        QWEN3_MOE | {"mlp_only_layers": [2], "output_router_logits": True, "router_aux_loss_coef": 0.2},
    ),
    "qwen3 moe every second": (
        "Qwen3Moe",
        QWEN3_MOE | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 4},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied gelu": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 41}),
}
CLASSES = {
    "Llama": "LlamaForCausalLM",
    "Mistral": "MistralForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "Mixtral": "MixtralForCausalLM",
    "Qwen3Moe": "Qwen3MoeForCausalLM",
    "GPT2": "GPT2LMHeadModel",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield


def theirs(case: str, **changes: Any) -> Any:
    kind, values = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    torch.manual_seed(1)
    model = getattr(transformers, CLASSES[kind])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def difference(a: Any, b: Any) -> float:
    logits = [m(tokens()) for m in (a, b)]
    x, y = (out if isinstance(out, torch.Tensor) else out.logits for out in logits)
    # Otherwise a model that answers zeros would pass.
    assert x.std() > 0.1
    return float((x - y).abs().max())


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    theirs("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_both_ways(case: str, tmp_path: Path) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert difference(ours, reference) < 1e-5

    kind, _ = CASES[case]
    save_pretrained(ours, tmp_path / "ours", architecture=CLASSES[kind])
    back, report = getattr(transformers, CLASSES[kind]).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(back.eval(), reference) < 1e-5
    again = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert difference(again, ours) == 0


@pytest.mark.parametrize("case", ["llama tied biases", "gpt2", "mixtral", "qwen3 moe some dense"])
def test_checkpoints_in_several_files(case: str, tmp_path: Path) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_pretrained(tmp_path / "theirs")
    assert difference(ours, reference) < 1e-5

    save_pretrained(ours, tmp_path / "ours", max_file_bytes=10_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert max(len(load_file(file)) for file in files) > 1
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in ours.parameters())
    assert difference(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), reference) < 1e-5
    assert not list((tmp_path / "ours").glob(".*"))


@pytest.mark.parametrize(
    "case",
    [
        "llama linear",
        "llama llama3",
        "llama yarn",
        "llama yarn mscale",
        "mistral window",
        "qwen3 windows tied",
        "qwen2 windows tied",
        "mixtral window",
        "qwen3 moe every second",
    ],
)
def test_what_the_config_says_moves_the_logits(case: str, tmp_path: Path) -> None:
    # The tests above would pass on a case whose scaling or window does nothing: without it, logits must differ.
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}, sliding_window=None, layer_types=None)
    assert difference(load_pretrained(tmp_path), reference) > 1e-3


def test_rope_keys_of_transformers_4(tmp_path: Path) -> None:
    reference = theirs("llama llama3")
    reference.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3_ROPE["rope_parameters"].items() if k != "rope_theta"}
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert difference(load_pretrained(tmp_path), reference) < 1e-5
    assert isinstance(read_config(tmp_path).positions.scaling, Llama3Scaling)  # pyright: ignore[reportAttributeAccessIssue]


def test_rope_type_under_its_oldest_key_and_length_from_the_model(llama: Path) -> None:
    edit(
        llama,
        rope_parameters=None,
        rope_theta=700,
        rope_scaling={"type": "yarn", "factor": 2},
        max_position_embeddings=99,
    )
    positions = read_config(llama).positions
    assert positions.scaling == YarnScaling(factor=2.0, original_max_positions=99)  # pyright: ignore[reportAttributeAccessIssue]
    assert positions.theta == 700  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_of_keys_that_old_configs_lack(tmp_path: Path) -> None:
    reference = theirs("llama multi-head theta")
    reference.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    kept = (
        "model_type",
        "vocab_size",
        "num_hidden_layers",
        "intermediate_size",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
    )
    (tmp_path / "config.json").write_text(json.dumps({key: values[key] for key in kept} | {"rope_theta": 500.0}))
    assert difference(load_pretrained(tmp_path), reference) < 1e-5


@pytest.mark.parametrize(
    ("case", "absent"), [("llama yarn", 32), ("mistral window", 8), ("mistral full", 8), ("qwen3", 32)]
)
def test_null_kv_heads_are_one_for_each_query_head(case: str, absent: int, tmp_path: Path) -> None:
    """As transformers 5 reads Llama and Qwen3, and transformers 4 Mistral (5 refuses it); absent, it is a default."""
    heads = CASES[case][1]["num_attention_heads"]
    reference = theirs(case, num_key_value_heads=heads)
    reference.save_pretrained(tmp_path)
    edit(tmp_path, num_key_value_heads=None)
    assert difference(load_pretrained(tmp_path), reference) < 1e-5
    values = json.loads((tmp_path / "config.json").read_text()) | {"num_attention_heads": 32, "hidden_size": 64}
    del values["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).attention.num_kv_heads == absent


def test_bare_names_and_buffers_of_old_gpt2_checkpoints(tmp_path: Path) -> None:
    reference = theirs("gpt2")
    reference.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 29, 29)
    save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path, n_ctx=29)
    assert difference(load_pretrained(tmp_path), reference) < 1e-5


def test_a_head_stored_beside_a_tied_embedding_must_equal_it(tmp_path: Path) -> None:
    reference = theirs("qwen3 windows tied")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert difference(load_pretrained(tmp_path), reference) < 1e-5
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight.*equal the embedding"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes(stored: torch.dtype, tmp_path: Path) -> None:
    theirs("llama").to(stored).save_pretrained(tmp_path / "theirs")
    # Read anew: `to` has rounded transformers' rotary frequencies as well.
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    ours = load_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert difference(ours, reference) < 1e-5
    save_pretrained(ours, tmp_path / "ours", dtype=stored)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == str(stored)[6:]
    assert {x.dtype for x in load_file(tmp_path / "ours" / "model.safetensors").values()} == {stored}
    low = load_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_export_chooses_an_architecture_or_says_why_none_fits(tmp_path: Path) -> None:
    for case, name in (
        ("llama", "LlamaForCausalLM"),
        ("mistral window", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("qwen3 moe some dense", "Qwen3MoeForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
    ):
        theirs(case).save_pretrained(tmp_path / case)
        ours = load_pretrained(tmp_path / case)
        save_pretrained(ours, tmp_path / f"{case} ours", extra={"eos_token_id": 7})
        written = json.loads((tmp_path / f"{case} ours" / "config.json").read_text())
        assert (written["architectures"], written["eos_token_id"]) == ([name], 7)
    values = ours.config.to_dict() | {"wiring": "parallel"}
    with pytest.raises(ValueError, match=r"no Hugging Face architecture.*GPT2LMHeadModel.*sequential wiring"):
        save_pretrained(DecoderLM(DecoderConfig.from_dict(values)), tmp_path / "none")
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot hold this model: it needs rotary positions"):
        save_pretrained(ours, tmp_path / "none", architecture="Qwen3ForCausalLM")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="without a checkpoint"):
        save_pretrained(ours, tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"extra .*'rms_norm_eps'"):
        save_pretrained(ours, tmp_path / "none", extra={"rms_norm_eps": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits_scaling": 2.0}, "'logits_scaling' = 2.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 3}, "sliding_window"),
        ({"use_something_new": False}, "use_something_new"),
        ({"hidden_act": "relu"}, "'hidden_act' must be 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type.*'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks 'factor'"),
        ({"rope_theta": 77.0}, "two values for 'rope_theta'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "both 'rope_scaling' and 'rope_parameters'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "44"}, "wrong type for 'hidden_size'"),
        ({"architectures": ["MambaForCausalLM"]}, "one of LlamaForCausalLM, .*got .'MambaForCausalLM'"),
        ({"architectures": None, "model_type": "mamba"}, "one of LlamaForCausalLM, .*got 'mamba'"),
        ({"model_type": "qwen3"}, "'model_type' must be 'llama'"),
        ({"num_hidden_layers": 4}, r"'model\.layers\.3\.input_layernorm\.weight', got 9 missing"),
        ({"num_hidden_layers": 2}, r"'model\.layers\.2\.input_layernorm\.weight' and 8 more"),
        ({"vocab_size": 62}, r"'model\.embed_tokens\.weight'.*\(62, 44\), got \(61, 44\)"),
        ({"attention_bias": True}, r"q_proj\.bias"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be at least 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "theta"),
        ({"architectures": [["x"]]}, "one of LlamaForCausalLM"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], words: str, llama: Path) -> None:
    edit(llama, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(llama)
    assert "\n" not in str(caught.value)


def test_gpt2_variants_are_refused_by_name(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    for key, value in {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "add_cross_attention": True,
        "activation_function": "swish",
    }.items():
        before = json.loads((tmp_path / "config.json").read_text())
        edit(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=key):
            load_pretrained(tmp_path)
        edit(tmp_path, **before)
