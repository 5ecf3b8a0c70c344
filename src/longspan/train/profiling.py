"""A few steps of a run under torch's profiler: what the operators do, and what the step's parts take.

Every rank writes, into ``profile/`` of the run's folder: a trace for Perfetto or chrome://tracing
(``rank_00000.json.gz``), the operators that took longest (``rank_00000.txt``) and the named ranges
(``rank_00000.ranges.json``), which the report draws. A trace has a line per operator call: its size is bounded by the
number of steps, which is why that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function

PARTS = (
    "data",
    "forward",
    "backward",
    "gradient sums",
    "gradient norm",
    "optimizer",
    "agreement",
    "checkpoint",
    "evaluation",
)
MOST_STEPS = 10
_DEFAULT = range(3, 6)
_ROWS = 25  # of the table


def profiled_steps(text: str) -> range:
    """The steps, from 1, of "FIRST:COUNT" or of "auto". Raises ValueError for anything else."""
    if text == "auto":
        return _DEFAULT
    first, _, count = text.partition(":")
    if not (first.isascii() and first.isdigit() and count.isascii() and count.isdigit()):
        raise ValueError(f"steps to profile are FIRST:COUNT, got {text!r}; say --profile 3:3 for steps 3 to 5")
    if int(first) < 1 or not 1 <= int(count) <= MOST_STEPS:
        raise ValueError(
            f"a profile takes 1 to {MOST_STEPS} steps, the first of which is 1 or later, got {text}; a trace of more "
            "would be too large to open"
        )
    return range(int(first), int(first) + int(count))


def span(part: str) -> AbstractContextManager[Any]:
    """A named range of the trace; nothing at all while no profiler is on."""
    return record_function(part) if torch.autograd.profiler._is_profiler_enabled else nullcontext()


class StepProfile:
    """Profiles some steps of this rank's loop: `begin` and `end` around each, `close` after the last.

    The step before the first is profiled and dropped, if it is of this session: starting a profiler takes time itself.

    Args:
        steps: None for no profile, which costs nothing.
        done: steps done before this session.
    """

    def __init__(self, steps: range | None, folder: Path, rank: int, device: torch.device, *, done: int) -> None:
        self._folder, self._rank, self._device = folder, rank, device
        self._steps, self._done = steps, done
        self._open = steps is not None and done < steps.start
        self._profiler: torch.profiler.profile | None = None
        self._step: record_function | None = None
        self._taken: list[int] = []

    def missed(self) -> str:
        """Why a session that goes on from a checkpoint cannot take the profile; "" where it can."""
        if self._steps is None or self._open:
            return ""
        later = f"{self._done + 3}:{len(self._steps)}"
        return (
            f"no profile: {_words(self._steps)} to be profiled, but this session goes on after step {self._done}; "
            f"--profile {later} would take later ones"
        )

    def begin(self, step: int) -> None:
        """Before a step, from 1. After a jump over the first of the steps, the next ones are taken in their place."""
        if self._steps is None or not self._open or step < self._steps.start - 1:
            return
        if self._profiler is None:
            self._profiler = _profiler(self._device, warm_up=step < self._steps.start)
            self._profiler.start()
        if step >= self._steps.start:
            self._taken.append(step)
            self._step = record_function(f"step {step}")
            self._step.__enter__()

    def end(self) -> str:
        """After a step; says what was written after the last of them, else ""."""
        if self._profiler is None or self._steps is None:
            return ""
        if self._step is None:
            self._profiler.step()  # the warm-up is over
            return ""
        self._leave_step()
        return self._write() if len(self._taken) == len(self._steps) else ""

    def finish(self) -> str:
        """At the end of the run; says what is missing, else ""."""
        if self._steps is None or not self._open:
            return ""
        if self._taken:
            return f"{self._write()}; the run ended before step {self._steps.stop - 1}"
        self.close()
        return f"no profile: the run ended before step {self._steps.start}"

    def close(self) -> None:
        """Drops what was not written."""
        if self._profiler is not None:
            self._leave_step()
            self._profiler.stop()
        self._profiler, self._open = None, False

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = None

    def _write(self) -> str:
        profiler, name = self._profiler, f"rank_{self._rank:05d}"
        assert profiler is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.close()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            (self._folder / f"{name}.txt").write_text(_table(profiler, self._device, self._taken))
            found = {"rank": self._rank, "device": self._device.type, "ranges": _ranges(profiler, self._taken)}
            (self._folder / f"{name}.ranges.json").write_text(json.dumps(found) + "\n")
        except OSError as error:
            return f"the profile could not be written: {error.strerror}; training goes on"
        return f"{_words(self._taken, was=True)} profiled: traces for ui.perfetto.dev in {self._folder}"


def read_ranges(folder: Path) -> list[dict[str, Any]]:
    """The named ranges of all ranks whose profile is in a folder: {rank, step, name, start_ms, duration_ms}, the time
    from the beginning of the rank's first profiled step. Files that are damaged or half written are left out."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("rank_*.ranges.json")):
        try:
            found = json.loads(path.read_text())
            rows += [{"rank": int(found["rank"]), **each} for each in found["ranges"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return rows


def _profiler(device: torch.device, *, warm_up: bool) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1) if warm_up else None
    return torch.profiler.profile(activities=activities, schedule=schedule)


def _words(steps: Sequence[int], was: bool = False) -> str:
    if len(steps) == 1:
        return f"step {steps[0]} {'was' if was else 'is'}"
    whole = steps[-1] - steps[0] + 1 == len(steps)  # a run with a time limit leaves steps out
    named = f"{steps[0]} to {steps[-1]}" if whole else ", ".join(map(str, steps))
    return f"steps {named} {'were' if was else 'are'}"


def _table(profiler: torch.profiler.profile, device: torch.device, steps: list[int]) -> str:
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    title = f"The {_ROWS} operators and ranges that took longest themselves; {_words(steps, was=True)} profiled\n"
    return title + profiler.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=48)


def _ranges(profiler: torch.profiler.profile, steps: list[int]) -> list[dict[str, Any]]:
    """Steps and parts, as the host saw them: on a GPU kernels run on behind it."""
    events = profiler.events()
    named = [e for e in events or () if e.is_user_annotation and e.device_type.name == "CPU"]
    bounds = {step: e.time_range for e in named for step in steps if e.name == f"step {step}"}
    begin_us = min((time.start for time in bounds.values()), default=0.0)

    def row(step: int, name: str, start_us: float, end_us: float) -> dict[str, Any]:
        start_ms, duration_ms = (start_us - begin_us) / 1e3, (end_us - start_us) / 1e3
        return {"step": step, "name": name, "start_ms": round(start_ms, 4), "duration_ms": round(duration_ms, 4)}

    def inside() -> Iterator[dict[str, Any]]:
        for step, time in sorted(bounds.items()):
            yield row(step, "step", time.start, time.end)
            for e in sorted(named, key=lambda e: e.time_range.start):
                if e.name in PARTS and time.start <= e.time_range.start <= time.end:
                    yield row(step, e.name, e.time_range.start, e.time_range.end)

    return list(inside())
