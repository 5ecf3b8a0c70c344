"""The one pass over master, moments and working copy against torch's AdamW; its kernel on a GPU in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longspan.train.precision import MasterWeights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(7, 5), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)


def steps_of_both(device: str, num_micros: int) -> tuple[Net, Net, list[torch.Tensor]]:
    """Three clipped steps by `MasterWeights.update` and by torch, with different rates; both models, and the copies."""
    torch.manual_seed(0)
    ours, theirs = Net().to(device), Net().to(device)
    theirs.load_state_dict(ours.state_dict())
    masters = MasterWeights(ours, torch.bfloat16, keep_frozen=False)
    groups = [
        [{"params": [net.layer.weight], "weight_decay": 0.1}, {"params": [net.layer.bias], "weight_decay": 0.0}]
        for net in (ours, theirs)
    ]
    mine, reference = (torch.optim.AdamW(group, lr=1.0, betas=(0.8, 0.95)) for group in groups)
    for step in range(3):
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] = 0.01 * (step + 1)
        for micro in range(num_micros):
            masters.work()
            x = torch.full((1, 7), 0.5 + step + 2.0**-8 * micro, dtype=torch.bfloat16, device=device)
            ours.layer(x).square().sum().backward()
            grads = [p.grad for p in ours.layer.parameters()]
            for p, grad in zip(theirs.layer.parameters(), grads, strict=True):
                assert grad is not None
                if p.grad is None or num_micros == 1:
                    p.grad = grad.float().clone()
                else:
                    p.grad += grad.float()
            if num_micros > 1:
                masters.settle()
        for p in theirs.layer.parameters():
            assert p.grad is not None
            p.grad *= 0.25
        masters.update(mine, 0.25)
        reference.step()
        reference.zero_grad()
        assert all(p.grad is None and p.dtype == torch.float32 for p in ours.layer.parameters())
    masters.work()
    copies = [p.detach().clone() for p in ours.layer.parameters()]
    masters.settle()
    for p, q in zip(ours.layer.parameters(), theirs.layer.parameters(), strict=True):
        for key, value in reference.state[q].items():
            torch.testing.assert_close(mine.state[p][key], value, rtol=1e-5, atol=1e-7, check_device=False)
    return ours, theirs, copies


@pytest.mark.parametrize("num_micros", [1, 3])
def test_a_step_is_that_of_torch(num_micros: int) -> None:
    ours, theirs, copies = steps_of_both("cpu", num_micros)
    for p, q, copy in zip(ours.layer.parameters(), theirs.layer.parameters(), copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, p.bfloat16())
    assert ours.frozen.weight.dtype == torch.bfloat16, "nobody saves what is not trained"


def test_copies_follow_masters_that_somebody_else_changed() -> None:
    net = Net()
    masters = MasterWeights(net, torch.bfloat16, keep_frozen=False)
    masters.work()
    masters.settle()
    with torch.no_grad():
        net.layer.weight.fill_(3)
    net.load_state_dict({**net.state_dict(), "layer.bias": torch.full((5,), 2.0)})
    masters.work()
    assert (net.layer.weight == 3).all() and (net.layer.bias == 2).all()
