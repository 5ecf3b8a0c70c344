"""Progress: plain lines into pipes (never a control code), a live bar on a terminal, silence on other ranks."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from longspan.train.progress import TrainProgress
from longspan.train.units import bytes_text, count, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def show(bar: TrainProgress, step: int, time_left_s: float = 99.0) -> None:
    memory = 512 * 2**20
    bar.update(
        step, loss=2.34567, tokens_per_s=41234.0, memory_bytes=memory, sequence_length=8192, time_left_s=time_left_s
    )


def test_pipe_gets_plain_lines_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    out, clock = io.StringIO(), Clock()
    with TrainProgress(100, stream=out, interval_s=5.0, clock=clock) as bar:
        assert not bar.live
        for step in range(1, 13):
            clock.now += 1.0
            show(bar, step)
        bar.message("saved \x1b[31mstep 12\r\n")
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 6", "step 11", "saved  [31mstep 12  ", "step 12"]
    assert lines[0] == "step 1/100  loss 2.346  41.2k tok/s  512 MiB  seq 8,192  1:39 left"
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())


def test_last_step_is_always_shown_once() -> None:
    out, clock = io.StringIO(), Clock()
    with TrainProgress(2, stream=out, clock=clock) as bar:
        show(bar, 1)
        show(bar, 2)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/2", "step 2/2"]


def test_time_left_is_the_callers() -> None:
    out, clock = io.StringIO(), Clock()
    with TrainProgress(200, start_step=100, stream=out, interval_s=0.0, clock=clock) as bar:
        show(bar, 101, time_left_s=7.0)
    assert out.getvalue().startswith("step 101/200") and out.getvalue().endswith("0:07 left\n")


@pytest.mark.parametrize("columns", [50, 80, 140])
def test_terminal_gets_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with TrainProgress(300, stream=out) as bar:
        assert bar.live
        show(bar, 120)
        bar.message("saved step 120")
    text = out.getvalue()
    assert not bar.live
    assert "step 120/300" in text and "loss 2.346" in text and "saved step 120" in text
    assert ("512 MiB" in text) == (columns >= 80) and "…" not in text
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n")
    assert max(map(len, frames)) <= columns
    assert any("━" in frame and "loss" in frame for frame in frames)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_bar_leaves_the_terminal_whole_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with pytest.raises(KeyboardInterrupt), TrainProgress(3, stream=out):
        raise KeyboardInterrupt
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with TrainProgress(3, stream=out) as bar:
        show(bar, 1)
    assert "\x1b" not in out.getvalue() and out.getvalue()


def test_other_ranks_are_silent() -> None:
    out = Terminal()
    with TrainProgress(3, stream=out, enabled=False) as bar:
        show(bar, 1)
        bar.message("x")
    assert out.getvalue() == ""


def test_not_finite_values_are_named() -> None:
    out = io.StringIO()
    with TrainProgress(3, stream=out) as bar:
        bar.update(1, loss=float("nan"), tokens_per_s=float("inf"), memory_bytes=0, sequence_length=1, time_left_s=0)
    assert "loss nan" in out.getvalue() and "inf tok/s" in out.getvalue()


def test_a_reader_that_left_does_not_end_the_training() -> None:
    code = (
        "import os, sys\n"
        "from longspan.train.progress import TrainProgress\n"
        "read, write = os.pipe(); os.close(read)\n"
        "with TrainProgress(9, stream=open(write, 'w'), interval_s=0) as bar:\n"
        "    for step in (1, 2):\n"
        "        bar.update(step, loss=1.0, tokens_per_s=1.0, memory_bytes=1, sequence_length=1, time_left_s=0)\n"
        "print('alive', flush=True)\n"  # and the interpreter's end finds nothing left to write
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_refusals() -> None:
    for total, start in ((0, 0), (3, 4), (3, -1)):
        with pytest.raises(ValueError, match="start_step"):
            TrainProgress(total, start_step=start)
    with pytest.raises(ValueError, match="interval_s"):
        TrainProgress(3, interval_s=float("nan"))


def test_units() -> None:
    assert [count(x) for x in (0, 7, 1.234, 999, 999.6, 1234, 41234, 999_600, 2_097_152)] == (
        ["0", "7", "1.23", "999", "1k", "1.23k", "41.2k", "1M", "2.1M"]
    )
    assert [bytes_text(x) for x in (0, 1023, 1024, 1.5 * 2**30, 1000 * 2**20)] == (
        ["0 B", "1023 B", "1 KiB", "1.5 GiB", "0.98 GiB"]
    )
    assert [duration(x) for x in (0.4, 59.6, 3600, 7384, float("inf"))] == [
        "0:00",
        "1:00",
        "1:00:00",
        "2:03:04",
        "-:--",
    ]
