"""Runs a list of checks on ranks of this machine, so that neither a hang nor a death of a rank can stop the caller.

Ranks come from a fork server that has imported torch once, and meet through a file: no port is taken. Each rank tells
what its check has shown, and goes on once all have: a rank that dies in a check cannot fail one that is still at the
check before. The first that fails, dies or is late ends all of them, and the checks after it count as not reached.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

Check = Callable[[dist.ProcessGroup, torch.device], str]
JOIN = "ranks meet"
_GRACE_S = 1.0  # how long the other ranks may take to say that they failed too, or first
_END_S = 10.0  # how long the fork server may take to tell how a rank has ended


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one check; the text says in one line what was shown, or what went wrong."""

    name: str
    status: Literal["ok", "failed", "not reached"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which ranks to start.

    Attributes:
        devices: one a rank.
        backend: as ``torch.distributed.init_process_group`` takes it.
        timeout_s: wall-clock limit of all checks together, and of one exchange.

    Raises:
        ValueError: no rank, or no time.
    """

    devices: tuple[torch.device, ...]
    backend: str = "gloo"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("checks need at least one rank, got no devices; name one a rank")
        if not self.timeout_s > 0:
            raise ValueError(f"checks need time, got timeout_s={self.timeout_s}; 60 is usual")


@dataclass(slots=True)
class _Rank:
    process: BaseProcess
    pipe: Connection
    done: list[str] = field(default_factory=list)
    failure: str | None = None
    died: bool = False


def run_checks(checks: Sequence[tuple[str, Check]], ranks: Ranks) -> list[Outcome]:
    """Runs the checks in order on all ranks; the first outcome is that of the ranks' meeting, ``JOIN``.

    Args:
        checks: names and functions at the top level of a module. A function returns what it has shown; whatever it
            raises is its failure.
    """
    names = [JOIN, *(name for name, _ in checks)]
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo: torch imports it (for seconds) at the first call of a custom operator, in each rank.
    context.set_forkserver_preload([__name__, "longspan.context", "torch._dynamo"])
    folder = Path(tempfile.mkdtemp(prefix="longspan-checks-"))
    started: list[_Rank] = []
    try:
        for rank in range(len(ranks.devices)):
            ours, theirs = context.Pipe()
            job = (rank, ranks, [check for _, check in checks], str(folder / "store"), theirs)
            process = context.Process(target=_main, args=job, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()  # so that a rank's death closes the pipe
            started.append(_Rank(process, ours))
        late = _collect(started, len(names), ranks.timeout_s)
        return _outcomes(names, started, ranks.timeout_s if late else None)
    finally:
        for each in started:
            each.pipe.close()  # a rank that is done waits for this
        for each in started:
            each.process.join(_GRACE_S)
            if each.process.exitcode is None:
                each.process.kill()
                each.process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _collect(ranks: list[_Rank], num: int, timeout_s: float) -> bool:
    """Reads until every rank is done or has failed, and sends them on to each next check. Returns if time ran out."""
    deadline_s = time.monotonic() + timeout_s
    sent_on = 0
    while waiting := [each for each in ranks if each.failure is None and len(each.done) < num]:
        if min(len(each.done) for each in ranks) > sent_on:
            sent_on += 1
            for each in ranks:
                with suppress(OSError):  # it has died meanwhile: reading from it will say so
                    each.pipe.send(None)
        ready = wait([each.pipe for each in waiting], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            return all(each.failure is None for each in ranks)
        for each in waiting:
            if each.pipe not in ready:
                continue
            try:
                passed, text = each.pipe.recv()
            except (EOFError, ConnectionResetError):
                each.process.join(_END_S)
                each.died, passed, text = True, False, _end(each.process.exitcode)
            if passed:
                each.done.append(text)
            else:
                each.failure = text
                deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
    return False


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code} before it answered"


def _outcomes(names: Sequence[str], ranks: list[_Rank], late_s: float | None) -> list[Outcome]:
    reached = min(len(each.done) for each in ranks)
    outcomes = [Outcome(name, "ok", ranks[0].done[index]) for index, name in enumerate(names[:reached])]
    if reached == len(names):
        return outcomes
    # A rank that dies makes others fail, never the reverse.
    failures = [
        f"rank {rank}: {each.failure}"
        for rank, each in sorted(enumerate(ranks), key=lambda item: not item[1].died)
        if each.failure is not None and len(each.done) == reached
    ]
    if not failures:  # one rank is behind and silent, whether or not another gave up waiting for it
        behind = [str(rank) for rank, each in enumerate(ranks) if len(each.done) == reached]
        within = "in time" if late_s is None else f"within {late_s:g} s"
        failures = [f"no answer {within} from rank {', '.join(behind)}"]
    outcomes.append(Outcome(names[reached], "failed", failures[0]))
    return outcomes + [Outcome(name, "not reached", f"{names[reached]!r} failed") for name in names[reached + 1 :]]


def _main(rank: int, ranks: Ranks, checks: list[Check], store: str, pipe: Connection) -> None:
    """One rank: its checks in order, each when the caller says so, until the caller closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends the ranks
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # As `longspan train --ranks` does: else gloo resolves the machine's name, which some containers cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    here = ranks.devices[rank]
    steps = [partial(_join, rank, ranks, store), *(partial(_call, check, here) for check in checks)]
    with suppress(EOFError, OSError):  # the caller has what it wants to know
        for step in steps:
            try:
                passed, text = True, step()
            except Exception as error:  # whatever a check raises is what it has found
                first = (str(error).strip().splitlines() or [""])[0]
                passed, text = False, first if type(error) is ValueError else f"{type(error).__name__}: {first}"
            pipe.send((passed, text))
            # Nobody goes on or leaves before all have answered: that would fail a rank that is still at work.
            pipe.recv()
    os._exit(0)  # not through the group's destructors, which may wait for a rank that has gone


def _join(rank: int, ranks: Ranks, store: str) -> str:
    if ranks.devices[rank].type == "cuda":
        torch.cuda.set_device(ranks.devices[rank])
    began = time.monotonic()
    world = len(ranks.devices)
    dist.init_process_group(
        ranks.backend,
        store=FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=ranks.timeout_s),
    )
    return f"{world} process{'es' if world > 1 else ''}, joined in {time.monotonic() - began:.1f} s"


def _call(check: Check, device: torch.device) -> str:
    group = dist.group.WORLD
    assert group is not None
    return check(group, device)
