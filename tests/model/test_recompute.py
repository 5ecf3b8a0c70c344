"""Recomputation: equal gradients, and exactly the operators each mode promises are run again."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.mixers.config import AttentionConfig
from longspan.model.config import DecoderConfig, MlpConfig
from longspan.model.decoder import build
from longspan.model.recompute import SDPA_OPS, Recompute, apply_recompute

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LINEAR = torch.ops.aten.addmm.default
NUM_BLOCKS = 2


@torch.library.custom_op("longspan_test::attention", mutates_args=())
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention with the signature of the split one: a custom operator that returns (out, lse)."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)


@opaque.register_fake
def _(q, k, v, handle):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)


def _backward(ctx, dout, _dlse):
    q, k, v, out, lse = ctx.saved_tensors
    p = (torch.einsum("blhd,bmhd->bhlm", q, k) - lse[..., None]).exp()
    dp = torch.einsum("blhd,bmhd->bhlm", dout, v) - (dout * out).sum(-1).transpose(1, 2)[..., None]
    ds = p * dp
    return (
        torch.einsum("bhlm,bmhd->blhd", ds, k),
        torch.einsum("bhlm,blhd->bmhd", ds, q),
        torch.einsum("bhlm,blhd->bmhd", p, dout),
        None,
    )


opaque.register_autograd(_backward, setup_context=_save)
OPAQUE = torch.ops.longspan_test.attention.default


class Block(nn.Module):
    def __init__(self, custom):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.custom = custom

    def forward(self, x, ctx):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        if self.custom:
            attended = opaque(q, k, v, ctx)[0]
        else:
            attended = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
            ).transpose(1, 2)
        x = x + self.out(attended.flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, custom=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(custom) for _ in range(NUM_BLOCKS))

    def forward(self, x, ctx=3):
        for block in self.blocks:
            x = block(x, ctx)
        return x


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def gradients(model):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with Calls() as calls:
        model(x).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    model.zero_grad(set_to_none=True)
    return grads, calls.count


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(("mode", "attentions", "linears"), [("none", 1, 4), ("full", 2, 7), ("attention", 1, 7)])
def test_gradients_are_equal_and_only_the_promised_operators_run_again(mode, attentions, linears, custom):
    torch.manual_seed(0)
    model = Model(custom)
    want, _ = gradients(model)
    apply_recompute(model, mode, keep_ops=(*SDPA_OPS, OPAQUE))
    got, count = gradients(model)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=0, msg=name)
    assert count[OPAQUE if custom else FLASH] == attentions * NUM_BLOCKS
    # The recomputation stops once nothing more is needed: a block's last linear runs once.
    assert count[LINEAR] == linears * NUM_BLOCKS


def test_modes_replace_each_other_and_keep_names():
    model = Model()
    names = list(model.state_dict())
    modes: list[tuple[Recompute, int]] = [("full", 2), ("attention", 1), ("full", 2), ("none", 1)]
    for mode, attentions in modes:
        apply_recompute(model, mode)
        assert list(model.state_dict()) == names
        assert gradients(model)[1][FLASH] == attentions * NUM_BLOCKS
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_copy_of_the_model_runs_its_own_blocks():
    model = Model()
    apply_recompute(model, "attention")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.randn(1, 3, 8)
    assert torch.equal(twin(x), x) and not torch.equal(model(x), x)


def test_the_decoder_itself_has_equal_gradients_in_every_mode():
    config = DecoderConfig(
        num_layers=2,
        hidden_size=12,
        vocab_size=17,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=6, qk_norm_eps=1e-6),
        mlp=MlpConfig(inner_size=20),
    )
    ids = torch.randint(17, (2, 11), generator=torch.Generator().manual_seed(0))
    results = []
    modes: list[tuple[Recompute, int]] = [("none", 2), ("full", 4), ("attention", 2)]
    for mode, attentions in modes:
        model = build(config, device="cpu")
        apply_recompute(model, mode)
        with Calls() as calls:
            model.loss(ids, ids.roll(-1, 1))[0].backward()
        assert calls.count[FLASH] == attentions
        results.append([parameter.grad for parameter in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_compiled_in_one_graph():
    model = Model(custom=True)
    want, _ = gradients(model)
    apply_recompute(model, "attention", keep_ops=[OPAQUE])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    compiled(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])


def test_a_forward_of_somebody_else_stays():
    model = Model()
    model.blocks[0].forward = lambda x, ctx: 2 * x
    apply_recompute(model, "full")
    apply_recompute(model, "none")
    x = torch.randn(1, 3, 8)
    assert torch.equal(model.blocks[0](x, 3), 2 * x)


def test_attention_that_is_not_kept_is_refused_not_run_twice():
    model = Model(custom=True)
    apply_recompute(model, "attention")
    with pytest.raises(ValueError, match=r"kept nothing.*flash_attention.*keep_ops"):
        gradients(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 8))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="one of none, full, attention, got 'half'"):
        apply_recompute(Model(), "half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="blocks, got Linear"):
        apply_recompute(nn.Linear(1, 1), "full")
    with pytest.raises(ValueError, match="keep"):
        apply_recompute(Model(), "attention", keep_ops=())
