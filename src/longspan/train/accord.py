"""Ranks that agree before they go on: what one does or finds, all learn, over a gloo group of their own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from longspan.train.manifest import CheckpointError


class Failure(NamedTuple):
    """Why a save did not land; `expected` for what a full or failing disk does, which must not stop the training."""

    reason: str
    expected: bool


class Accord:
    """The ranks of a job, or one process alone. Every method is collective.

    Attributes:
        group: None for one process without torch.distributed.
    """

    def __init__(self, timeout_s: float) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self.group, self.rank, self.size = group, dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def union(self, described: dict[str, Any]) -> dict[str, Any]:
        """The entries of all ranks, which agree where they meet."""
        return {key: value for part in self.gather(described) for key, value in part.items()}

    def on_rank_0(self, call: Callable[[], Any]) -> Any:
        """Runs `call` on rank 0 and gives its value to all; a CheckpointError is raised on all ranks."""
        value = [call() if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(value, src=0, group=self.group)
        if isinstance(value[0], CheckpointError):
            raise value[0]
        return value[0]

    def agree(self, call: Callable[[], None]) -> None:
        """Runs `call` on every rank; if it raises CheckpointError on one, all raise the first one's."""
        for outcome in self.gather(outcome_of(call)):
            if isinstance(outcome, CheckpointError):
                raise outcome


def failure_of(call: Callable[[], Any]) -> Failure | None:
    """What the file system refused; None where it did not."""
    try:
        call()
    except OSError as error:
        return Failure(say(error), expected=True)
    return None


def outcome_of(call: Callable[[], Any]) -> Any:
    """The value of a call, or the CheckpointError that it raised."""
    try:
        return call()
    except CheckpointError as error:
        return error


def say(error: BaseException) -> str:
    """An error in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
