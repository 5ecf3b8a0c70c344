"""Encoders on real data: a masked-LM on Shakespeare's letters, a ViT on MNIST: they train."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.mixers.config import AttentionConfig
from longspan.model import Encoder, EncoderConfig
from longspan.model.config import MlpConfig
from longspan.model.encoder import build_encoder
from longspan.model.encoder_config import PatchesConfig, TokensConfig
from tests.data import data_dir

LENGTH = 64
MASK = 256  # one more than the bytes
# Of the long runs: about 1 / √width. With BERT's own 0.02 such narrow post-norm blocks still know no more than the
# frequencies of letters after 1600 steps.
WIDE = 0.1


def bert(layers: int = 2, width: int = 96) -> EncoderConfig:
    return EncoderConfig(
        num_layers=layers,
        hidden_size=width,
        inputs=TokensConfig(vocab_size=257, max_positions=LENGTH),
        attention=AttentionConfig(num_heads=4, head_dim=width // 4, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind="gelu", inner_size=4 * width, bias=True),
        wiring="post",
        embed_norm=True,
        head="masked_lm",
    )


def vit(layers: int = 2, width: int = 64) -> EncoderConfig:
    return EncoderConfig(
        num_layers=layers,
        hidden_size=width,
        inputs=PatchesConfig(image_size=(28, 28), patch_size=(7, 7), num_channels=1),
        attention=AttentionConfig(num_heads=4, head_dim=width // 4, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind="gelu", inner_size=4 * width, bias=True),
        head="classifier",
        num_classes=10,
    )


def masked_batch(text: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of bytes with 15 % hidden, and what stood there."""
    starts = torch.randint(text.shape[0] - LENGTH, (rows, 1), generator=generator)
    ids = text[starts + torch.arange(LENGTH)]
    hidden = torch.rand(ids.shape, generator=generator) < 0.15
    return ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, -100)


def train(model: Encoder, num_steps: int, batch, lr: float) -> list[float]:
    """Losses per label of `num_steps` steps of AdamW with a warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 8 * (step + 1) / num_steps)
        total, count = model.loss(*batch())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return losses


def letters() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last tenth, held out."""
    raw = (data_dir("text") / "tinyshakespeare.txt").read_bytes()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def digits() -> dict[str, Tensor]:
    """Images in -1..1 (n, 1, 28, 28) and classes."""
    stored = np.load(data_dir("mnist") / "mnist.npz")
    images = {k: torch.from_numpy(stored[k])[:, None].float() / 127.5 - 1 for k in ("x_train", "x_test")}
    return images | {k: torch.from_numpy(stored[k]).long() for k in ("y_train", "y_test")}


def test_a_masked_lm_begins_to_learn() -> None:
    text, _ = letters()
    generator = torch.Generator().manual_seed(0)
    losses = train(build_encoder(bert(1, 32), device="cpu"), 30, lambda: masked_batch(text, 8, generator), 3e-3)
    assert losses[0] > 5 and sum(losses[-5:]) / 5 < losses[0] - 1


def test_a_vit_begins_to_learn() -> None:
    data, generator = digits(), torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(60000, (32,), generator=generator)
        return data["x_train"][rows], data["y_train"][rows]

    losses = train(build_encoder(vit(1, 32), device="cpu"), 60, batch, 3e-3)
    assert losses[0] > 2.2 and sum(losses[-5:]) / 5 < losses[0] - 0.2


@pytest.mark.slow
def test_a_masked_lm_learns_more_than_the_frequencies_of_letters() -> None:
    text, held_out = letters()
    generator = torch.Generator().manual_seed(0)
    model = build_encoder(dataclasses.replace(bert(), init_std=WIDE), device="cpu")
    train(model, 1600, lambda: masked_batch(text, 32, generator), 1e-3)
    with torch.no_grad():
        total, count = model.loss(*masked_batch(held_out, 256, torch.Generator().manual_seed(1)))
    counts = torch.bincount(text, minlength=256).double()
    entropy = -(counts / counts.sum() * (counts / counts.sum()).clamp(min=1e-12).log()).sum().item()
    # The best that no look at the neighbours could do is 3.3 nats.
    print(f"{total / count:.3f} nats against {entropy:.3f}")
    assert total / count < entropy - 0.8


@pytest.mark.slow
def test_a_vit_reads_digits() -> None:
    data, generator = digits(), torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(60000, (128,), generator=generator)
        return data["x_train"][rows], data["y_train"][rows]

    model = build_encoder(dataclasses.replace(vit(), init_std=WIDE), device="cpu")
    train(model, 600, batch, 2e-3)
    with torch.no_grad():
        right = (model(data["x_test"]).argmax(-1) == data["y_test"]).double().mean().item()
    print(f"{right:.4f} of the test images")
    assert right > 0.93
