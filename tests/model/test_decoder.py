"""The decoder: causality, wiring, tied heads, tiles, initialisation, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model.config import DecoderConfig, LearnedPositionsConfig, MlpConfig, NormConfig
from longspan.model.decoder import DecoderLM, build, init_weights
from longspan.model.local import LocalContext

BASE = DecoderConfig(
    num_layers=2,
    hidden_size=22,
    vocab_size=29,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    mlp=MlpConfig(inner_size=31),
    init_std=0.3,
)
GPT2 = dataclasses.replace(
    BASE,
    attention=AttentionConfig(num_heads=2, head_dim=11, qkv_bias=True, out_bias=True),
    mlp=MlpConfig(kind="gelu_tanh", inner_size=17, bias=True),
    norm=NormConfig(kind="layer", eps=1e-5),
    positions=LearnedPositionsConfig(max_positions=19),
    tie_embeddings=True,
)
PARALLEL = dataclasses.replace(BASE, wiring="parallel", windows=(3, None), mlp=MlpConfig(kind="gelu", inner_size=9))
GEMMA = dataclasses.replace(
    BASE,
    mlp=MlpConfig(kind="geglu_tanh", inner_size=19),
    norm=NormConfig(kind="rms_plus_one"),
    wiring="sandwich",
    windows=(4, None),
    windowed_positions=RotaryConfig(theta=50.0),
    embed_scale=3.3,
    final_softcap=1.5,
    tie_embeddings=True,
)
POST = dataclasses.replace(GPT2, wiring="post")
CONFIGS = {"llama": BASE, "gpt2": GPT2, "parallel": PARALLEL, "gemma": GEMMA, "post": POST}


def ids(n: int, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(29, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
@given(cut=st.integers(1, 10), seed=st.integers(0, 9))
def test_future_tokens_never_change_past_logits(name: str, cut: int, seed: int) -> None:
    model = build(CONFIGS[name], device="cpu")
    before = ids(11, seed=seed)
    after = before.clone()
    after[:, cut:] = (after[:, cut:] + 1) % 29
    with torch.no_grad():
        x, y = model(before), model(after)
    assert torch.equal(x[:, :cut], y[:, :cut])
    assert not torch.isclose(x[:, cut:], y[:, cut:]).all(-1).any()


def test_a_window_of_the_first_layer_reaches_no_further_than_layers_allow() -> None:
    model = build(dataclasses.replace(BASE, windows=(3, 2)), device="cpu")
    changed = ids(11)
    changed[:, 0] = (changed[:, 0] + 1) % 29
    moved = (model(ids(11)) != model(changed)).any(-1)
    # Two back in the first layer, one more in the second.
    assert moved[:, :4].all() and not moved[:, 4:].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_block_wiring(name: str) -> None:
    block: Any = build(CONFIGS[name], device="cpu").blocks[0]
    x, ctx = torch.randn(2, 5, 22), LocalContext(5)
    if CONFIGS[name].wiring == "parallel":
        n = block.norm_mixer(x)
        want = x + block.mixer(n, ctx) + block.mlp(n)
    elif CONFIGS[name].wiring == "sandwich":
        y = x + block.norm_mixer_out(block.mixer(block.norm_mixer(x), ctx))
        want = y + block.norm_mlp_out(block.mlp(block.norm_mlp(y)))
    elif CONFIGS[name].wiring == "post":
        y = block.norm_mixer(x + block.mixer(x, ctx))
        want = block.norm_mlp(y + block.mlp(y))
    else:
        y = x + block.mixer(block.norm_mixer(x), ctx)
        want = y + block.mlp(block.norm_mlp(y))
    got, routing = block(x, ctx)
    assert routing is None
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_cross_entropy_of_the_logits(name: str) -> None:
    model, x, labels = build(CONFIGS[name], device="cpu"), ids(13), ids(13, seed=1)
    labels[0, 3:9] = -100
    total, count = model.loss(x, labels, chunk_tokens=4)
    want = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == 20 and count.dtype == torch.int64
    torch.testing.assert_close(total, want)
    got = torch.autograd.grad(total, list(model.parameters()))
    for (key, _), g, w in zip(
        model.named_parameters(), got, torch.autograd.grad(want, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(g, w, msg=lambda m, key=key: f"{key}: {m}")


def test_tied_head_is_one_parameter() -> None:
    model = build(GPT2, device="cpu")
    assert model.head is None and model.embed is not None and model.head_weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) + 29 * 22 == sum(
        p.numel() for p in build(dataclasses.replace(GPT2, tie_embeddings=False)).parameters()
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tile", [1, 4, 13, 50])
def test_mlp_in_tiles_changes_nothing(name: str, tile: int) -> None:
    model, x, labels = build(CONFIGS[name], device="cpu"), ids(13), ids(13, seed=1)
    grads = []
    for setting in (None, tile):
        model.mlp_tile = setting
        assert model.mlp_tile == setting
        grads.append([*torch.autograd.grad(model.loss(x, labels)[0], list(model.parameters())), model(x)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), grads[0][-1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mlp_tile must be positive or None, got 0"):
        model.mlp_tile = 0


def test_mlp_in_tiles_keeps_no_inner_activations() -> None:
    config = dataclasses.replace(BASE, mlp=MlpConfig(inner_size=501))
    mlp: Any = build(config, device="cpu").blocks[0].mlp
    x = torch.randn(1, 64, 22, requires_grad=True)
    kept, own = [], {p.untyped_storage().data_ptr() for p in mlp.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.numel())
        return t

    for tile, expected in ((None, 4 * 64 * 501), (8, 0)):
        kept.clear()
        mlp.tile = tile
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = mlp(x)
        assert sum(kept) == expected
        y.sum().backward()


def test_initial_weights() -> None:
    config = dataclasses.replace(BASE, vocab_size=997, hidden_size=101, init_std=0.05)
    model = build(config, device="cpu", seed=5)
    named = dict(model.named_parameters())
    assert named["embed.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert named["blocks.1.mixer.out.weight"].std().item() == pytest.approx(0.025, rel=0.05)
    assert named["blocks.1.mlp.up.weight"].std().item() == pytest.approx(0.05, rel=0.05)
    assert (named["norm.weight"] == 1).all()
    assert all((p == 0).all() for name, p in build(GPT2, device="cpu").named_parameters() if name.endswith("bias"))
    norms = {name: p for name, p in build(GEMMA, device="cpu").named_parameters() if "norm" in name}
    assert len(norms) == 9 and all((p == 0).all() for p in norms.values())
    rows = torch.cat([p.flatten()[:20] for p in named.values() if p.ndim == 2])
    assert rows.unique().numel() == rows.numel()
    # No row is another's copy, across the groups of rows that are drawn together.
    assert named["embed.weight"].unique(dim=0).shape[0] == 997


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    a, b = build(BASE, device="cpu", seed=5), build(BASE)
    b.to_empty(device="cpu")
    torch.manual_seed(99)
    init_weights(b, 5)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    deeper = dict(build(dataclasses.replace(BASE, num_layers=3), device="cpu", seed=5).named_parameters())
    assert torch.equal(deeper["blocks.1.mlp.up.weight"], dict(a.named_parameters())["blocks.1.mlp.up.weight"])
    other = build(BASE, device="cpu", seed=6)
    embeddings = [dict(model.named_parameters())["embed.weight"] for model in (a, other)]
    assert not torch.equal(*embeddings)
    low = dict(build(BASE, device="cpu", seed=5, dtype=torch.bfloat16).named_parameters())
    assert torch.equal(low["embed.weight"], embeddings[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_embeddings_factor_is_rounded_to_its_dtype(dtype: torch.dtype) -> None:
    seen: list[torch.Tensor] = []

    def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])

    for scale in (3072**0.5, 0.1, 1.0, 1e-3, 2**-9 * 257):
        model = build(dataclasses.replace(BASE, embed_scale=scale), device="cpu", dtype=dtype)
        model.blocks[0].register_forward_pre_hook(note)
        model(ids(5))
        assert model.embed is not None
        assert torch.equal(seen.pop(), model.embed(ids(5)) * torch.tensor(scale, dtype=torch.float64).to(dtype))


def test_meta_models_hold_nothing_and_say_so() -> None:
    model = build(BASE)
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    with pytest.raises(ValueError, match="to_empty"):
        init_weights(model, 0)


@pytest.mark.parametrize("config", [BASE, GEMMA])
def test_compiles_as_one_graph(config: DecoderConfig) -> None:
    torch._dynamo.reset()
    model = build(config, device="cpu")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids(9)), model(ids(9)))


def test_a_rank_without_tokens() -> None:
    # A sequence shorter than the ranks leaves some with nothing.
    class Empty:
        positions = torch.empty(0, dtype=torch.int64)

        def attend(self, q, k, v, **asked):
            return q

        def total(self, x):
            return x

    for name in CONFIGS:
        model = build(CONFIGS[name], device="cpu")
        model.mlp_tile = 4
        none = torch.empty(2, 0, dtype=torch.int64)
        assert model(none, Empty()).shape == (2, 0, 29)
        total, count = model.loss(none, none, Empty())
        total.backward()
        assert total == 0 and count == 0


def test_inputs_are_checked() -> None:
    model = build(GPT2, device="cpu")
    for wrong, words in (
        (torch.tensor([[3, 29]]), r"0\.\.28, got 29"),
        (torch.tensor([[3, -1]]), r"0\.\.28, got -1"),
        (torch.tensor([3, 4]), r"shape \(b, l\), got torch.int64 of \(2,\)"),
        (torch.ones(1, 3), "must be integers .*float32"),
        (torch.zeros(1, 20, dtype=torch.int64), "learned positions end at 18, got 19"),
    ):
        with pytest.raises(ValueError, match=words):
            model(wrong)
    with pytest.raises(ValueError, match=r"got \(6,\) positions for 5 tokens"):
        model(ids(5), LocalContext(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for name in CONFIGS:
        exact, model = build(CONFIGS[name], device="cpu"), build(CONFIGS[name], device="cpu", dtype=dtype)
        got = model(ids(7))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), exact(ids(7)), rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu(name: str) -> None:
    host, model = build(CONFIGS[name], device="cpu"), build(CONFIGS[name], device="cuda")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(host.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(model(ids(11).cuda()).cpu(), host(ids(11)), rtol=1e-4, atol=1e-4)
    low = build(CONFIGS[name], device="cuda", dtype=torch.bfloat16)
    low.loss(ids(11).cuda(), ids(11).cuda())[0].backward()
    assert isinstance(low, DecoderLM) and all(p.grad.isfinite().all() for p in low.parameters())  # pyright: ignore[reportOptionalMemberAccess]
