"""Checkpoints with experts against transformers: losses with the routers', gradients, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.model import DecoderLM, load_pretrained, save_pretrained
from longspan.model.huggingface import read_config
from tests.model.test_huggingface import CASES, edit, theirs, tokens


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe some dense", "qwen3 moe", "qwen2"])
def test_loss_with_the_routers_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids = tokens()
    output = reference(ids, labels=ids)
    output.loss.backward()
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    cross_entropy, num_labels, aux = ours.losses(ids, labels)
    expects_aux = bool(CASES[case][1].get("output_router_logits"))
    assert (aux is not None) == expects_aux
    loss = cross_entropy / num_labels
    if aux is not None:
        # Theirs is a mean over tokens, of which the last of a row has no label.
        loss = loss + aux / ids.numel()
        assert (aux / ids.numel()).item() == pytest.approx(
            CASES[case][1]["router_aux_loss_coef"] * output.aux_loss.item(), rel=1e-5
        )
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    given = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = their_gradient(name, given)
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    if aux is not None:  # the test bites: without the auxiliary loss the routers' gradients differ
        layer = ours.config.sparse_layers[0]
        ours.zero_grad()
        (ours.losses(ids, labels).cross_entropy / num_labels).backward()
        router: Any = ours.get_parameter(f"blocks.{layer}.mlp.router.weight").grad
        expected = their_gradient(f"blocks.{layer}.mlp.router.weight", given)
        assert (router - expected).abs().max() > 1e-3 * expected.abs().max()


def their_gradient(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a parameter of ours, from the modules in which transformers holds its own, experts' gate and up in one."""
    for ours, theirs_ in (
        ("blocks.", "model.layers."),
        ("norm_mixer", "input_layernorm"),
        ("norm_mlp", "post_attention_layernorm"),
        (".mixer.out.", ".self_attn.o_proj."),
        (".mixer.q_norm.", ".self_attn.q_norm."),
        (".mixer.k_norm.", ".self_attn.k_norm."),
        (".mixer.q.", ".self_attn.q_proj."),
        (".mixer.k.", ".self_attn.k_proj."),
        (".mixer.v.", ".self_attn.v_proj."),
        ("mlp.router.", "mlp.gate."),
        ("mlp.down.", "mlp.down_proj."),
    ):
        name = name.replace(ours, theirs_)
    if ".experts." in name:
        stem, kind = name.rsplit(".", 1)
        if kind == "down":
            return given[f"{stem}.down_proj"]
        return given[f"{stem}.gate_up_proj"].chunk(2, dim=1)[0 if kind == "gate" else 1]
    if f"{name.rsplit('.', 2)[0]}.gate_proj.weight" in given and ".mlp." in name:
        name = name.replace("mlp.gate.", "mlp.gate_proj.").replace("mlp.up.", "mlp.up_proj.")
    outer = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    return given[outer.get(name, name)]


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_local_experts": 6}, r"gate\.weight'.*\(6, 44\), got \(5, 44\)"),
        ("mixtral", {"num_experts_per_tok": 9}, r"experts_per_token must lie in 1\.\.5, got 9"),
        ("qwen3 moe", {"mlp_only_layers": [0]}, r"'model\.layers\.0\.mlp\.gate_proj\.weight'"),
        ("qwen3 moe", {"num_experts": 5}, "'num_experts' must be 6"),
        ("qwen3 moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3 moe", {"n_shared_experts": 1}, "n_shared_experts"),
        ("qwen2", {"model_type": "qwen3"}, "'model_type' must be 'qwen2'"),
    ],
)
def test_experts_that_are_not_understood_are_refused(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance": "bias"}, "a choice without a bias"),
        ({"capacity_factor": 1.0}, "no capacity"),
        ({"score": "sigmoid"}, "softmax scores"),
        ({"shared_inner_size": 4}, "experts without a shared one"),
        ({"renormalise": False}, "chosen scores divided by their sum"),
    ],
)
def test_experts_without_words_are_not_exported(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs("mixtral").save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert config.moe is not None
    model = DecoderLM(dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes)))
    with pytest.raises(ValueError, match=f"MixtralForCausalLM cannot hold this model: it needs {words}"):
        save_pretrained(model, tmp_path / "ours", architecture="MixtralForCausalLM")
