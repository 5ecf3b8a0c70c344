"""The passes over weights and moments against torch's AdamW; their kernels on a GPU in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longspan.train.adamw import Hyper, adamw_, adamw_rounded_, round_step, take_back
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
        masters.update(mine, torch.tensor(0.25, dtype=torch.float64, device=device))
        masters.drop_gradients()
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


HYPER = Hyper(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, factor=torch.tensor(0.5).double(), step=7)


def drawn(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weight, gradient and moments, values of bf16 each."""
    generator = torch.Generator().manual_seed(0)
    weight, grad, average = (torch.randn(size, generator=generator).bfloat16() for _ in range(3))
    return [weight, grad.to(dtype), average, torch.rand(size, generator=generator).bfloat16()]


def _neighbours(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of bf16 towards zero, or there, and away from it."""
    low = wide.view(torch.int32) & -(2**16)
    return low.view(torch.float32), (low + 2**16).view(torch.float32)


def rounds_to_neighbours(device: str, size: int, dtype: torch.dtype) -> None:
    """Each result is one of the two values of bf16 around what fp32 gives, and, of many, in the right share."""
    given = drawn(size, dtype)
    weight, grad, average, square = (x.float() for x in given)
    adamw_(weight, torch.zeros(size), grad, average, square, HYPER)
    # What lies behind must stay: sizes are seldom those of a kernel's blocks.
    behind = [torch.zeros(size + 64, dtype=torch.bfloat16, device=device) for _ in range(3)]
    found = [tail[:size].copy_(x) for tail, x in zip(behind, (given[0], *given[2:]), strict=True)]
    adamw_rounded_(found[0], given[1].to(device), found[1], found[2], HYPER, seed=3)
    for tail, got, exact in zip(behind, found, (weight, average, square), strict=True):
        assert not tail[size:].any()
        got = got.float().cpu()
        low, high = _neighbours(exact)
        # fp32 of two devices differs in its last digits.
        slack = 1e-5 * exact.abs() + 1e-7
        assert (_neighbours(exact - slack)[0].minimum(_neighbours(exact - slack)[1]) <= got).all()
        assert (_neighbours(exact + slack)[0].maximum(_neighbours(exact + slack)[1]) >= got).all()
        expected = ((exact - low) / (high - low)).double()
        carried = (got.abs() > (low.abs() + high.abs()) / 2).double()
        if size > 2**15:
            assert abs(carried.mean() - expected.mean()) <= 5 * (expected * (1 - expected)).sum().sqrt() / size
            # Chances far apart are told apart: not a coin for all.
            rare = expected < 0.1
            assert carried[rare].mean() < 0.15 and carried[expected > 0.9].mean() > 0.85


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.bfloat16), (2**16 + 5, torch.bfloat16), (4099, torch.float32)])
def test_a_rounded_step_is_near_that_of_fp32(size: int, dtype: torch.dtype) -> None:
    rounds_to_neighbours("cpu", size, dtype)


def test_chance_is_of_the_seed_and_of_each_number() -> None:
    found = []
    for seed in (3, 3, 4):
        weight, grad, average, square = drawn(5000, torch.bfloat16)
        adamw_rounded_(weight, grad, average, square, HYPER, seed)
        found.append((weight, average, square))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def nothing_happens(device: str) -> None:
    """A factor that is NaN: neither weights, moments nor the count of steps change, in either pass."""
    nan = torch.tensor(torch.nan, dtype=torch.float64, device=device)
    ones = torch.ones((), dtype=torch.float64, device=device)
    weight = nn.Parameter(torch.ones(4099, dtype=torch.bfloat16, device=device))
    rounded = torch.optim.AdamW([weight], lr=0.01)
    net = Net().to(device)
    masters = MasterWeights(net, torch.bfloat16, keep_frozen=False)
    wide = torch.optim.AdamW(net.layer.parameters(), lr=0.01)

    def step(factor: torch.Tensor) -> None:
        weight.grad = torch.full_like(weight, 0.5)
        round_step(rounded, factor, seed=0)
        masters.work()
        net.layer(torch.ones(1, 7, dtype=torch.bfloat16, device=device)).square().sum().backward()
        masters.update(wide, factor)

    def values() -> list[torch.Tensor]:
        states = [optimizer.state[p] for optimizer in (rounded, wide) for p in optimizer.state]
        kept = [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
        return [x.detach().clone() for x in (weight, *net.parameters(), *kept)]

    for taken in range(2):
        before = values()
        step(nan)
        take_back(rounded, lambda p: p.grad)
        masters.take_back(wide)
        assert all(torch.equal(a, b) for a, b in zip(before, values(), strict=True)), taken
        gradient = net.layer.weight.grad
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.any(), "for whoever looks at them"
        masters.drop_gradients()
        step(ones)
        masters.drop_gradients()
        assert not torch.equal(before[0], weight)


def test_a_step_with_no_number_is_none() -> None:
    nothing_happens("cpu")


def test_small_updates_and_a_slow_decay_are_not_lost() -> None:
    """Rounded to the nearest, a weight of 1 never takes steps of 1/1000, nor a second moment a decay of 1/1000."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    reference = nn.Parameter(torch.ones(64, 64))
    wide = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(200):
        grad = 1.0 if step == 0 else 1e-3
        weight.grad = torch.full_like(weight, grad)
        reference.grad = torch.full_like(reference, grad)
        round_step(optimizer, torch.ones((), dtype=torch.float64), seed=0)
        wide.step()
    moved = 1 - float(reference.detach().mean())
    assert moved > 0.005 and abs(1 - float(weight.detach().float().mean()) - moved) < 0.05 * moved
    second, exact = (o.state[p]["exp_avg_sq"].float().mean() for o, p in ((optimizer, weight), (wide, reference)))
    assert exact < 0.9e-3 and abs(second - exact) < 0.01 * exact
    nearest = torch.ones(1, dtype=torch.bfloat16)
    assert nearest - 1e-3 == nearest and nearest * 0.999 == nearest, "what this is about"
