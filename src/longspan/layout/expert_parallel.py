"""Expert parallelism: rows go to the ranks that hold their experts and come back (GShard: Lepikhin et al. 2020,
arXiv:2006.16668, section 3; dropless as in MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

Experts are dealt out in neighbouring runs whose sizes differ by one at most, so that rows sorted by expert are sorted
by rank too. How many rows go where differs from rank to rank and from step to step: counts are exchanged first, and
the host waits for them.

Cost for r rows of width c on a rank of n: about r·c·(n-1)/n elements sent and as many received each way, forward, and
as many again backward; counts, 8·E·n bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from longspan.layout.tensor_parallel import all_gather_single
from longspan.layout.weights import Split, share


@dataclass(frozen=True, slots=True)
class ExpertSplit(Split):
    """One rank of an expert-parallel group."""

    def apply(
        self,
        experts: Callable[[Tensor, Tensor], Tensor],
        rows: Float[Tensor, "r c"],
        counts: Int64[Tensor, " e"],
    ) -> Float[Tensor, "r c"]:
        """``experts(rows, counts)``, of this rank's experts on the rows of all ranks, given back for its own rows.

        ``rows`` are sorted by expert, ``counts`` of them for each of all experts. Collective, with gradient.
        """
        if self.size == 1:
            return experts(rows, counts)
        flat = counts.new_empty(self.size * counts.shape[0])
        all_gather_single(flat, counts, group=self.group)
        table = flat.view(self.size, -1)
        runs = [share(counts.shape[0], self.size, rank) for rank in range(self.size)]
        mine = table[:, runs[self.rank].start : runs[self.rank].stop]
        sent = [int(n) for n in torch.stack([counts[run.start : run.stop].sum() for run in runs]).tolist()]
        got = [int(n) for n in mine.sum(1).tolist()]
        arrived = _AllToAll.apply(rows, sent, got, self.group)
        # From rank after rank, each sorted by expert: to expert after expert.
        numbers = torch.arange(mine.shape[1], device=rows.device).repeat(self.size)
        order = numbers.repeat_interleave(mine.flatten(), output_size=sum(got)).argsort(stable=True)
        done = experts(arrived[order], mine.sum(0))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return _AllToAll.apply(done[back], got, sent, self.group)  # type: ignore[no-any-return]


ALONE = ExpertSplit()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        out = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], ctx.got, ctx.sent, ctx.group), None, None, None
