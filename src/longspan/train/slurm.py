"""Slurm's environment in its own notation: host lists, tasks per node, and a port that follows from the job."""

from __future__ import annotations

import re

_FIRST_PORT, _NUM_PORTS = 15000, 17000  # below the range that systems hand out to outgoing connections (32768...)


def parse_nodelist(text: str) -> list[str]:
    """Slurm's host list: `node[01-03,07],gpu5` is node01 node02 node03 node07 gpu5; several brackets multiply.

    Raises:
        ValueError: brackets that do not close, or a range that is not one.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]+)\]", item):
            endings = [plain] if plain else [end for part in ranges.split(",") for end in _expand(part, text)]
            names = [name + end for name in names for end in endings]
        hosts += names
    if not hosts or text.count("[") != text.count("]") or any(c in "".join(hosts) for c in "[]"):
        raise ValueError(f"a Slurm host list looks like node[01-03,07],gpu5, got {text!r}; check SLURM_JOB_NODELIST")
    return hosts


def _expand(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError(f"a Slurm host range is a number or first-last, got {part!r} in {text!r}")
    last = int(match[2] or match[1])
    return [str(number).zfill(len(match[1])) for number in range(int(match[1]), last + 1)]


def parse_counts(text: str) -> list[int]:
    """Slurm's tasks per node: `2(x3),1` is 2 2 2 1."""
    counts: list[int] = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise ValueError(f"Slurm's tasks per node look like 2(x3),1, got {text!r}; check SLURM_TASKS_PER_NODE")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_port(job: int, step: int) -> int:
    """The same port on all ranks of a job step, without asking anybody."""
    # Steps of one job may run side by side: the step moves the port, far enough not to meet the next job's.
    return _FIRST_PORT + (job + 997 * step) % _NUM_PORTS
