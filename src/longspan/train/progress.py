"""The progress of a run on rank 0: a live bar on a terminal, one plain line every few seconds anywhere else.

Whether the stream is a terminal is asked of the stream alone (`isatty`), never of FORCE_COLOR and its like, so that a
pipe or a log file never receives control codes.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from longspan.train.units import bytes_text, count, duration

_LEAST_BAR = 12  # columns kept for the bar and the gaps


class TrainProgress:
    """Shows step, loss, tokens/s, memory, sequence length and time left; a context manager.

    Args:
        total_steps: the step at which the run ends.
        start_step: the step a resumed run starts from.
        enabled: False on every rank but 0: nothing is ever written.
        stream: where to write, default the stdout of this moment.
        interval_s: the least time between two plain lines; the first and the last update are always shown.
        clock: seconds that only grow; for tests.

    Raises:
        ValueError: total_steps or start_step are out of range, or interval_s is negative.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 1 or not 0 <= start_step <= total_steps:
            raise ValueError(
                f"progress needs 0 <= start_step <= total_steps and a step at least, got {start_step} of {total_steps};"
                " check the schedule's number of steps"
            )
        if not interval_s >= 0:
            raise ValueError(f"interval_s must be 0 or more seconds, got {interval_s}; use 5")
        self._total, self._step, self._enabled, self._interval_s, self._clock = (
            total_steps,
            start_step,
            enabled,
            interval_s,
            clock,
        )
        self._stream = sys.stdout if stream is None else stream
        self._printed_at = -math.inf
        self._pending: str | None = None
        self._bar: Progress | None = None
        self._task = None

    @property
    def live(self) -> bool:
        """Whether a live bar is drawn now."""
        return self._bar is not None

    def __enter__(self) -> TrainProgress:
        if self._enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            columns = (
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(bar_width=None),
                _Status(console),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task("train", total=self._total, completed=self._step, status={})
            self._bar.start()
        return self

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_s: float,
        memory_bytes: float,
        sequence_length: int,
        time_left_s: float,
    ) -> None:
        """Shows the state after ``step``.

        Args:
            step: the last finished step.
            loss: nats a token.
            tokens_per_s: of all ranks together.
            memory_bytes: peak of the fullest rank.
            sequence_length: tokens of the global sequence.
            time_left_s: until the end of the run, as far as it can be told.
        """
        if not self._enabled:
            return
        parts = {
            "loss": f"loss {loss:.3f}",
            "speed": f"{count(tokens_per_s)} tok/s",
            "memory": bytes_text(memory_bytes),
            "length": f"seq {sequence_length:,}",
            "left": f"{duration(time_left_s)} left",
        }
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, status=parts)
            return
        line = f"step {step:,}/{self._total:,}  " + "  ".join(parts.values())
        if self._clock() - self._printed_at >= self._interval_s or step >= self._total:
            self._print(line)
            self._printed_at, self._pending = self._clock(), None
        else:
            self._pending = line

    def message(self, text: str) -> None:
        """Prints one line beside the progress (a save, a warning); above the bar on a terminal."""
        if not self._enabled:
            return
        line = "".join(c if c.isprintable() else " " for c in text)
        if self._bar is not None:
            self._bar.console.print(Text(line), soft_wrap=True)
        else:
            self._print(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._pending is not None:
            self._print(self._pending)
            self._pending = None

    def _print(self, line: str) -> None:
        # `longspan train | head`: the reader has left, the training has not.
        self._enabled = say(line, self._stream)


def say(text: str, stream: TextIO) -> bool:
    """Prints a line at once. False where the reader of a pipe has left; what is printed later then goes nowhere."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # What stays in the buffer would fail again when the interpreter ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


class _Status(ProgressColumn):
    """The numbers beside the bar; on a narrow terminal the least needed ones go first."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))  # a column that may wrap is shrunk before the bar is
        self._console = console

    def render(self, task: Task) -> Text:
        parts: dict[str, str] = task.fields["status"]
        names = [name for name in ("loss", "speed", "memory", "length", "left") if name in parts]
        room = self._console.width - len(f"step {task.total:,}/{task.total:,}") - _LEAST_BAR
        for victim in ("memory", "length", "speed", "left"):
            if sum(len(parts[name]) + 2 for name in names) <= room:
                break
            if victim in names:
                names.remove(victim)
        return Text("  ".join(parts[name] for name in names), no_wrap=True)
