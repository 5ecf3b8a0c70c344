"""Grouped products on a GPU: as good as single ones in the same precision, also where loads are odd or none."""

from __future__ import annotations

import pytest
import torch

from longspan.model import moe as module
from longspan.model.config import MoeConfig
from longspan.model.moe import Moe

pytestmark = pytest.mark.gpu
CONFIG = MoeConfig(num_experts=7, experts_per_token=3, inner_size=48, balance="bias")


def run(dtype: torch.dtype, grouped: bool, width: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    mixture = Moe(CONFIG, width)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2).bfloat16())
    assert mixture.selection_bias is not None
    mixture.selection_bias[2] = -100.0  # nobody's choice
    mixture = mixture.cuda().to(dtype)
    x = torch.randn(3, 37, width).bfloat16().cuda().to(dtype).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        made = module._grouped
        patch.setattr(module, "_grouped", lambda counts: calls.append(0) or made(counts))
        out, routing = mixture(x)
        assert len(calls) == grouped and routing.counts[2] == 0
    out.float().square().sum().backward()
    grads = [p.grad for p in (x, *mixture.parameters())]
    assert all(grad is not None for grad in grads)
    return [tensor.detach().double() for tensor in (out, *grads) if tensor is not None]


@pytest.mark.parametrize("width", [64, 40])
def test_grouped_products_are_as_good_as_single_ones(width: int) -> None:
    exact = run(torch.float64, False, width)
    grouped = run(torch.bfloat16, True, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_can_group", lambda *_: False)
        single = run(torch.bfloat16, False, width)
    for want, a, b in zip(exact, grouped, single, strict=True):
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + 1e-3 * want.abs().max()


def test_sizes_that_do_not_suit_go_one_by_one() -> None:
    exact = run(torch.float64, False, 36)
    for want, got in zip(exact, run(torch.bfloat16, False, 36), strict=True):
        assert (got - want).abs().max() <= 0.05 * want.abs().max()
