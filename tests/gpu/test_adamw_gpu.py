"""The Triton passes of AdamW against torch's, on CUDA."""

from __future__ import annotations

import pytest
import torch

from longspan.train.adamw import Hyper, adamw_, adamw_rounded_
from tests.train.test_adamw import HYPER, drawn, nothing_happens, rounds_to_neighbours, steps_of_both

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_micros", [1, 3])
def test_a_step_is_that_of_torch(num_micros: int) -> None:
    ours, theirs, copies = steps_of_both("cuda", num_micros)
    for p, q, copy in zip(ours.layer.parameters(), theirs.layer.parameters(), copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, p.bfloat16())


@pytest.mark.parametrize("size", [1, 2047, 2048 * 3 + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_size_is_as_on_the_host(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(size, generator=generator) for _ in range(3)]
    host.append(torch.rand(size, generator=generator))
    master, grad, average, square = host
    hyper = Hyper(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, factor=HYPER.factor, step=7)
    there = [x.cuda() for x in (master, grad.to(dtype), average, square)]
    guard = torch.zeros(size + 64, dtype=torch.bfloat16, device="cuda")
    adamw_(there[0], guard[:size], there[1], there[2], there[3], hyper)
    copy = torch.zeros(size, dtype=torch.bfloat16)
    adamw_(master, copy, grad.to(dtype), average, square, hyper)
    for found, expected in zip((there[0], there[2], there[3]), (master, average, square), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(guard[:size], there[0].bfloat16()) and not guard[size:].any()


@pytest.mark.parametrize("size", [1, 2047, 2048 * 3 + 5, 2**16 + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_by_chance_is_as_on_the_host(size: int, dtype: torch.dtype) -> None:
    rounds_to_neighbours("cuda", size, dtype)


def test_a_step_with_no_number_is_none() -> None:
    nothing_happens("cuda")


def test_chance_on_a_gpu_is_of_the_seed() -> None:
    found = []
    for seed in (3, 3, 4):
        weight, grad, average, square = (x.cuda() for x in drawn(5000, torch.bfloat16))
        adamw_rounded_(weight, grad, average, square, HYPER, seed)
        found.append(weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
