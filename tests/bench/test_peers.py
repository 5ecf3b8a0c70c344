"""Peers of the benchmark of training steps: the same losses as ours over steps, from the same start."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.bench.peers import NotInstalledError, hugging_face, torchtitan
from longspan.context.sequence import SequenceContext
from longspan.mixers.config import AttentionConfig, Llama3Scaling, RotaryConfig
from longspan.model.config import DecoderConfig, MlpConfig, NormConfig
from longspan.model.decoder import build
from longspan.model.huggingface import save_pretrained
from longspan.train.config import OptimConfig
from longspan.train.loop import make_optimizer

CPU = torch.device("cpu")
LENGTH, STEPS = 40, 4
OPTIM = OptimConfig(weight_decay=1.0)  # so large that a group decayed otherwise shows
POSITIONS = RotaryConfig(theta=5e5, max_positions=64)


def llama(*, tie: bool) -> DecoderConfig:
    return DecoderConfig(
        num_layers=2,
        hidden_size=32,
        vocab_size=61,
        attention=AttentionConfig(num_heads=4, head_dim=8, num_kv_heads=2),
        mlp=MlpConfig(inner_size=48),
        norm=NormConfig(eps=1e-5),
        positions=POSITIONS,
        tie_embeddings=tie,
        init_std=0.3,
    )


TOKENS = torch.randint(0, 61, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def ours(config: DecoderConfig, folder) -> list[float]:
    """The losses of our own steps; the start is written to `folder`."""
    model = build(config, device="cpu", dtype=torch.float32, seed=1)
    save_pretrained(model, folder)
    optimizer = make_optimizer(model, OPTIM)
    ctx, losses = SequenceContext(masks.causal(LENGTH), device=CPU), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:], ctx)[0] / LENGTH
        loss.backward()
        # The gradients are clipped, or the test would not see it.
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip) > OPTIM.clip
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def left_alone():
    """Takes down the process group that a peer has started."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("tie", "recompute"), [(True, False), (False, True)])
def test_transformers_loses_what_we_lose(tie, recompute, tmp_path) -> None:
    pytest.importorskip("transformers")
    config = llama(tie=tie)
    want = ours(config, tmp_path / "w")
    peer = hugging_face(
        config,
        tmp_path / "w",
        TOKENS,
        compiled=False,
        recompute=recompute,
        device=CPU,
        dtype=torch.float32,
        optim=OPTIM,
    )
    assert [peer.step() for _ in want] == pytest.approx(want, rel=1e-5)
    assert peer.parameters == sum(p.numel() for p in build(config, device="meta", dtype=torch.float32).parameters())


@pytest.mark.parametrize(
    ("tie", "recompute", "saved"), [(True, False, "products"), (True, True, "products"), (False, True, "nothing")]
)
def test_torchtitan_loses_what_we_lose(tie, recompute, saved, tmp_path, left_alone) -> None:
    pytest.importorskip("torchtitan")
    config = llama(tie=tie)
    want = ours(config, tmp_path / "w")
    peer = torchtitan(
        config,
        tmp_path / "w",
        TOKENS,
        compiled=False,
        recompute=recompute,
        saved=saved,
        device=CPU,
        dtype=torch.float32,
        optim=OPTIM,
    )
    assert [peer.step() for _ in want] == pytest.approx(want, rel=1e-5)
    assert peer.parameters == sum(p.numel() for p in build(config, device="meta", dtype=torch.float32).parameters())


@pytest.mark.parametrize("peer", [hugging_face, torchtitan])
def test_a_package_that_is_not_there_is_said_to_be_so(peer, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torchtitan.components.checkpointer.utils", None)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(NotInstalledError, match="is not installed, or not for torch"):
        peer(llama(tie=True), tmp_path, TOKENS, compiled=False, recompute=False, device=CPU)


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        ({"mlp": MlpConfig(inner_size=48, kind="gelu")}, TOKENS, "it needs a swiglu mlp"),
        ({"mlp": MlpConfig(inner_size=48, bias=True)}, TOKENS, "without biases"),
        ({}, TOKENS.int(), r"tokens must be \(1, l \+ 1\) int64"),
        ({}, TOKENS.reshape(-1), r"tokens must be \(1, l \+ 1\) int64"),
    ],
)
@pytest.mark.parametrize("peer", [hugging_face, torchtitan])
def test_what_they_cannot_compute_is_refused(peer, changes, tokens, words, tmp_path) -> None:
    config = replace(llama(tie=True), **changes)
    with pytest.raises(ValueError, match=words):
        peer(config, tmp_path, tokens, compiled=False, recompute=False, device=CPU)


def test_torchtitan_refuses_a_length_that_its_chunks_do_not_divide(tmp_path) -> None:
    with pytest.raises(ValueError, match="a length that 8 divides, got 39"):
        torchtitan(llama(tie=True), tmp_path, TOKENS[:, :-1], compiled=False, recompute=False, device=CPU)


def test_torchtitan_refuses_scaled_positions(tmp_path, left_alone) -> None:
    pytest.importorskip("torchtitan")
    config = replace(llama(tie=True), positions=replace(POSITIONS, scaling=Llama3Scaling(factor=8.0)))
    with pytest.raises(ValueError, match="plain rotary positions"):
        torchtitan(config, tmp_path, TOKENS, compiled=False, recompute=False, device=CPU)
