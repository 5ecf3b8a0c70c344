"""Whether processes are gone: those that are not the test's own children cannot be waited for, only looked at."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil

GONE_S = 30.0  # far above what an end takes: the machine may be busy


def lives(pid: int) -> bool:
    """Whether a process is there, and not as a zombie: in a container nobody may reap those."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_after(pids: Iterable[int], within_s: float = GONE_S) -> list[int]:
    """Waits for the end of these processes; the value is who then still lives."""
    deadline_s = time.monotonic() + within_s
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return left
