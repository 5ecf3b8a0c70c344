"""Offload on one CUDA device: the same bits, less memory allocated, host memory that is pinned and used again."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.cost import moved_bytes
from longspan.model.decoder import DecoderLM, build
from longspan.model.layer_stream import stream_layers
from longspan.model.offload import ActivationOffload, Pinned
from longspan.model.recompute import apply_recompute

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

NUM_LAYERS, LENGTH, MIB = 12, 16384, 2**20
CONFIG = DecoderConfig(
    num_layers=NUM_LAYERS,
    hidden_size=1024,
    vocab_size=1000,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=128),
    mlp=MlpConfig(inner_size=2048),
)
OPS = (torch.ops.longspan.attention.default,)


@pytest.fixture(autouse=True)
def deterministic():
    """cuDNN's attention backward adds in any order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def ids() -> torch.Tensor:
    return torch.randint(1000, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()


def make(mode: Any, offload: ActivationOffload | None = None, device: str = "cuda") -> DecoderLM:
    model = build(CONFIG, device="cpu", dtype=torch.bfloat16).to(device)
    model.mlp_tile = 4096
    apply_recompute(model, mode, keep_ops=OPS, offload=offload)
    return model


def context() -> SequenceContext:
    return SequenceContext(masks.causal(LENGTH), device="cuda")


def gradients(model: DecoderLM, ctx: SequenceContext) -> list[torch.Tensor]:
    loss = model.loss(ids(), ids().roll(-1, 1), ctx)[0]
    loss.backward()
    found = [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_registered_memory_is_pinned_and_copied_right() -> None:
    pin = Pinned(3 * MIB + 5, torch.device("cuda"))
    assert pin.bytes.is_pinned()
    there = torch.arange(3 * MIB + 5, device="cuda").to(torch.uint8)
    pin.bytes.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(pin.bytes, there.cpu())
    view = pin.bytes[:5]
    del pin
    assert not view.is_pinned() and view.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["full", "attention"])
def test_activations_move_and_the_bits_stay(mode: Any) -> None:
    ctx, allocated = context(), []
    offload = ActivationOffload()
    results = []
    for moves in (None, offload):
        model = make(mode, moves)
        gradients(model, ctx)  # handles, workspaces and pinned buffers are made
        before = torch.cuda.memory_allocated()
        loss = model.loss(ids(), ids().roll(-1, 1), ctx)[0]
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        model.zero_grad(set_to_none=True)
        del loss
        results += [gradients(model, ctx) for _ in range(3)]
        del model
        gc.collect()
    assert all(equal(results[0], other) for other in results[1:])
    moved = moved_bytes(CONFIG, 1, LENGTH, torch.bfloat16, mode)
    if mode == "attention":  # each lse is under a MiB, and stays
        moved -= (NUM_LAYERS - 2) * CONFIG.attention.num_heads * LENGTH * 4
    assert abs(allocated[0] - allocated[1] - moved) <= 2 * MIB
    assert offload.pool is not None and offload.pool.used_bytes == 0
    assert offload.pool.num_made == (NUM_LAYERS - 2) * (1 if mode == "full" else 2)


def test_the_peak_falls_by_what_is_moved() -> None:
    """With gradients that are there before: else those of the blocks that are done fill what activations have left."""
    ctx, peaks = context(), []
    for moves in (None, ActivationOffload()):
        model = make("full", moves)
        gradients(model, ctx)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(model, ctx)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
        gc.collect()
    moved = moved_bytes(CONFIG, 1, LENGTH, torch.bfloat16, "full")
    # One block's tensors more may be on their way at the peak.
    assert peaks[0] - peaks[1] >= moved - 2 * moved // (NUM_LAYERS - 2)


def test_copies_run_beside_the_computation_without_host_syncs() -> None:
    """After a first step no call of the forward waits for the device."""
    model, ctx = make("attention", ActivationOffload()), context()
    gradients(model, ctx)
    tokens = ids()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model.loss(tokens, tokens, ctx)[0]
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("moves", [False, True])
def test_streamed_layers_have_the_bits_of_the_plain_model(mode: Any, moves: bool) -> None:
    if moves and mode == "none":
        pytest.skip("refused")
    ctx = context()
    plain = make(mode)
    reference = torch.optim.SGD(plain.parameters(), lr=0.01)
    model = make(mode, ActivationOffload() if moves else None, device="cpu")
    stream = stream_layers(model, "cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        for _ in range(1 + step):  # micro-batches add up
            want = plain.loss(ids(), ids(), ctx)[0]
            want.backward()
            got = model.loss(ids(), ids(), ctx)[0]
            got.backward()
            assert torch.equal(want, got)
        stream.flush()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert q.device.type == "cpu" and q.is_pinned()
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad.cpu(), q.grad)
        # The same update on both, without the devices' own rounding.
        optimizer.step()
        optimizer.zero_grad()
        reference.zero_grad()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.copy_(q)


def test_streamed_layers_hold_two_blocks_and_gradients_leave() -> None:
    ctx = context()
    gradients(make("full"), ctx)  # workspaces and handles are made
    gc.collect()
    base = torch.cuda.memory_allocated()
    model = make("full", device="cpu")
    stream = stream_layers(model, "cuda")
    gradients(model, ctx)
    stream.flush()
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 2
    outside = 2 * 1000 * 1024 * 2
    assert torch.cuda.memory_allocated() - base <= 2 * block + outside + 40 * MIB
    model.loss(ids(), ids(), ctx)[0].backward()
    torch.cuda.synchronize()
    # Gradients of two blocks and of embedding and head at most are still held, whose way home is over.
    assert torch.cuda.memory_allocated() - base <= 4 * block + 2 * outside + 40 * MIB
    stream.flush()
    assert torch.cuda.memory_allocated() - base <= 2 * block + outside + 40 * MIB


def test_master_weights_on_the_host_and_bf16_on_the_device() -> None:
    ctx = context()
    plain = make("full")
    want = gradients(plain, ctx)
    model = build(CONFIG, device="cpu")
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.copy_(q)
    model.mlp_tile = 4096
    apply_recompute(model, "full")
    stream = stream_layers(model, "cuda", dtype=torch.bfloat16)
    loss = model.loss(ids(), ids().roll(-1, 1), ctx)[0]
    loss.backward()
    stream.flush()
    assert torch.equal(loss.detach().cpu(), want[0])
    for p, grad in zip(model.parameters(), want[1:], strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and torch.equal(p.grad, grad.float())
