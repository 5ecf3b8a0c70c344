"""Parameters, FLOPs and kept bytes against the real model: counted, by torch's flop counter, and by live storages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, MoeConfig, NormConfig
from longspan.model.cost import (
    activation_bytes,
    block_bytes,
    flops,
    moved_bytes,
    parameters,
    peak_bytes,
    streamed_bytes,
)
from longspan.model.decoder import build
from longspan.model.layer_stream import stream_layers
from longspan.model.local import LocalContext
from longspan.model.offload import ActivationOffload, Pinned
from longspan.model.recompute import apply_recompute

CONFIGS = {
    "llama": DecoderConfig(
        num_layers=3,
        hidden_size=24,
        vocab_size=53,
        attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
        mlp=MlpConfig(inner_size=40),
    ),
    "gpt2": DecoderConfig(
        num_layers=2,
        hidden_size=32,
        vocab_size=47,
        attention=AttentionConfig(num_heads=4, head_dim=8, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind="gelu_tanh", inner_size=128, bias=True),
        norm=NormConfig(kind="layer"),
        positions=LearnedPositionsConfig(max_positions=67),
        tie_embeddings=True,
    ),
    "qwen3": DecoderConfig(
        num_layers=2,
        hidden_size=20,
        vocab_size=61,
        attention=AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=16, qk_norm_eps=1e-6, qkv_bias=True),
        mlp=MlpConfig(inner_size=36, bias=True),
        positions=RotaryConfig(theta=1e6),
        tie_embeddings=True,
    ),
    "parallel": DecoderConfig(
        num_layers=2,
        hidden_size=16,
        vocab_size=31,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        mlp=MlpConfig(kind="gelu", inner_size=64),
        norm=NormConfig(kind="layer"),
        wiring="parallel",
    ),
    "learned-qk-norm": DecoderConfig(
        num_layers=1,
        hidden_size=16,
        vocab_size=31,
        attention=AttentionConfig(num_heads=2, head_dim=8, qk_norm_eps=1e-6),
        mlp=MlpConfig(kind="gelu", inner_size=8),
        positions=LearnedPositionsConfig(max_positions=67),
    ),
    "gemma": DecoderConfig(
        num_layers=3,
        hidden_size=20,
        vocab_size=61,
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, qk_norm_eps=1e-6, qk_norm_kind="rms_plus_one", scale=0.3
        ),
        mlp=MlpConfig(kind="geglu_tanh", inner_size=36),
        norm=NormConfig(kind="rms_plus_one"),
        wiring="sandwich",
        tie_embeddings=True,
        # As long as the longest row: the rotation differs, the mask does not.
        windows=(67, None, 67),
        windowed_positions=RotaryConfig(theta=100.0),
        embed_scale=20**0.5,
        final_softcap=2.0,
    ),
    "sandwich-layer": DecoderConfig(
        num_layers=2,
        hidden_size=16,
        vocab_size=31,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        mlp=MlpConfig(kind="gelu", inner_size=40),
        norm=NormConfig(kind="layer"),
        wiring="sandwich",
    ),
    "post": DecoderConfig(
        num_layers=2,
        hidden_size=16,
        vocab_size=31,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        mlp=MlpConfig(kind="gelu", inner_size=40),
        norm=NormConfig(kind="layer"),
        wiring="post",
    ),
}
DENSE = dict(CONFIGS)
CONFIGS |= {
    "mixtral": dataclasses.replace(
        CONFIGS["llama"], moe=MoeConfig(num_experts=5, experts_per_token=2, inner_size=12, balance="aux_pooled")
    ),
    "some-dense": dataclasses.replace(
        CONFIGS["qwen3"],
        num_layers=4,
        moe=MoeConfig(
            num_experts=6,
            experts_per_token=3,
            inner_size=7,
            score="sigmoid",
            renormalise=False,
            shared_inner_size=9,
            shared_gate=True,
            balance="aux",
        ),
        dense_layers=(0, 2),
    ),
}
MODES: list[Any] = ["none", "full", "attention"]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_dense = pytest.mark.parametrize("config", DENSE.values(), ids=DENSE.keys())
each_mode = pytest.mark.parametrize("recompute", MODES)

ATEN = torch.ops.aten
# The counter knows every device's fused attention but the CPU's.
CPU_FLASH: Any = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda do, q, k, v, *_, **__: sdpa_backward_flop_count(
        do, q, k, v
    ),
}


def batch_of(config, b, n):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (b, n + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@each_config
def test_parameters_equal_the_models(config):
    assert sum(parameters(config).values()) == sum(p.numel() for p in build(config).parameters())
    assert (parameters(config)["head"] == 0) == config.tie_embeddings


@each_config
@each_mode
@pytest.mark.parametrize(("b", "n"), [(2, 13), (1, 67)])
def test_flops_equal_the_counters(config, recompute, b, n):
    model = build(config, device="cpu")
    apply_recompute(model, recompute)
    ids, labels = batch_of(config, b, n)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
        model(ids)
    assert sum(flops(config, b * n, b * n * n, backward=False).values()) == counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
        model.loss(ids, labels)[0].backward()
    want = counter.get_total_flops()
    assert sum(flops(config, b * n, b * n * n, backward=True, recompute=recompute).values()) == want
    # The counter must have seen attention at all.
    assert sum(flops(config, b * n, 0, backward=True, recompute=recompute).values()) < want


def test_flops_of_each_layers_own_area():
    config = CONFIGS["llama"]
    areas = [13 * 14 // 2, 37, 37]
    got = flops(config, 13, areas, backward=False)["attention"]
    assert got == sum(flops(config, 13, area, backward=False)["attention"] for area in areas) // 3
    assert got == 4 * 6 * 8 * sum(areas)


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, to count later the bytes of those still alive."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, *but):
        left_out = {x.untyped_storage()._cdata for x in but}
        return sum(n for key, (ref, n) in self.seen.items() if key not in left_out and not ref.expired())


@each_config
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "n"), [(1, 67), (3, 31)])
def test_kept_bytes_equal_the_live_storages(config, recompute, dtype, b, n):
    model = build(config, device="cpu", dtype=dtype)
    apply_recompute(model, recompute)
    ids, labels = batch_of(config, b, n)
    own, ctx = [*model.parameters(), ids, labels], LocalContext(n)
    # The rotation's frequencies are made once a model, not once a step.
    model(ids)
    with Storages() as storages:
        total, num_tokens = model.loss(ids, labels, ctx)
        measured = storages.alive(*own, ctx.positions, total, num_tokens)
    predicted = sum(activation_bytes(config, b, n, dtype, recompute).values())
    # On a CPU a half-precision LayerNorm keeps two half-precision statistics a token, where a GPU's are fp32.
    narrow = config.norm.kind == "layer" and dtype == torch.bfloat16
    assert predicted - measured == (2 * 2 * b * n * num_norms_kept(config, recompute) if narrow else 0)
    del total


def num_norms_kept(config, recompute):
    a_block = {"sequential": 2, "parallel": 1, "sandwich": 4, "post": 2}[config.wiring]
    return 1 if recompute != "none" else 1 + config.num_layers * a_block


class Peak(Storages):
    """The most bytes alive at any operation, in storages other than `own`."""

    def __init__(self, *own):
        super().__init__()
        self.own, self.most_bytes = {x.untyped_storage()._cdata for x in own}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.seen = {key: seen for key, seen in self.seen.items() if key not in self.own and not seen[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(n for _, n in self.seen.values()))
        return out


@each_dense
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "n"), [(1, 7), (3, 31)])
def test_peak_equals_the_measured_one(config, recompute, dtype, b, n):
    model = build(config, device="cpu", dtype=dtype)
    apply_recompute(model, recompute)
    ids, labels = batch_of(config, b, n)
    ctx = LocalContext(n)
    model(ids)
    with Peak(*model.parameters(), ids, labels, ctx.positions) as peak:
        model.loss(ids, labels, ctx)[0].backward()
    predicted = peak_bytes(config, b, n, dtype, recompute, device_type="cpu")
    assert predicted == pytest.approx(peak.most_bytes, rel=0.1)


def deep(config):
    """With blocks enough for some to move."""
    return dataclasses.replace(config, num_layers=5)


@pytest.fixture
def host(monkeypatch):
    """Storages of the host, which are not the device's, though here both are this machine's memory."""
    found: set[int] = set()
    make = Pinned.__init__

    def counted(self, *args):
        make(self, *args)
        found.add(self.bytes.untyped_storage()._cdata)

    monkeypatch.setattr(Pinned, "__init__", counted)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("recompute", MODES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_bytes_are_the_hosts_and_no_longer_the_devices(name, recompute, dtype, host):
    config, b, n = deep(CONFIGS[name]), 3, 31
    model = build(config, device="cpu", dtype=dtype)
    offload = ActivationOffload(min_bytes=0)
    apply_recompute(model, recompute, offload=offload)
    ids, labels = batch_of(config, b, n)
    own, ctx = [*model.parameters(), ids, labels], LocalContext(n)
    model(ids)
    moved = moved_bytes(config, b, n, dtype, recompute)
    with Peak() as peak:
        host |= {x.untyped_storage()._cdata for x in (*own, ctx.positions)}
        peak.own = host  # grows with the pool
        total, num_tokens = model.loss(ids, labels, ctx)
        skipped = {x.untyped_storage()._cdata for x in (total, num_tokens)}
        measured = sum(size for key, (ref, size) in peak.seen.items() if key not in skipped and not ref.expired())
        assert offload.pool is not None and offload.pool.used_bytes == moved
        total.backward()
    kept = sum(activation_bytes(config, b, n, dtype, recompute).values())
    narrow = config.norm.kind == "layer" and dtype == torch.bfloat16
    assert kept - moved - measured == (2 * 2 * b * n * num_norms_kept(config, recompute) if narrow else 0)
    predicted = peak_bytes(config, b, n, dtype, recompute, device_type="cpu", moves=True)
    assert predicted == pytest.approx(peak.most_bytes, rel=0.1)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_bytes_equal_the_buffers(config, dtype):
    model = build(config, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    stream = stream_layers(model, "cpu", dtype=dtype)
    ids, labels = batch_of(config, 2, 13)
    model.loss(ids, labels)[0].backward()
    stream.flush()
    optimizer.step()
    want = streamed_bytes(config, dtype, torch.float32)
    staging = stream.blocks._staging
    blocks = sum(slot.flat.numel() for slot in stream.blocks._slots) + (0 if staging is None else staging.numel())
    assert stream._outer_flat is not None
    num_parameters = len(list(model.parameters()))
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    for predicted, measured in (
        (want["blocks"], blocks),
        (want["outside"], stream._outer_flat.numel()),
        (want["parameters"] + want["gradients"], stream.host_bytes),
        (want["optimizer"], sum(x.numel() * x.itemsize for x in moments)),
    ):
        assert 0 <= measured - predicted <= 3 * 256 * num_parameters


def test_recomputation_saves_what_it_promises():
    config = CONFIGS["llama"]
    none, full, attention = (activation_bytes(config, 2, 1000, torch.bfloat16, mode) for mode in MODES)
    assert sum(full.values()) < sum(attention.values()) < sum(none.values())
    assert attention["attention"] == 3 * 2 * 1000 * 6 * (8 * 2 + 4) and full["attention"] == 0
    assert none["mlp"] == 3 * block_bytes(config, 2, 1000, torch.bfloat16)["mlp"]


def test_wrong_arguments_are_refused():
    config = CONFIGS["llama"]
    with pytest.raises(ValueError, match="one for each of the 3 layers, got 2"):
        flops(config, 5, [1, 2], backward=False)
    with pytest.raises(ValueError, match="negative"):
        flops(config, -5, 1, backward=False)
    with pytest.raises(ValueError, match="recompute must be one of"):
        flops(config, 5, 1, backward=True, recompute="some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r'activations move with recompute "full" or "attention", got "none"'):
        moved_bytes(config, 1, 5, torch.float32, "none")
    with pytest.raises(ValueError, match="positive, got 0 and 5"):
        activation_bytes(config, 0, 5, torch.float32, "none")
    with pytest.raises(ValueError, match="chunk_tokens"):
        peak_bytes(config, 1, 5, torch.float32, "none", chunk_tokens=0)
    with pytest.raises(ValueError, match="for mlps alone, got 5 experts"):
        peak_bytes(CONFIGS["mixtral"], 1, 5, torch.float32, "none")
