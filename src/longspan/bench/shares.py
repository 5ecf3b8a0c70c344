"""Shares of a core: processes that may use so much of the CPU and no more, whatever else is idle.

Ranks that share the cores of one machine speed up while others wait, which ranks on hosts of their own do not. With a
share each, a lab's hosts have a fixed speed. The kernel's CFS quota does it: a process that has used its part of a
period waits for the next one. What else the machine runs comes after them.

Needs Linux, root and the ``cpu`` controller of control groups, version 1 or 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 5_000  # a rank that has used its part waits this long at most
_GONE_S = 2.0  # a group can be removed when the last process in it has been reaped


class ShareError(ValueError):
    """Shares cannot be had here: the message says why in one line, and what to do about it."""


@contextmanager
def cpu_shares(num: int, cores: float) -> Iterator[tuple[Path, ...]]:
    """Makes ``num`` control groups of ``cores`` each, for ``join``; they are removed when their processes have ended.

    Raises:
        ValueError: no positive share.
        ShareError: no root, or no cpu controller.
    """
    if not cores > 0:
        raise ValueError(f"a share of the CPU must be positive, got {cores}; pass for instance 0.4")
    made: list[Path] = []
    try:
        try:
            for number in range(num):
                made.append(_make(f"longspan-{os.getpid()}-{number}", cores))
        except OSError as error:
            raise ShareError(
                f"shares of the CPU need root and the cpu controller of control groups below {_ROOT}, got {error}; "
                "leave --cpu out"
            ) from None
        yield tuple(made)
    finally:
        for group in made:
            _remove(group)


def _make(name: str, cores: float) -> Path:
    quota = round(cores * _PERIOD_US)
    second = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if second else _ROOT / "cpu") / name
    if second and "cpu" not in (_ROOT / "cgroup.subtree_control").read_text().split():
        (_ROOT / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir()
    if second:
        (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
        (group / "cpu.weight").write_text("10000")  # the largest
    else:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        (group / "cpu.shares").write_text("262144")  # the largest
    return group


def _remove(group: Path) -> None:
    deadline_s = time.monotonic() + _GONE_S
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                return  # a process outlived its rank; an empty group costs nothing
            time.sleep(0.05)


def join(group: Path, pid: int) -> None:
    """Puts a process, and what it will start, into a group of ``cpu_shares``."""
    (group / "cgroup.procs").write_text(str(pid))
