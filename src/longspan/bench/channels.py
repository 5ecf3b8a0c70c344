"""Small exact checks of every way in which ranks exchange tensors, each a function of (group, device).

They use the package's own exchange, with integers, so that a single wrong byte is seen. A check returns what it has
shown in one line and raises ValueError with the first thing that was wrong.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention import masks
from longspan.attention.kernels import KERNELS, pick
from longspan.attention.kernels.contract import row_sums
from longspan.attention.masks import Mask
from longspan.bench.exact import Results, excess, formula, make_inputs
from longspan.context import attention, shard
from longspan.context.attend import world_and_rank
from longspan.context.exchange import Exchange, backend_for

# One byte, one row's statistics, what fits one packet, what does not, and a few megabytes; odd ones among them.
MESSAGE_BYTES = (1, 16, 4_096, 65_552, 1_048_577, 8_388_624)
_NUM_TOKENS = 101
_NUM_VALUES = 1_003  # per rank in a collective; no small world divides it

# torch 2.13 gave these collectives new names and warns at the old ones, which 2.11 has alone.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_masks() -> dict[str, Mask]:
    """The masks of the attention checks: packed documents, and a window."""
    return {
        "causal documents": masks.documents([60, 41]),
        "sliding window": masks.sliding_window(_NUM_TOKENS, 9, 4),
    }


def _expect(got: Tensor, expected: Tensor, what: str) -> None:
    expected = expected.to(got.device)
    if not torch.equal(got, expected):
        wrong = int((got != expected).sum())
        raise ValueError(f"{what}: {wrong} of {expected.numel()} values are wrong")


def _message(source: int, target: int, num_bytes: int) -> Tensor:
    """Bytes that say where they come from and go to, and where in the message they stand (251 is prime)."""
    start = 1 + 31 * source + 101 * target + num_bytes
    return (torch.arange(num_bytes, dtype=torch.int32).add_(start) % 251).to(torch.uint8)


def point_to_point(group: dist.ProcessGroup, device: torch.device) -> str:
    """Each pair of ranks, both directions at once: each size alone, then all sizes in flight together, in order."""
    world, rank = world_and_rank(group)
    others = [other for other in range(world) if other != rank]
    exchange = Exchange(group, device)
    for sizes in (*((size,) for size in MESSAGE_BYTES), MESSAGE_BYTES):
        sends = [(other, 0, _message(rank, other, size).to(device)) for other in others for size in sizes]
        empty = [(other, torch.zeros(size, dtype=torch.uint8, device=device)) for other in others for size in sizes]
        receives = [(other, 0, landing) for other, landing in empty]
        for arrived in exchange.post(sends, receives):
            arrived()
        exchange.finish()
        for other, _, got in receives:
            _expect(got, _message(other, rank, got.numel()), f"{got.numel()} bytes from rank {other}")
    largest = f"{MESSAGE_BYTES[-1] / 2**20:.0f} MiB"
    return f"{len(MESSAGE_BYTES)} sizes, {MESSAGE_BYTES[0]} B to {largest}, both directions at once"


def _values(rank: int, num: int, dtype: torch.dtype) -> Tensor:
    """Small integers: sums over a hundred ranks are exact, in bfloat16 too where there are few."""
    return ((torch.arange(num) * (rank + 1)) % 5).to(dtype)


def all_gather(group: dist.ProcessGroup, device: torch.device) -> str:
    """As lists and into one tensor."""
    world, rank = world_and_rank(group)
    dtypes = (torch.uint8, torch.int64, torch.float32, torch.bfloat16)
    for dtype in dtypes:
        mine = _values(rank, _NUM_VALUES, dtype).to(device)
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine, group=group)
        whole = torch.empty(world * _NUM_VALUES, dtype=dtype, device=device)
        _gather_single(whole, mine, group=group)
        expected = torch.cat([_values(other, _NUM_VALUES, dtype) for other in range(world)])
        _expect(torch.cat(parts), expected, f"all_gather of {dtype}")
        _expect(whole, expected, f"all_gather of {dtype} into one tensor")
    return _names(dtypes)


def reduce_scatter(group: dist.ProcessGroup, device: torch.device) -> str:
    """Sums, as FSDP takes them of gradients."""
    world, rank = world_and_rank(group)
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        whole = _values(rank, world * _NUM_VALUES, dtype).to(device)
        part = torch.empty(_NUM_VALUES, dtype=dtype, device=device)
        _scatter_single(part, whole, group=group)
        total = torch.stack([_values(other, world * _NUM_VALUES, dtype) for other in range(world)]).sum(0)
        _expect(part, total[rank * _NUM_VALUES :][:_NUM_VALUES], f"reduce_scatter of {dtype}")
    return _names(dtypes)


def all_reduce(group: dist.ProcessGroup, device: torch.device) -> str:
    """Sums and maxima."""
    world, rank = world_and_rank(group)
    dtypes = (torch.int64, torch.float32, torch.bfloat16)
    for dtype in dtypes:
        every = torch.stack([_values(other, _NUM_VALUES, dtype) for other in range(world)])
        for op, expected in ((dist.ReduceOp.SUM, every.sum(0)), (dist.ReduceOp.MAX, every.amax(0))):
            mine = every[rank].clone().to(device)
            dist.all_reduce(mine, op=op, group=group)
            _expect(mine, expected.to(dtype), f"all_reduce of {dtype}")
    return f"sum and maximum of {_names(dtypes)}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def split_attention(group: dist.ProcessGroup, device: torch.device) -> str:
    """Attention over the ranks, forward and backward, against one process in float64."""
    low = torch.float32 if device.type == "cpu" else torch.bfloat16
    worst = 0.0
    for name, mask in check_masks().items():
        for dtype in (torch.float64, low):
            inputs = make_inputs(mask.num_tokens, dtype=dtype)
            plain, exact = formula(inputs, mask.dense()), formula(inputs.to(torch.float64), mask.dense())
            q, k, v, dout = (shard(x.to(device), mask, group) for x in inputs)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            out = attention(q, k, v, mask=mask, group=group)
            got = Results(out.detach(), *torch.autograd.grad(out, (q, k, v), dout))
            off = excess(got, *([shard(x, mask, group) for x in results] for results in (exact, plain)))
            if not off <= 1:
                raise ValueError(f"{name} in {dtype}: {off:.1f} times the error allowed against float64")
            worst = max(worst, off)
    staged = device.type == "cuda" and backend_for(group, device) != "nccl"
    way = ", through pinned memory" if staged else ""
    return f"forward and gradients equal float64{way} ({worst:.2f} of the error allowed)"


def kernel(name: str, device: torch.device) -> str:
    """One block kernel on a device against float64, forward and backward, in each dtype that it takes.

    Raises ValueError where it is wrong, or takes no dtype on this device.
    """
    shown: list[torch.dtype] = []
    worst = 0.0
    for dtype, (mask_name, mask) in product((torch.float64, torch.float32, torch.bfloat16), check_masks().items()):
        inputs = make_inputs(mask.num_tokens, dtype=dtype)
        q, k, v, dout = inputs.to(device)
        if KERNELS[name]().supports(q, k, v, softcap=None) is not None:
            continue
        chosen, scale = pick(q, softcap=None, name=name), q.shape[3] ** -0.5
        out, lse = chosen.forward(q, k, v, mask.bands, scale=scale, softcap=None)
        grads = chosen.backward(dout, q, k, v, lse, row_sums(dout, out), mask.bands, scale=scale, softcap=None)
        plain, exact = formula(inputs, mask.dense()), formula(inputs.to(torch.float64), mask.dense())
        off = excess((out, *grads), exact, plain)
        if not off <= 1:
            raise ValueError(f"{mask_name} in {dtype}: {off:.1f} times the error allowed against float64")
        worst = max(worst, off)
        if dtype not in shown:
            shown.append(dtype)
    if not shown:
        raise ValueError(f"kernel {name!r} takes neither float64, float32 nor bfloat16 on {device.type}; try another")
    return f"{_names(tuple(shown))} equal float64 ({worst:.2f} of the error allowed)"
