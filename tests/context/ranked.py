"""What ranks do in the tests of ``run``: top-level functions, so that a rank can import them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.masks import Mask, causal, full
from longspan.context import attention, shard, unshard
from longspan.context.engine import Worker
from longspan.layout.tokens import make_layout
from tests.context.cases import inputs


@dataclass(frozen=True)
class Case:
    """One attention: a mask, heads, and how it is split."""

    mask: Mask
    num_heads: int
    num_kv_heads: int
    method: str
    layout: str
    batch: int = 1
    softcap: float | None = None
    dtype: torch.dtype = torch.float64
    kernel: str = "reference"


def attend_locally(case: Case, tensors: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The local output for local q, k, v."""
    q, k, v = tensors
    return attention(
        q,
        k,
        v,
        mask=case.mask,
        group=group,
        method=case.method,
        layout=case.layout,
        scale=0.7,
        softcap=case.softcap,
        kernel=case.kernel,
    )


def split(case: Case, group: dist.ProcessGroup) -> tuple[list[Tensor], Tensor]:
    """Local q, k, v (leaves) and the local gradient of the output."""
    whole = inputs(case.mask.num_tokens, case.num_heads, case.num_kv_heads, b=case.batch)
    local = [shard(x.to(case.dtype), case.mask, group, layout=case.layout) for x in whole]
    return [x.requires_grad_() for x in local[:3]], local[3]


def joined(case: Case, tensors: list[Tensor], group: dist.ProcessGroup) -> list[np.ndarray]:
    return [unshard(x.detach(), case.mask, group, layout=case.layout).numpy() for x in tensors]


def results(rank: int, world: int, cases: list[Case]) -> list[list[np.ndarray]]:
    """Global out, dq, dk, dv of every case."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for case in cases:
        leaves, dout = split(case, group)
        out = attend_locally(case, leaves, group)
        out.backward(dout)
        found.append(joined(case, [out, *(x.grad for x in leaves if x.grad is not None)], group))
    return found if rank == 0 else []


def delayed_results(rank: int, world: int, cases: list[Case], seed: int = 0) -> list[list[np.ndarray]]:
    """The same, with every rank sleeping before blocks and landings as it likes."""
    pause = random.Random(f"{rank} {seed}")
    for name in ("compute", "arrive", "outgoing"):
        _slow_down(name, pause)
    return results(rank, world, cases)


def _slow_down(name: str, pause: random.Random) -> None:
    original: Callable = getattr(Worker, name)

    def slowly(self, *args):
        time.sleep(pause.choice((0, 0, 0.001, 0.01)))
        return original(self, *args)

    setattr(Worker, name, slowly)


def two_at_once(rank: int, world: int, first: Case, second: Case) -> list[list[np.ndarray]]:
    """Two attentions whose backward passes run in one, one feeding the other's queries too."""
    group = dist.group.WORLD
    assert group is not None
    a, dout = split(first, group)
    b, other = split(second, group)
    x = attend_locally(first, a, group)
    y = attend_locally(second, b, group)
    ((x * dout).sum() + (y * other).sum()).backward()
    grads = [[leaf.grad for leaf in leaves if leaf.grad is not None] for leaves in (a, b)]
    return [joined(case, [out, *grad], group) for case, out, grad in ((first, x, grads[0]), (second, y, grads[1]))]


def refusal(rank: int, world: int, how: str) -> tuple[str, float]:
    """The message with which a rank refuses, and how long that took; the last rank is the odd one."""
    group = dist.group.WORLD
    odd = rank == world - 1
    mask = full(8) if odd and how == "mask" else causal(9) if odd and how == "length" else causal(8)
    layout = "striped" if odd and how == "layout" else "contiguous"
    method = "zigzag" if odd and how == "method" else "ring"
    q = torch.zeros(2 if odd and how == "batch" else 1, 8 // world, 2, 4)
    k = torch.zeros(q.shape[0], 8 // world, {"heads": 1, "uneven heads": 3}.get(how, 2) if odd else 2, 4)
    settings = {"scale": 0.5 if odd and how == "scale" else 1.0, "softcap": -1.0 if odd and how == "softcap" else None}
    whole = make_layout(layout, 8, world)
    started_s = time.monotonic()
    try:
        attention(q, k, k, mask=mask, group=group, method=method, layout=whole, **settings)
    except ValueError as error:
        return str(error), time.monotonic() - started_s
    return "", time.monotonic() - started_s


def round_trips(rank: int, world: int, layouts: tuple[str, ...]) -> bool:
    """shard and unshard invert each other for every layout, length, dim and dtype."""
    group = dist.group.WORLD
    for layout in layouts:
        for num_tokens in (1, 2, 5, 13):
            mask = causal(num_tokens)
            sizes = []
            for dim, shape in (
                (1, (2, num_tokens, 3)),
                (0, (num_tokens,)),
                (2, (1, 2, num_tokens)),
                (-1, (2, num_tokens)),
            ):
                for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
                    x = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                    local = shard(x, mask, group, dim=dim, layout=layout)
                    own = make_layout(layout, num_tokens, world).positions(rank)
                    assert torch.equal(local, x.index_select(dim, torch.from_numpy(own)))
                    back = unshard(local, mask, group, dim=dim, layout=layout)
                    assert back.dtype == dtype and torch.equal(back, x)
                    sizes.append(local.shape[dim])
            assert len(set(sizes)) == 1
    return True


def shard_gradient(rank: int, world: int) -> np.ndarray:
    """The gradient of the sum of squares of this rank's tokens, on the global tensor."""
    x = torch.arange(7, dtype=torch.float64).requires_grad_()
    shard(x, causal(7), dist.group.WORLD, dim=0, layout="zigzag").square().sum().backward()
    assert x.grad is not None
    return x.grad.numpy()
