"""What benchmarks write down alike: a log of rows that a later run goes on from, and the head of a record.

A row is of one cell, by which it is found again: a plain mapping that says everything which changes the figure. A row
is reused only where the versions of what ran are the same.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longspan import __version__
from longspan.hardware.devices import devices

Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what ran."""
    found = {"longspan": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def now() -> str:
    """The time as a run is called by."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def key(cell: Mapping[str, Any]) -> str:
    """What a cell's row is found by."""
    return json.dumps(cell, sort_keys=True)


def read_rows(log: Path, of_versions: Mapping[str, str]) -> dict[str, Row]:
    """The last good row of each cell in a log, of the same versions; a line cut short by a crash is no row."""
    rows: dict[str, Row] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["status"] in ("ok", "refused") and row["versions"] == of_versions:
            rows[key(row["cell"])] = row
    return rows


def append_row(log: Path, row: Row) -> None:
    """Add a row to a log at once: a run that is broken off keeps it."""
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def head(suite: str, date: str) -> dict[str, Any]:
    """The head of a record: what was measured, when, by which command and code, on what."""
    return {
        "suite": suite,
        "date": date,
        "command": shlex.join(["longspan", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "hardware": [f"{device.kind}: {device.name}" for device in devices()],
    }


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON has it."""
    return json.loads(json.dumps(asdict(config), default=str))


def quartiles(times_s: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; of one time, that time."""
    return statistics.quantiles(times_s, n=4, method="inclusive") if len(times_s) > 1 else list(times_s) * 3


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" where files differ from it; None for an installed package."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie inside somebody else's checkout: that one does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("-dirty" if changed else "")
