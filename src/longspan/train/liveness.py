"""Who is alive: heartbeats of the ranks, the reason of a failed collective in words, and Ctrl-C as a flag.

A collective that times out says which call failed, never which rank is to blame. So each rank keeps a small record
(step, wall time, state) in a directory that all ranks see, renewed every second by a thread. When a collective fails
on one rank, that rank marks itself as waiting, watches the records for a moment, and names who did not renew theirs
(stopped or gone) or who is not waiting although everybody else is (hung).

Files rather than the rendezvous store: the store may live in the rank that stopped. Records are overwritten in place
in one block, so that a full disk does not silence them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

LAUNCHER_PID = "LONGSPAN_LAUNCHER_PID"  # set by launch.local_ranks for the ranks that it starts
INTERRUPTED = 130  # exit code of a run that was asked to leave, as a shell would give it
_RECORD_BYTES = 2048
_GRACE_S = 5.0  # for the last words of a rank that its launcher ends
_LOOKS = 4  # at the records, three intervals apart, before several ranks are blamed


class LostRankError(RuntimeError):
    """Another rank stopped, hung or failed; the message names it."""


def started_by_launcher() -> bool:
    return os.environ.get(LAUNCHER_PID) == str(os.getppid())


def report(message: str) -> None:
    """One line for the person who started the run: to the launcher if there is one (it prints one line for all ranks),
    else to standard error."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # The form of torch's own error handler, so that torchrun shows it as well.
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
    if not (path and started_by_launcher()):
        print(f"longspan: error: {message}", file=sys.stderr, flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Reports and ends this process at once: after a lost rank, an orderly exit may wait for collectives for ever."""
    report(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Heartbeat:
    """The record of this rank, and the eyes on the others.

    Used as a context manager around the training loop, with `beat(step)` at each step and `watched()` around what takes
    collectives of the accelerator. A failed collective inside leaves it as a `LostRankError` that names the rank to
    blame.

    Args:
        directory: seen by all ranks, such as `run/heartbeats`.
        interval_s: time between renewals.
        timeout_s: if the next rank does not renew its record for so long, it is named and this process ends, whatever
            the loop is waiting for (a save may wait for another rank without a time-out of its own). Each rank watches
            one other, so that the cost does not grow with their number. None: only failed collectives are looked into.
        watchdog_s: if a `watched()` part takes so long, diagnose and end the process. For NCCL, whose time-outs kill
            the process without raising; None with gloo, which raises.

    Raises:
        ValueError: `interval_s` not above 0, or one of the limits not above it.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        world_size: int,
        *,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
        watchdog_s: float | None = None,
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"a heartbeat's interval_s must be above 0, got {interval_s}")
        for name, limit_s in (("timeout_s", timeout_s), ("watchdog_s", watchdog_s)):
            if limit_s is not None and limit_s <= interval_s:
                raise ValueError(f"a heartbeat's {name} must be above interval_s={interval_s}, got {limit_s}")
        self.directory = Path(directory)
        self.rank, self.world_size = rank, world_size
        self.interval_s, self.timeout_s, self.watchdog_s = interval_s, timeout_s, watchdog_s
        self._step, self._state, self._message = 0, "running", ""
        self._beaten_s = self._started_s = time.time()
        self._watched_since_s: float | None = None
        self._has_launcher = started_by_launcher()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="longspan-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._path(self.rank).write_bytes(b" " * _RECORD_BYTES)
        self._beaten_s = self._started_s = time.time()
        self._renew()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = None
        if self.world_size > 1 and isinstance(error, RuntimeError) and _of_a_collective(error):
            lost = self.diagnose() or f"a collective failed at step {self._step} on rank {self.rank}: {_brief(error)}"
        self._state = "done" if error is None else "failed" if lost is None else "lost"
        self._message = _brief(error) if error is not None else ""
        self._stop.set()
        self._thread.join()
        self._renew()
        if lost is not None:
            raise LostRankError(lost) from error

    def beat(self, step: int) -> None:
        """Marks that this rank begins `step`; costs no I/O."""
        self._step, self._beaten_s = step, time.time()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Arms the watchdog inside: around a step, not around a checkpoint or an export, which may take long."""
        self._watched_since_s = time.monotonic()
        try:
            yield
        finally:
            self._watched_since_s = None

    def diagnose(self) -> str | None:
        """Which rank keeps the others waiting, in words; None if none can be told. Takes about three intervals, and up
        to four times that where several ranks look busy: collectives of some may fail a little later than ours."""
        self._state = "waiting"
        self._renew()
        before = [self._read(rank) for rank in range(self.world_size)]
        silent: list[str] = []
        busy: list[tuple[int, int, float]] = []
        for _ in range(_LOOKS):
            for _ in range(3):
                time.sleep(self.interval_s)
                self._renew()  # the thread that does may be the one that is here, and others may look too
            silent, busy = self._look(before)
            if silent or len(busy) < 2:
                break
        if not silent and busy:
            # All others wait and say so: who still computes is the one to blame, the one furthest behind first.
            at = min(step for step, _, _ in busy)
            silent = [_silence(rank, waited_s, step) for step, rank, waited_s in busy if step == at]
        return "; ".join(silent) or None

    def _look(self, before: list[dict[str, Any]]) -> tuple[list[str], list[tuple[int, int, float]]]:
        """What is wrong with ranks by their records, in words; and step, rank and seconds in it of those at work."""
        after = [self._read(rank) for rank in range(self.world_size)]
        now = time.time()
        silent, busy = [], []
        for rank in [rank for rank in range(self.world_size) if rank != self.rank]:
            record = after[rank]
            if not record or record["alive_s"] < self._started_s - 60.0:  # of an earlier run in this directory
                silent.append(f"rank {rank} has not answered in this run (it did not reach the training loop)")
            elif record["state"] == "failed":
                silent.append(f"rank {rank} failed at step {record['step']}: {record['message']}")
            elif record["state"] in ("running", "waiting") and record == before[rank] and _may_be_lost(record):
                silent.append(_say_silent(rank, record, now - record["alive_s"]))
            elif record["state"] == "running":
                busy.append((record["step"], rank, now - record["beaten_s"]))
        return silent, busy

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank_{rank:05d}.json"

    def _renew(self) -> bool:
        record = {
            "step": self._step,
            "state": self._state,
            "message": self._message[:200],
            "alive_s": time.time(),
            "beaten_s": self._beaten_s,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        try:
            with self._path(self.rank).open("r+b") as file:
                file.write(json.dumps(record).encode()[:_RECORD_BYTES].ljust(_RECORD_BYTES))
        except OSError:  # a full or failing disk is no reason to end the training
            return False
        return True

    def _renew_always(self) -> None:
        next_rank = (self.rank + 1) % self.world_size
        seen, num_seen, since_s = self._read(next_rank), 0, time.monotonic()
        while not self._stop.wait(self.interval_s):
            can_write = self._renew()
            if self._has_launcher and not started_by_launcher():
                os._exit(1)  # the launcher is gone without a word: leave no orphan
            record, now_s = self._read(next_rank), time.monotonic()
            if record != seen or record.get("state") in ("done", "failed", "lost") or not can_write:
                num_seen += record != seen
                seen, since_s = record, now_s
            # Only of a rank that was heard in this run: before, it may be loading, or the record may be an old one.
            elif num_seen and record and now_s - since_s > (self.timeout_s or math.inf) and _may_be_lost(record):
                fail(_say_silent(next_rank, record, now_s - since_s))
            since = self._watched_since_s
            if since is not None and time.monotonic() - since > (self.watchdog_s or math.inf):
                fail(self.diagnose() or f"no step was finished for {self.watchdog_s:g} s at step {self._step}")

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads(self._path(rank).read_bytes())
        except (OSError, ValueError):  # not there yet, or caught in the middle of a write
            return {}


class InterruptFlag:
    """Ctrl-C (SIGINT) and SIGTERM as a flag that the loop reads between steps. The second Ctrl-C ends the process.

    A thread reads the signals from Python's wake-up pipe, so that they are noticed, and the second one obeyed, even
    while the main thread is inside a long kernel or a collective. Terminals and launchers may each deliver the same
    Ctrl-C: signals within `debounce_s` of the first one count as the first one.

    Under `launch.local_ranks`, SIGTERM comes from the launcher when another rank was lost (a SIGTERM to the launcher
    reaches the ranks as SIGINT): there is nobody left to save with, so the process ends, after a moment for the main
    thread to say what it saw.

    Raises:
        ValueError: entered outside of the main thread, where Python does not handle signals.
    """

    def __init__(self, *, debounce_s: float = 1.0, announce: str | None = None) -> None:
        """announce: said on standard error at the first signal (on rank 0), such as "saving, then leaving"."""
        self.debounce_s, self.announce = debounce_s, announce
        self._first_s: float | None = None
        self._has_launcher = started_by_launcher()

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("InterruptFlag was entered in a thread, signals reach the main one; enter it there")
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="longspan-interrupt", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to leave."""
        return self._first_s is not None

    def _listen(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number == signal.SIGTERM and self._has_launcher:
                    last_words = threading.Timer(_GRACE_S, os._exit, (128 + signal.SIGTERM,))
                    last_words.daemon = True
                    last_words.start()
                elif number in (signal.SIGINT, signal.SIGTERM):
                    self._count()

    def _count(self) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            if self.announce is not None:
                print(self.announce, file=sys.stderr, flush=True)
        elif now_s - self._first_s > self.debounce_s:
            os._exit(INTERRUPTED)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for Python to write the signal's number to the wake-up pipe."""


def _of_a_collective(error: RuntimeError) -> bool:
    # gloo raises a bare RuntimeError with the path of its source; NCCL and the store raise subclasses of DistError.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _brief(error: BaseException | None) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _silence(rank: int, silent_s: float, step: int) -> str:
    return f"rank {rank} has not answered for {silent_s:.0f} s (stopped or hung) at step {step}"


def _say_silent(rank: int, record: dict[str, Any], silent_s: float) -> str:
    if record["host"] == socket.gethostname() and _is_gone(record["pid"]):
        return f"rank {rank} ended without a word at step {record['step']} (process {record['pid']} is gone)"
    return _silence(rank, silent_s, record["step"])


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _may_be_lost(record: dict[str, Any]) -> bool:
    """False for a process of this machine that is there and not stopped: it is slow, or cannot write its record."""
    if record["host"] != socket.gethostname():
        return True
    try:
        return psutil.Process(record["pid"]).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True
