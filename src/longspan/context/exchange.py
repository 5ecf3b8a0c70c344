"""How a step's messages travel: gloo, NCCL, or gloo staged through pinned host memory for CUDA tensors.

Receives are posted before sends: gloo serialises the two directions otherwise. NCCL takes one batch per step and lane,
at most 256 operations, in the order of the global list on every rank; each lane has a communicator of its own, since
what was posted on one is done in order. gloo cannot read CUDA memory and NCCL refuses two ranks on one card, so ranks
that share a GPU send through pinned host buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[int, int, Tensor]  # peer (rank in the group), lane, flat uint8 tensor
Sending = list[tuple[list[dist.Work], Tensor]]  # what is on its way, kept alive until its works are done
Posted = tuple[list[Callable[[], None]], Sending]
_BATCH_LIMIT = 256  # more operations in one NCCL batch can hang (pytorch issue 174288)


def backend_for(group: dist.ProcessGroup, device: torch.device) -> str:
    """The back end of a group for tensors of a device: "gloo", "nccl", or "none" where it has none."""
    config = dist.get_backend_config(group)
    table = dict(item.split(":") for item in str(config).split(",")) if ":" in str(config) else {}
    return table.get(device.type, str(config) if not table else "none")


class Exchange:
    """Posts messages on a process group and waits for them.

    Raises ValueError where the group can serve the device neither directly nor through host memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        backend = backend_for(group, device)
        self.nccl = backend == "nccl"
        self.staged = device.type == "cuda" and not self.nccl
        if self.staged and backend_for(group, torch.device("cpu")) != "gloo":
            raise ValueError(
                f"a process group for CUDA tensors needs NCCL, or gloo to stage through host memory, got {backend!r}"
            )
        self._sending: dict[int, Sending] = {}  # by the post after which they are waited for
        self._posts = 0

    def post(
        self, sends: Sequence[Message], receives: Sequence[Message], spans: Sequence[int] = ()
    ) -> list[Callable[[], None]]:
        """Start all messages of one step; returns for each receive a function that waits until its bytes are there.

        ``spans``: for each send, the steps that it may be under way, 1 by default. What was posted so many steps ago is
        let go: kept to the end, a ring would hold every rank's keys. Every rank posts a step before it waits for an
        earlier one, so this waits for no more than a slow neighbour.
        """
        waits: list[Callable[[], None]] = []
        if sends or receives:
            post = self._post_nccl if self.nccl else self._post_gloo
            waits, sending = post(sends, receives)
            for sent, span in zip(sending, spans or repeat(1), strict=False):
                self._sending.setdefault(self._posts + span, []).append(sent)
        _finish(self._sending.pop(self._posts, []))
        self._posts += 1
        return waits

    def _post_gloo(self, sends: Sequence[Message], receives: Sequence[Message]) -> Posted:
        waits = []
        for peer, _, target in receives:
            landing = torch.empty(target.shape, dtype=target.dtype, pin_memory=True) if self.staged else target
            work = dist.irecv(landing, group=self.group, group_src=peer)
            assert work is not None
            waits.append(_waiter([work], target, landing if self.staged else None))
        sending: Sending = []
        for peer, _, source in sends:
            if self.staged:
                source = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source)
            work = dist.isend(source, group=self.group, group_dst=peer)
            assert work is not None
            sending.append(([work], source))
        return waits, sending

    def _post_nccl(self, sends: Sequence[Message], receives: Sequence[Message]) -> Posted:
        works: dict[int, list[dist.Work]] = {}
        for lane in sorted({lane for _, lane, _ in (*sends, *receives)}):
            group = lane_group(self.group, lane)
            ops = [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, at, t in receives if at == lane]
            ops += [dist.P2POp(dist.isend, t, group=group, group_peer=peer) for peer, at, t in sends if at == lane]
            if len(ops) > _BATCH_LIMIT:
                raise ValueError(
                    f"a step may post at most {_BATCH_LIMIT} messages per rank on NCCL, got {len(ops)}; use a ring"
                )
            works[lane] = dist.batch_isend_irecv(ops)  # coalesced: works do not match ops one to one
        sending = [(works[lane], t) for _, lane, t in sends]
        return [_waiter(works[lane], target, None) for _, lane, target in receives], sending

    def finish(self) -> None:
        """Wait until everything posted has been sent."""
        for sending in self._sending.values():
            _finish(sending)
        self._sending.clear()


@lru_cache(maxsize=64)
def lane_group(group: dist.ProcessGroup, lane: int) -> dist.ProcessGroup:
    """The communicator of a lane of an NCCL group: the group itself for lane 0. Collective over the group at first."""
    if lane == 0:
        return group
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="nccl", use_local_synchronization=True, group_desc=f"longspan lane {lane}")
    assert isinstance(made, dist.ProcessGroup)
    return made


def open_lanes(group: dist.ProcessGroup, device: torch.device, lanes: Iterable[int]) -> None:
    """Make and warm up a group's communicators for these lanes, on all ranks together.

    NCCL connects at the first operation, which must then involve every rank; a step of a schedule may not.
    """
    if backend_for(group, device) == "nccl":
        for lane in sorted(lanes):
            _warm(lane_group(group, lane), device)


@lru_cache(maxsize=64)
def _warm(group: dist.ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def _finish(sending: Sending) -> None:
    for works, _ in sending:
        for work in works:
            work.wait()


def _waiter(works: list[dist.Work], target: Tensor, staged: Tensor | None) -> Callable[[], None]:
    def wait() -> None:
        for work in works:
            work.wait()
        if staged is not None:
            target.copy_(staged)

    return wait


def agree(group: dist.ProcessGroup, fingerprint: str, what: str, device: torch.device) -> None:
    """Compare a hexadecimal fingerprint (64 bits) over the ranks. Raises ValueError on every rank where they differ."""
    where = device if backend_for(group, device) == "nccl" else torch.device("cpu")
    mine = torch.tensor([int(fingerprint, 16) - (1 << 63)], dtype=torch.int64, device=where)
    world = dist.get_world_size(group)
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine, group=group)
    values = [int(t.item()) for t in every]
    if len(set(values)) > 1:
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        raise ValueError(
            f"all ranks must use one {what}, but ranks {others} differ from rank 0; build it from the same inputs"
        )


def from_rank_0(group: dist.ProcessGroup, value: Any, device: torch.device) -> Any:
    """Rank 0's value (anything that pickles), on every rank; what the others pass is not used. Collective."""
    where = device if backend_for(group, device) == "nccl" else torch.device("cpu")
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0, device=where)
    return box[0]
