"""Gather and scatter of tokens over tensor ranks: what they give, and that each is the other's backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.layout.tensor_parallel import WHOLE, TensorSplit, sum_over
from tests.ranks import run_ranks


def one_rank(rank: int, world: int, num_tokens: int, rows: int) -> Any:
    split = TensorSplit(rank, world, dist.group.WORLD)
    generator = torch.Generator().manual_seed(7)
    partial = torch.randn(world, rows, num_tokens, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(rows, num_tokens, 3, dtype=torch.float64, generator=generator)
    mine = partial[rank].clone().requires_grad_()
    own = split.scatter(mine)
    everything = split.gather(own, num_tokens)
    # All ranks compute the same number: the gradient of one of them counts.
    (everything * weight).sum().div(world).backward()
    positions = split.own(torch.arange(1, num_tokens + 1))
    return own.detach(), everything.detach(), mine.grad, positions, partial.sum(0), weight


@pytest.mark.parametrize(("world", "num_tokens"), [(2, 8), (3, 7), (4, 5), (4, 2)])
@pytest.mark.parametrize("rows", [1, 2])
def test_scatter_and_gather(world: int, num_tokens: int, rows: int) -> None:
    results = run_ranks(one_rank, world, num_tokens, rows)
    total, weight = results[0][4:]
    count = -(-num_tokens // world)
    padded = torch.zeros(rows, count * world, 3, dtype=torch.float64)
    padded[:, :num_tokens] = total
    for rank, (own, everything, grad, positions, _, _) in enumerate(results):
        torch.testing.assert_close(own, padded[:, rank * count : (rank + 1) * count])
        torch.testing.assert_close(everything, total)
        torch.testing.assert_close(grad, weight)
        numbers = [n if n <= num_tokens else 0 for n in range(rank * count + 1, (rank + 1) * count + 1)]
        assert positions.tolist() == numbers


def test_one_rank_sends_nothing() -> None:
    x = torch.randn(2, 5, 3)
    assert WHOLE.gather(x, 5) is x and WHOLE.scatter(x) is x and WHOLE.own(x) is x
    assert WHOLE.share(7) == range(7) and WHOLE.tokens(5) == 5


def add(rank: int, world: int) -> list[torch.Tensor]:
    parameters = [
        torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in ((3, torch.float32), (2, torch.float64))
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, rank + 1.0)
    sum_over(dist.group.WORLD, parameters)  # type: ignore[arg-type]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def test_gradients_are_added_whatever_their_dtype() -> None:
    for grads in run_ranks(add, 3):
        assert [grad.tolist() for grad in grads] == [[6.0] * 3, [6.0] * 2]
