"""Streamed training: the bits of the plain model, gradients and optimiser on the host, frozen parameters never down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import build
from longspan.model.layer_stream import stream_layers
from longspan.model.offload import ActivationOffload
from longspan.model.recompute import apply_recompute

DEVICE = torch.device("cpu")
NUM_LAYERS = 4


def config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(
        num_layers=NUM_LAYERS,
        hidden_size=12,
        vocab_size=17,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=6, qk_norm_eps=1e-6),
        mlp=MlpConfig(inner_size=20),
        **changes,
    )


def make() -> Any:
    return build(config(), device="cpu")


IDS = torch.randint(17, (2, 11), generator=torch.Generator().manual_seed(0))


def train(model: Any, stream: Any = None, *, steps: int = 3, micros: int = 1) -> Any:
    """Losses, gradients of the last step, and parameters after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    losses, grads = [], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for micro in range(micros):
            loss = model.loss(IDS.roll(micro, 1), IDS)[0]
            loss.backward()
            losses.append(loss.item())
        if stream is not None:
            stream.flush()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return losses, grads, [p.detach().clone() for p in model.parameters()]


def same(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(
        x is y or torch.equal(x, y) for a, b in zip(one[1:], other[1:], strict=True) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("mode", ["none", "full", "attention"])
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_bits_as_the_plain_model(mode, micros, tied):
    want = train(build(config(tie_embeddings=tied), device="cpu"), micros=micros)
    for moves in (False, True) if mode != "none" else (False,):
        model = build(config(tie_embeddings=tied), device="cpu")
        apply_recompute(model, mode, offload=ActivationOffload(min_bytes=0) if moves else None)
        assert same(train(model, stream_layers(model, DEVICE), micros=micros), want)


@pytest.mark.parametrize("num_buffers", [2, 3, 7])
def test_frozen_parameters_are_never_downloaded(num_buffers):
    plain, model = make(), make()
    for one in (plain, model):
        one.requires_grad_(False)
        for block in one.blocks:
            block.mixer.q.weight.requires_grad_(True)
    stream = stream_layers(model, DEVICE, num_buffers=num_buffers)
    parameters = stream.host_bytes
    assert same(train(model, stream), train(plain))
    assert stream.host_bytes - parameters == NUM_LAYERS * (-(-12 * 12 * 4 // 256) * 256)


def test_lower_blocks_without_gradients_are_left_out_of_the_backward():
    plain, model = make(), make()
    for one in (plain, model):
        one.requires_grad_(False)
        one.blocks[2].requires_grad_(True)
    assert same(train(model, stream_layers(model, DEVICE)), train(plain))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_parameters_cast_on_the_device(mode):
    """bf16 on the device from fp32 on the host: loss and gradients of a bf16 model, kept and added in fp32."""
    plain = make().bfloat16()
    want = []
    for micro in range(2):
        plain.loss(IDS.roll(micro, 1), IDS)[0].backward()
        want.append([p.grad.float() for p in plain.parameters() if p.grad is not None])
        plain.zero_grad()
    model = make()
    apply_recompute(model, mode)
    stream = stream_layers(model, DEVICE, dtype=torch.bfloat16)
    _, grads, parameters = train(model, stream, steps=1, micros=2)
    assert all(torch.equal(g, a + b) for g, a, b in zip(grads, *want, strict=True))
    assert all(p.dtype == torch.float32 for p in parameters)


def test_blocks_visit_two_buffers_and_parameters_are_at_home_in_between():
    model = make()
    stream = stream_layers(model, DEVICE)
    homes = [p.data_ptr() for p in model.parameters()]
    buffers = set()
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda mixer, _: buffers.add(mixer.q.weight.untyped_storage().data_ptr()))
    model.loss(IDS, IDS)[0].backward()
    assert len(buffers) == 2
    assert [p.data_ptr() for p in model.blocks.parameters()] != [] and model.embed.weight.data_ptr() not in homes
    state = model.state_dict()
    assert [p.data_ptr() for p in model.parameters()] == homes
    assert all(value.data_ptr() in homes for value in state.values())
    stream.flush()


def test_an_optimiser_step_for_each_block_beside_the_backward():
    want = train(make())
    model = make()
    optimizers = [torch.optim.AdamW(block.parameters(), lr=0.1, fused=True) for block in model.blocks]
    inside = set(model.blocks.parameters())
    rest = torch.optim.AdamW([p for p in model.parameters() if p not in inside], lr=0.1, fused=True)
    done = []

    def after_block(index: int) -> None:
        done.append(index)
        optimizers[index].step()
        optimizers[index].zero_grad()

    stream = stream_layers(model, DEVICE, after_block=after_block)
    losses = []
    for _ in range(3):
        loss = model.loss(IDS, IDS)[0]
        loss.backward()
        losses.append(loss.item())
        stream.flush()
        rest.step()
        rest.zero_grad()
    assert done == [3, 2, 1, 0] * 3
    assert losses == want[0]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), want[2], strict=True))


def test_what_after_block_raises_comes_with_the_flush():
    model = make()

    def fail(index: int) -> None:
        raise KeyError(index)

    stream = stream_layers(model, DEVICE, after_block=fail)
    model.loss(IDS, IDS)[0].backward()
    with pytest.raises(KeyError):
        stream.flush()


def test_evaluation_between_steps_and_a_forward_that_fails():
    model, plain = make(), make()
    stream = stream_layers(model, DEVICE)
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.loss(IDS, IDS)
    handle.remove()
    stream.flush()
    assert same(train(model, stream), train(plain))


def test_the_comparison_bites():
    """A host buffer that changes without a flush, or a block that is not uploaded again, is seen."""
    model = make()
    stream = stream_layers(model, DEVICE)
    stream.blocks.forget = lambda: None
    assert not same(train(model, stream, steps=3), train(make(), steps=3))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="streaming needs a model with blocks, got Linear"):
        stream_layers(torch.nn.Linear(2, 2), DEVICE)
