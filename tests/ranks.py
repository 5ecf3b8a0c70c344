"""Starts ranks for a test: `run_ranks(fn, world, *args)` runs `fn(rank, world, *args)` on `world` gloo ranks.

The ranks are forked from a server process that has imported torch once (spawning a fresh interpreter per rank costs ten
times as much), and they meet through a file (no port to collide on). What leaves a rank is a plain pickle: torch's own
reductions would send a handle to shared memory that dies with the rank. Each rank writes its output to a file of its
own, leads its own process group so that it can be killed with all it started, and answers SIGUSR1 with its stack, which
is how a hang is reported.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "numpy",
        "jaxtyping",
        "pytest",
        "hypothesis",
        "longspan.train.session",
    ]
)

_MEET_S = 40.0  # how long ranks may take to start and to meet: on a busy machine seconds, and no part of a test
_GRACE_S = 0.5  # how long, after one rank failed, the others may take to say that they failed first
_LEAVE_S = 30.0  # how long ranks that have returned may take to leave their process group
_STACK_S = 5.0  # how long ranks may take to say where they stand
_STACK = "most recent call first"  # faulthandler's words
_LOG_CHARS = 4000
_MET = b"met"


class RankError(RuntimeError):
    """A rank raised, or died. Its own exception, where it could be sent, is the `__cause__`."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class _Failure:
    when_s: float  # on the clock that all processes of a machine share
    text: str
    error: bytes | None


@dataclass
class _Rank:
    rank: int
    process: BaseProcess
    pipe: Connection
    log: Path
    result: Any = None
    failure: _Failure | None = None
    met: bool = False
    answered: bool = False

    def read(self) -> None:
        """Takes the rank's word that all have met, or its answer, or its death, whichever is there."""
        try:
            if (message := self.pipe.recv_bytes()) == _MET:
                self.met = True
                return
            succeeded, self.result, self.failure = pickle.loads(message)
            assert succeeded == (self.failure is None)
        except (EOFError, ConnectionResetError):
            self.process.join(_LEAVE_S)
            code = self.process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            # Nothing that another rank does kills a process, so a death is a cause and never a consequence.
            self.failure = _Failure(0.0, f"{how} before it returned", None)
        self.answered = True

    def said(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return f"\n--- output of rank {self.rank} ---\n{text[-_LOG_CHARS:]}" if text else ""

    def kill(self) -> None:
        """Ends the rank and all that it started."""
        # Not after a clean end: the number of a process that is gone may by then be another's.
        if self.process.pid is not None and self.process.exitcode != 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """Runs `fn(rank, world, *args)` on `world` gloo ranks and returns what they returned, by rank.

    Args:
        fn: a function at the top level of a module (ranks import it by name).
        world: number of processes; the default process group joins them.
        args: anything that pickles; tensors are copied.
        timeout_s: wall-clock limit from when all ranks have met.
    Raises:
        RankError: a rank raised or died; names the rank that was first, with its traceback and output.
        TimeoutError: some rank had not returned in time; names it and says where it stood. All ranks are dead then.
    """
    if world < 1:
        raise ValueError(f"run_ranks needs at least one rank, got world={world}")
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise ValueError(
            f"run_ranks needs a function at the top level of a module, got {fn.__qualname__}: move it there"
        )
    job = pickle.dumps((fn, args, _filters()))
    folder = Path(tempfile.mkdtemp(prefix="longspan-ranks-"))
    ranks: list[_Rank] = []
    try:
        for rank in range(world):
            ranks.append(_start(rank, world, job, folder, timeout_s))
        _collect(ranks, timeout_s)
        for each in ranks:
            each.pipe.send_bytes(b"leave")
        for each in ranks:
            each.process.join(_LEAVE_S)
            if each.process.exitcode is None:
                raise TimeoutError(
                    f"rank {each.rank} of {world} returned but did not leave its process group{each.said()}"
                )
            if each.process.exitcode != 0:
                raise RankError(
                    each.rank,
                    f"rank {each.rank} of {world} returned, then ended with {each.process.exitcode}{each.said()}",
                )
        return [each.result for each in ranks]
    finally:
        for each in ranks:
            each.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(rank: int, world: int, job: bytes, folder: Path, timeout_s: float) -> _Rank:
    ours, theirs = _SERVER.Pipe()
    log = folder / f"rank{rank}.log"
    process = _SERVER.Process(
        target=_main, args=(rank, world, job, str(folder), timeout_s, theirs), name=f"rank {rank} of {world}"
    )
    process.start()
    theirs.close()  # so that a rank's death closes the pipe
    return _Rank(rank, process, ours, log)


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    """Reads every rank's answer; raises for the first that failed, or for those that did not answer in time."""
    failed = met = False
    deadline_s = time.monotonic() + _MEET_S
    while waiting := [each for each in ranks if not each.answered]:
        ready = wait([each.pipe for each in waiting], max(0.0, deadline_s - time.monotonic()))
        for each in waiting:
            if each.pipe in ready:
                each.read()
        if not failed and any(each.failure for each in ranks):
            # A failing rank brings others down with it, and theirs may be the message that arrives first.
            failed, deadline_s = True, min(deadline_s, time.monotonic() + _GRACE_S)
        elif not failed and not met and all(each.met for each in ranks):
            met, deadline_s = True, time.monotonic() + timeout_s
        elif not ready and failed:
            break
        elif not ready:
            late = [each.rank for each in waiting if met or not each.met]
            what = f"had not returned after {timeout_s:g} s" if met else f"had not met the others after {_MEET_S:g} s"
            raise TimeoutError(f"ranks {late} of {len(ranks)} {what}{_stacks(waiting)}")
    if failed:
        raise _first_error(ranks)


def _first_error(ranks: list[_Rank]) -> RankError:
    failed = sorted((each.failure.when_s, each.rank) for each in ranks if each.failure)
    first = ranks[failed[0][1]]
    assert first.failure is not None
    others = ", ".join(f"rank {rank}" for _, rank in failed[1:])
    note = f"\n(after it: {others})" if others else ""
    error = RankError(first.rank, f"rank {first.rank} of {len(ranks)} failed: {first.failure.text}{first.said()}{note}")
    if first.failure.error is not None:
        error.__cause__ = pickle.loads(first.failure.error)
    return error


def _stacks(ranks: list[_Rank]) -> str:
    """Asks the ranks where they stand. A stopped rank does not answer; its output so far is then all there is."""
    for each in ranks:
        if each.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.process.pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + _STACK_S
    while not all(_STACK in each.said() for each in ranks) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return "".join(each.said() for each in ranks)


def _filters() -> list[tuple[Any, ...]]:
    """This test's warning filters in a form that pickles: a warning that fails a test fails it in a rank too."""

    def pattern(value: object) -> str:
        return value.pattern if isinstance(value, re.Pattern) else str(value or "")

    return [
        (action, pattern(text), kind, pattern(module), line) for action, text, kind, module, line in warnings.filters
    ]


def _main(rank: int, world: int, job: bytes, folder: str, timeout_s: float, pipe: Connection) -> None:
    """One rank, from its first line to its last."""
    os.setsid()
    log = os.open(Path(folder) / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(log, "w", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as the rank)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.platform == "linux":
        # Else gloo resolves the machine's name, which some containers cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        fn, args, filters = pickle.loads(job)
        warnings.resetwarnings()
        for action, text, kind, module, line in reversed(filters):
            warnings.filterwarnings(action, text, kind, module, line)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=max(timeout_s, _MEET_S)),
        )
        pipe.send_bytes(_MET)
        answer = pickle.dumps((True, fn(rank, world, *args), None))
    except BaseException as error:  # whatever it was, the test must hear of it, from SystemExit to a failed assertion
        when_s = time.monotonic()
        pipe.send_bytes(pickle.dumps((False, None, _Failure(when_s, traceback.format_exc().rstrip(), _pickled(error)))))
        sys.stdout.flush()
        os._exit(1)
    pipe.send_bytes(answer)
    # No rank leaves before all have returned: a closed connection would fail a neighbour that is still reading.
    pipe.recv_bytes()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def _pickled(error: BaseException) -> bytes | None:
    """The exception as bytes, where it survives the way there and back."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception's constructor may do anything; its traceback is sent as text all the same
        return None
    return data
