"""BERT and ViT against transformers: logits, loss and every gradient in fp32; padding; a split sequence; refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.model import Encoder, load_pretrained, save_pretrained
from longspan.model.encoder import build_encoder
from longspan.model.hf_table import ARCHITECTURES
from longspan.model.huggingface import load_into, read_config
from longspan.model.local import LocalContext
from tests.model.hf_oracle import NUM_TOKENS, VOCAB, assert_same_training, edit, randomise, tokens, worst
from tests.ranks import run_ranks

SMALL: dict[str, Any] = {
    "hidden_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 41,
    # Much larger, and fp32 rounds the gradients of saturated softmaxes by more than the tolerance.
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BERT = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 29, "type_vocab_size": 3, "pad_token_id": None}
VIT = SMALL | {"image_size": 12, "patch_size": 4, "num_channels": 2, "num_labels": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert masked": ("BertForMaskedLM", BERT),
    "bert masked tanh": ("BertForMaskedLM", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 1}),
    "bert": ("BertModel", BERT),
    "vit": ("ViTForImageClassification", VIT),
    "vit oblong": (
        "ViTForImageClassification",
        VIT | {"image_size": [6, 20], "patch_size": [3, 5], "qkv_bias": False, "num_labels": 2},
    ),
}


def theirs(case: str, **changes: Any) -> Any:
    name, values = CASES[case]
    config = transformers.BertConfig if name.startswith("Bert") else transformers.ViTConfig
    return randomise(getattr(transformers, name), config(**(values | changes)))


def inputs_of(case: str) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    if case.startswith("vit"):
        height, width = (6, 20) if "oblong" in case else (12, 12)
        return torch.randn(4, 2, height, width, generator=generator), {}
    types = CASES[case][1]["type_vocab_size"]
    return tokens(), {"types": torch.randint(types, (2, NUM_TOKENS), generator=generator)}


def answer(reference: Any, inputs: Tensor, types: Tensor | None = None, **more: Any) -> Tensor:
    if types is not None:
        more["token_type_ids"] = types
    out = reference(inputs, **more)
    return out.pooler_output if type(reference).__name__ == "BertModel" else out.logits


def in_memory(name: str) -> str:
    """ViT's names within transformers 5, which writes those of transformers 4."""
    for old, new in (
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(old, new)
    return name


def compare_training(case: str, ours: Encoder, reference: Any, tolerance: float) -> Tensor:
    """Answers, loss and every gradient are equal; returns the reference's answer."""
    name, (inputs, more) = CASES[case][0], inputs_of(case)
    if inputs.is_floating_point():
        inputs = inputs.to(next(ours.parameters()).dtype)
    got, want = ours(inputs, **more), answer(reference, inputs, **more)
    assert worst(got, want) < tolerance
    if name == "BertModel":
        loss, expected = got.square().sum(), want.square().sum()
    else:
        labels = torch.randint(want.shape[-1], want.shape[:-1], generator=torch.Generator().manual_seed(6))
        labels[0].fill_(-100)
        loss, count = ours.loss(inputs, labels, types=more.get("types"), chunk_tokens=7)
        assert count == (labels != -100).sum()
        expected = F.cross_entropy(want.flatten(0, -2), labels.flatten(), reduction="sum")
    rename = in_memory if case.startswith("vit") else str
    stored = ARCHITECTURES[name].names(ours.config)
    assert_same_training(ours, loss, reference, expected, stored, rename, tolerance)
    return want


@pytest.mark.parametrize("case", CASES)
def test_weights_of_any_spread_in_float64(case: str, tmp_path: Path) -> None:
    """Where softmaxes are saturated or nearly even, keys' gradients are differences that fp32 rounds away."""
    for spread in (0.02, 0.3, 0.6):
        reference = theirs(case, initializer_range=spread)
        reference.save_pretrained(tmp_path / str(spread))
        ours = load_pretrained(tmp_path / str(spread), kind=Encoder, dtype=torch.float64)
        compare_training(case, ours, reference.double(), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_answers_loss_and_gradients_equal_transformers_both_ways(case: str, tmp_path: Path) -> None:
    reference, name = theirs(case), CASES[case][0]
    reference.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs", kind=Encoder)
    inputs, more = inputs_of(case)
    want = compare_training(case, ours, reference, 1e-5)

    save_pretrained(ours, tmp_path / "ours")
    back, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert worst(answer(back.eval(), inputs, **more), want) < 1e-5
    again = load_pretrained(tmp_path / "ours", kind=Encoder)
    assert again.config == ours.config
    assert torch.equal(again(inputs, **more), ours(inputs, **more))
    assert read_config(tmp_path / "ours", type(ours.config)) == ours.config


def test_padding_is_not_seen() -> None:
    reference = theirs("bert masked")
    ours = of(reference)
    lengths = torch.tensor([9, NUM_TOKENS])
    seen = torch.arange(NUM_TOKENS) < lengths[:, None]
    got = ours(tokens(), LocalContext(NUM_TOKENS, causal=False, lengths=lengths))
    want = answer(reference, tokens(), attention_mask=seen.long())
    assert worst(got[seen], want[seen]) < 1e-5
    assert worst(got[0, :9], ours(tokens()[:1, :9])[0]) < 1e-5
    assert worst(got[0, :9], ours(tokens())[0, :9]) > 1e-2
    # With scores capped, the formula is written out; a cap so high changes nothing.
    for block in ours.blocks:
        block.mixer.config = dataclasses.replace(block.mixer.config, softcap=1e4)  # pyright: ignore
    capped = ours(tokens(), LocalContext(NUM_TOKENS, causal=False, lengths=lengths))
    assert worst(capped[seen], want[seen]) < 1e-4


def of(reference: Any) -> Encoder:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return load_pretrained(folder, kind=Encoder)


def split(rank: int, world: int, case: str, config: Any) -> tuple[float, int, dict[str, Tensor]]:
    """Loss and gradients of one rank's share of the sequence, summed over the ranks."""
    model = build_encoder(config, device="cpu", seed=3)
    inputs, _ = inputs_of(case)
    labels = tokens(seed=4) if case.startswith("bert") else torch.tensor([0, 3, 1, 4])
    num_tokens = NUM_TOKENS if case.startswith("bert") else 10
    ctx: Any = LocalContext(num_tokens, causal=False)
    if world > 1:
        ctx = SequenceContext(masks.full(num_tokens), dist.group.WORLD, method="all_gather")
    local = ctx.local(inputs) if world > 1 and case.startswith("bert") else inputs
    if case.startswith("bert"):
        labels = ctx.local(labels) if world > 1 else labels
    elif 0 not in ctx.positions:
        labels = labels[:0]
    total, count = model.loss(local, labels, ctx)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sums = [total.detach().clone(), count.clone()]
    if world > 1:
        for x in (*sums, *grads.values()):
            dist.all_reduce(x)
    return sums[0].item(), int(sums[1]), grads


@pytest.mark.parametrize("case", ["bert masked", "vit"])
def test_a_split_sequence_equals_the_whole_one(case: str) -> None:
    config = of(theirs(case)).config
    want_loss, want_count, want = split(0, 1, case, config)
    for loss, count, grads in run_ranks(split, 2, case, config):
        assert loss == pytest.approx(want_loss, rel=1e-5) and count == want_count
        assert grads.keys() == want.keys()
        for name, grad in grads.items():
            # A bias of unrotated keys has no gradient but rounding.
            scale = want[name.replace("k.bias", "k.weight")].abs().max()
            assert (grad - want[name]).abs().max() <= 1e-5 * scale, name


def test_packed_documents_equal_rows_of_their_own() -> None:
    ours = of(theirs("bert"))
    packed = torch.cat((tokens()[:1, :9], tokens()[1:, :14]), 1)
    positions = torch.cat((torch.arange(9), torch.arange(14)))
    ctx = SequenceContext(masks.documents((9, 14), causal=False), positions=positions.numpy())
    want = torch.cat((ours(tokens()[:1, :9]), ours(tokens()[1:, :14])))
    # One answer for each document that starts here.
    assert worst(ours(packed, ctx), want) < 1e-5


def test_old_names_other_heads_and_tied_copies(tmp_path: Path) -> None:
    reference = theirs("bert masked")
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in stored}
    assert len(old ^ set(stored)) == 4 * (1 + 2 * 3 + 1)
    tensors = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in stored.items()
    }
    tensors["bert.pooler.dense.weight"] = torch.zeros(33, 33)
    tensors["cls.seq_relationship.bias"] = torch.zeros(2)
    tensors["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert worst(load_pretrained(tmp_path, kind=Encoder)(tokens()), answer(reference, tokens())) < 1e-5
    tensors["cls.predictions.decoder.bias"][3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.bias.*must equal the embedding or bias"):
        load_pretrained(tmp_path, kind=Encoder)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("bert masked", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert masked", {"is_decoder": True}, "is_decoder"),
        ("bert masked", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert masked", {"hidden_act": "relu"}, "'hidden_act' must be one of gelu"),
        ("bert masked", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bert masked", {"something_new": 1}, "something_new"),
        ("bert masked", {"num_attention_heads": 2}, "'hidden_size' must be a multiple"),
        ("bert masked", {"architectures": None}, "BertForMaskedLM.*BertModel"),
        ("bert masked", {"architectures": ["BertModel"]}, "must hold tensor"),
        ("vit", {"image_size": 13}, "multiple of patch_size"),
        ("vit", {"image_size": [12, 12, 12]}, "'image_size' must be one or two"),
        ("vit", {"something_new": 1}, "something_new"),
        ("vit", {"id2label": {"0": "a"}}, r"'classifier\.weight'.*\(1, 33\), got \(5, 33\)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(tmp_path, kind=Encoder)
    assert "\n" not in str(caught.value)


def test_encoders_and_decoders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    theirs("bert masked").save_pretrained(tmp_path / "bert")
    for load in (load_pretrained, read_config):
        with pytest.raises(ValueError, match="got model type 'bert': that is of class Encoder"):
            load(tmp_path / "bert")
    ours = load_pretrained(tmp_path / "bert", kind=Encoder)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot hold this model"):
        save_pretrained(ours, tmp_path / "none", architecture="LlamaForCausalLM")
    theirs("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="ViTForImageClassification cannot hold this model: it needs image inputs"):
        load_into(ours, tmp_path / "vit")
    causal = dataclasses.replace(ours.config, wiring="sequential")
    with pytest.raises(ValueError, match=r"BertForMaskedLM .* it needs post wiring.*a classifier head"):
        save_pretrained(build_encoder(causal, device="cpu"), tmp_path / "none")


def test_wrong_inputs_and_contexts_are_refused() -> None:
    bert, vit = of(theirs("bert masked")), of(theirs("vit"))
    q = torch.randn(2, 7, 3, 11)
    for words, wrong in (
        ("must be integers of shape", lambda: bert(tokens()[0])),
        ("input_ids must lie in 0..60, got 61", lambda: bert(tokens() + VOCAB - tokens())),
        ("learned positions must lie in 0..28, got 29", lambda: bert(torch.zeros(1, 30, dtype=torch.int64))),
        ("token types must lie in 0..2", lambda: bert(tokens(), types=torch.full_like(tokens(), 3))),
        ("token types must be one for each", lambda: bert(tokens(), types=tokens()[:1])),
        (r"got \(6,\) positions for 23 tokens", lambda: bert(tokens(), LocalContext(6, causal=False))),
        (r"shape \(b, 2, 12, 12\)", lambda: vit(torch.randn(1, 3, 12, 12))),
        ("images have no token types", lambda: vit(torch.randn(1, 2, 12, 12), types=tokens())),
        ("one class for each of 4 rows", lambda: vit.loss(inputs_of("vit")[0], torch.tensor([1, 2]))),
        (r"lengths must be one number in 1\.\.7", lambda: LocalContext(7, lengths=torch.tensor([0, 3]))),
        (r"lengths must be one number in 1\.\.7", lambda: LocalContext(7, lengths=torch.tensor([8, 3]))),
        (
            "one for each row, got 1 for 2",
            lambda: LocalContext(7, lengths=torch.tensor([3])).attend(q, q, q, layer=0),
        ),
        ("a window counts the keys before", lambda: LocalContext(7, causal=False).attend(q, q, q, layer=0, window=3)),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    for words, changes in (
        ("a masked_lm head needs tokens", {"inputs": vit.config.inputs}),
        ("head must be masked_lm, classifier, pooler or None", {"head": "tagger"}),
        ("num_classes must be positive with a classifier", {"head": "classifier"}),
        ("wiring must be", {"wiring": "pre"}),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(bert.config, **changes)
    headless = build_encoder(dataclasses.replace(bert.config, head=None), device="cpu")
    assert headless(tokens()).shape == (2, NUM_TOKENS, 33)
    with pytest.raises(ValueError, match="a loss needs a masked_lm or classifier head"):
        headless.loss(tokens(), tokens())


def test_initial_weights_follow_the_seed() -> None:
    config = of(theirs("vit")).config
    a, b = (dict(build_encoder(config, device="cpu", seed=seed).named_parameters()) for seed in (1, 2))
    assert all((p == (0 if name.endswith("bias") else 1)).all() for name, p in a.items() if p.ndim == 1)
    assert all(not torch.equal(p, b[name]) for name, p in a.items() if p.ndim == 2)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["num_classes"] == 5
