"""Activations in host memory: the same bits, fewer live bytes on the device, buffers that are used again."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from longspan.attention import masks
from longspan.context.sequence import SequenceContext
from longspan.mixers.config import AttentionConfig
from longspan.model import offload as module
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import build
from longspan.model.local import LocalContext
from longspan.model.offload import ActivationOffload, HostPool, Moved
from longspan.model.recompute import SDPA_OPS, apply_recompute

NUM_LAYERS, LENGTH = 5, 11
CONFIG = DecoderConfig(
    num_layers=NUM_LAYERS,
    hidden_size=12,
    vocab_size=17,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=6, qk_norm_eps=1e-6),
    mlp=MlpConfig(inner_size=20),
)
IDS = torch.randint(17, (2, LENGTH), generator=torch.Generator().manual_seed(0))
STATE = 2 * LENGTH * 12 * 4  # bytes of a block's input, and of its attention's output
LSE = 2 * LENGTH * 2 * 4
KEEP = (*SDPA_OPS, torch.ops.longspan.attention.default)
modes = pytest.mark.parametrize("mode", ["full", "attention"])


def make(mode: Any = "none", offload: ActivationOffload | None = None, tile: int | None = None) -> Any:
    model = build(CONFIG, device="cpu")
    model.mlp_tile = tile
    apply_recompute(model, mode, keep_ops=KEEP, offload=offload)
    return model


def gradients(model, ctx=None) -> list[torch.Tensor]:
    loss = model.loss(IDS, IDS.roll(-1, 1), ctx)[0]
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def equal(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@modes
@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("split", [False, True])
def test_the_same_bits_with_and_without(mode, tile, split):
    ctx = SequenceContext(masks.causal(LENGTH)) if split else LocalContext(LENGTH)
    want = gradients(make("none", tile=tile), ctx)
    assert equal(gradients(make(mode, tile=tile), ctx), want)
    offload = ActivationOffload(min_bytes=0)
    model = make(mode, offload, tile)
    for _ in range(3):
        assert equal(gradients(model, ctx), want)
    assert offload.pool is not None and offload.pool.used_bytes == 0


@modes
def test_what_is_moved_and_how_often_buffers_are_made(mode):
    """Blocks 0 to n - 3, each its input and for "attention" output and lse; the same buffers in every step."""
    offload = ActivationOffload(min_bytes=LSE + 1 if mode == "full" else LSE)
    model = make(mode, offload)
    num_moved = NUM_LAYERS - 2
    for _ in range(3):
        loss = model.loss(IDS, IDS)[0]
        assert offload.pool is not None
        assert offload.pool.used_bytes == num_moved * (STATE if mode == "full" else 2 * STATE + LSE)
        loss.backward()
        assert offload.pool.used_bytes == 0 and offload.pool.num_made == num_moved * (1 if mode == "full" else 3)


def test_small_tensors_and_parameters_stay():
    offload = ActivationOffload(min_bytes=STATE + 1)
    gradients(make("full", offload))
    assert offload.pool is None
    weight = torch.nn.Parameter(torch.zeros(100, 100))
    for one in (weight, weight.t(), weight[3:]):
        assert offload.move(one) is None
    assert isinstance(offload.move(torch.zeros(100, 100)[1:]), Moved)


@modes
def test_blocks_without_room_keep_theirs(mode):
    want = gradients(make())
    offload = ActivationOffload(min_bytes=0, limit_bytes=STATE)
    model = make(mode, offload)
    assert equal(gradients(model), want)
    assert offload.pool is not None and offload.pool.num_made == 1


@modes
@pytest.mark.parametrize("moves", [False, True])
def test_only_the_last_two_blocks_inputs_are_alive_after_the_forward(mode, moves):
    model = make(mode, ActivationOffload(min_bytes=0) if moves else None)
    inputs: list[StorageWeakRef] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = model.loss(IDS, IDS)[0]
    assert [ref.expired() for ref in inputs] == [moves and index < NUM_LAYERS - 2 for index in range(NUM_LAYERS)]
    del loss
    assert all(ref.expired() for ref in inputs)


@modes
def test_one_group_is_on_the_device_beside_that_at_work(mode):
    beside = []
    moved: weakref.WeakSet[Moved] = weakref.WeakSet()
    make_moved, get = Moved.__init__, Moved.get

    def counted_make(self, *args):
        make_moved(self, *args)
        moved.add(self)

    def counted_get(self):
        found = get(self)
        beside.append(sum(one.device is not None for one in moved))
        return found

    model = make(mode, ActivationOffload(min_bytes=0))
    with mock.patch.object(Moved, "__init__", counted_make), mock.patch.object(Moved, "get", counted_get):
        gradients(model)
    # The first block has none before it; "attention" gets its input first, when output and lse are there too.
    assert beside == ([1, 1, 0] if mode == "full" else [5, 4, 3, 5, 4, 3, 2, 1, 0])


def test_a_graph_that_is_dropped_gives_its_buffers_back():
    offload = ActivationOffload(min_bytes=0)
    model = make("attention", offload)
    loss = model.loss(IDS, IDS)[0]
    assert offload.pool is not None and offload.pool.used_bytes
    del loss
    assert offload.pool.used_bytes == 0
    with torch.no_grad():
        model.loss(IDS, IDS)
    assert offload.pool.used_bytes == 0


@modes
def test_two_forwards_before_their_backwards(mode):
    model, plain = make(mode, ActivationOffload(min_bytes=0)), make()
    for one in (model, plain):
        first, second = one.loss(IDS, IDS)[0], one.loss(IDS.flip(1), IDS)[0]
        (second + 2 * first).backward()
    assert equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_second_backward_through_kept_attention_is_refused():
    full, kept = make("full", ActivationOffload(min_bytes=0)), make("attention", ActivationOffload(min_bytes=0))
    loss = full.loss(IDS, IDS)[0]
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in full.parameters()]
    full.zero_grad()
    loss.backward()
    assert equal([p.grad for p in full.parameters()], once)
    loss = kept.loss(IDS, IDS)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"gone after one backward; drop retain_graph=True"):
        loss.backward()


def test_the_comparison_bites():
    """Host memory that is written over before it comes back is seen."""
    want = gradients(make())
    come = Moved.come

    def spoilt(self):
        self._buffer.bytes.zero_()
        come(self)

    with mock.patch.object(Moved, "come", spoilt):
        assert not equal(gradients(make("full", ActivationOffload(min_bytes=0))), want)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x[1:, 1:]])
def test_views_come_back_as_they_were_and_alone(view):
    whole = torch.randn(4, 5, 6)
    want = view(whole).clone()
    offload = ActivationOffload(min_bytes=0)
    moved = offload.move(view(whole))
    assert moved is not None and offload.pool is not None
    base = StorageWeakRef(whole.untyped_storage())
    moved.leave()
    del whole
    gc.collect()
    assert base.expired()
    got = moved.get()
    assert torch.equal(got, want) and got.stride() == torch.empty_like(want).stride()
    assert offload.pool.used_bytes == want.numel() * 4


def test_buffers_of_a_shorter_sequence_make_way():
    pool = HostPool(torch.device("cpu"))
    short = [pool.take(100) for _ in range(3)]
    for one in short:
        assert one is not None
        pool.give(one)
    kept = pool.take(60)
    assert kept is not None and kept.bytes.numel() == 100 and pool.num_made == 3
    long = pool.take(200)
    assert pool.free_bytes == 0 and pool.used_bytes == 300 and pool.num_made == 4
    assert long is not None
    pool.give(long)
    assert pool.take(150) is long
    assert HostPool(torch.device("cpu"), 99).take(100) is None


def test_modes_replace_each_other_and_copies_share():
    offload = ActivationOffload(min_bytes=0)
    model = make("attention", offload)
    twin = copy.deepcopy(model)
    want = gradients(model)
    assert equal(gradients(twin), want)
    apply_recompute(model, "none")
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert equal(gradients(model), want)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match='offload needs recompute "full" or "attention", got "none"'):
        make("none", ActivationOffload())
    with pytest.raises(ValueError, match="0 or more, got -1 and None"):
        ActivationOffload(min_bytes=-1)
    model = build(CONFIG, device="cpu")
    apply_recompute(model, "attention", keep_ops=KEEP[1:2], offload=ActivationOffload())
    with pytest.raises(ValueError, match="kept nothing"):
        gradients(model)
    assert module.NUM_ON_DEVICE == 2
