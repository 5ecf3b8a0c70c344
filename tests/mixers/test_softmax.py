"""The softmax mixer against a plain float64 formula: groupings, norms, biases, positions, windows, context."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from longspan.mixers import flops
from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.mixers.contract import Context
from longspan.mixers.rotary import Rotary
from longspan.mixers.softmax import Attention
from longspan.model.local import LocalContext

C = 11
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Torch's counter knows the kernels of GPUs only.
CPU_FLASH = {FLASH: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}


def plain(mixer: Attention, x: Tensor, *, positions: Tensor, window: int | None) -> Tensor:
    """The formula, one head and one query at a time; rotation as multiplication of complex numbers."""
    config = mixer.config
    d, groups = config.head_dim, config.num_heads // config.kv_heads
    weights = {name: p.detach() for name, p in mixer.named_parameters()}

    def project(name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()).double())
        y = y.reshape(*x.shape[:2], -1, d)
        if name != "v" and config.qk_norm_eps is not None:
            y = y / (y.pow(2).mean(-1, keepdim=True) + config.qk_norm_eps).sqrt() * weights[f"{name}_norm.weight"]
        if name != "v" and mixer.rotary is not None:
            theta = mixer.rotary.config.theta
            angle = positions[:, None].double() * theta ** (-torch.arange(0, d, 2).double() / d)
            z = torch.complex(y[..., : d // 2], y[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
            y = torch.cat((z.real, z.imag), -1)
        return y

    q, k, v = (project(name) for name in "qkv")
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(config.num_heads):
            scores = torch.einsum("bd,bkd->bk", q[:, i, h], k[:, first : i + 1, h // groups])
            scores = scores * (config.scale or 1 / math.sqrt(d))
            if config.softcap is not None:
                scores = config.softcap * torch.tanh(scores / config.softcap)
            out[:, i, h] = torch.einsum("bk,bkd->bd", scores.softmax(-1), v[:, first : i + 1, h // groups])
    bias = weights.get("out.bias", torch.zeros(()).double())
    return out.flatten(2) @ weights["out.weight"].T + bias


CASES = {
    "multi-head": (AttentionConfig(num_heads=3, head_dim=4), None, True),
    "grouped qk-norm": (AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4, qk_norm_eps=1e-3), None, True),
    "multi-query biases": (
        AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=5, qkv_bias=True, out_bias=True),
        None,
        False,
    ),
    "window": (AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qkv_bias=True), 3, True),
    "softcap scale": (AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, softcap=0.7, scale=1.3), None, True),
    "window softcap": (AttentionConfig(num_heads=2, head_dim=4, softcap=0.7), 2, False),
}


def make(name: str) -> tuple[Attention, Tensor]:
    config, window, rotated = CASES[name]
    rotary = Rotary(RotaryConfig(theta=50.0), config.head_dim) if rotated else None
    mixer = Attention(config, C, layer=0, window=window, rotary=rotary).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return mixer, torch.randn(2, 7, C, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_formula(name: str) -> None:
    mixer, x = make(name)
    got = mixer(x, LocalContext(7))
    want = plain(mixer, x, positions=torch.arange(7), window=mixer.window)
    # Rotary frequencies are fp32 even in a float64 model.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 if mixer.rotary else 1e-12)
    assert want.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    mixer, x = make(name)
    x = x[:1, :5].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixer(x, LocalContext(5)), (x,), fast_mode=True)
    mixer(x, LocalContext(5)).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_the_window_bites() -> None:
    mixer, x = make("window")
    full = plain(mixer, x, positions=torch.arange(7), window=None)
    assert (mixer(x, LocalContext(7)) - full).abs().max() > 1e-2
    mixer.window = 7
    torch.testing.assert_close(mixer(x, LocalContext(7)), full, rtol=0, atol=2e-6)


class Recording:
    """A context that notes what it is asked."""

    positions = torch.tensor([0, 1, 0, 1, 2, 3, 0])

    def attend(self, q, k, v, **asked):
        self.shapes = [tuple(x.shape) for x in (q, k, v)]
        self.asked = asked
        self.q = q
        return q

    def total(self, x):
        return x


def test_asks_its_context_and_takes_positions_from_it() -> None:
    ctx = Recording()
    assert isinstance(ctx, Context) and isinstance(LocalContext(3), Context)
    config = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4, scale=0.3, softcap=9.0)
    mixer = Attention(config, C, layer=5, window=4, rotary=Rotary(RotaryConfig(), 4))
    x = torch.randn(1, 1, C).expand(1, 7, C)
    mixer(x, ctx)
    assert ctx.shapes == [(1, 7, 6, 4), (1, 7, 2, 4), (1, 7, 2, 4)]
    assert ctx.asked == {"layer": 5, "window": 4, "scale": 0.3, "softcap": 9.0}
    # Equal tokens: q differs where positions do, and only there.
    torch.testing.assert_close(ctx.q[:, 0], ctx.q[:, 2])
    assert (ctx.q[:, 0] - ctx.q[:, 1]).abs().max() > 1e-3


def test_flops_and_parameters() -> None:
    for name in ("multi-head", "grouped qk-norm", "multi-query biases"):
        mixer, x = make(name)
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            mixer(x, LocalContext(7))
        # Torch counts attention as dense, whatever its mask.
        expected = flops.projection_flops(mixer.config, C, 14) + flops.attend_flops(mixer.config, 2 * 7 * 7)
        assert counter.get_total_flops() == expected
        assert flops.num_parameters(mixer.config, C) == sum(p.numel() for p in mixer.parameters())


def test_a_local_context_is_of_one_length() -> None:
    q = torch.randn(1, 7, 2, 4)
    with pytest.raises(ValueError, match="own 6 tokens, got q of 7"):
        LocalContext(6).attend(q, q, q, layer=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"multiple of num_kv_heads, got \(4, 3\)"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"num_heads": 1, "softcap": 0.0}, "softcap must be positive"),
        ({"num_heads": 1, "qk_norm_eps": 0.0}, "qk_norm_eps must be positive"),
    ],
)
def test_configs_without_meaning_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionConfig(head_dim=4, **values)  # pyright: ignore[reportArgumentType]
