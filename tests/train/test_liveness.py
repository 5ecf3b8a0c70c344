"""Which rank is to blame, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan.train.liveness import INTERRUPTED, Heartbeat, InterruptFlag, LostRankError, report
from tests.ranks import run_ranks


def blame(rank: int, world: int, directory: str, what: str) -> str:
    """Rank 1 does something at step 3, and what the others then say."""
    dist.barrier()  # the next two meet in the time of a collective of theirs
    group = dist.new_group(timeout=timedelta(seconds=2))
    said = "nothing"
    try:
        with Heartbeat(directory, rank, world, interval_s=0.4) as heart:
            for step in range(6):
                heart.beat(step)
                if rank == 1 and step == 3:
                    if what == "raise":
                        raise ValueError("an empty file\nand more")
                    if what == "hang":
                        until_said(Path(directory), (0, 2))
                    break
                dist.all_reduce(torch.ones(1), group=group)
    except LostRankError as error:
        assert isinstance(error.__cause__, RuntimeError)
        said = str(error)
    except ValueError:
        said = "my own"
    Path(directory, f"said_{rank}").touch()
    return said


def until_said(directory: Path, ranks: tuple[int, ...]) -> None:
    """Hangs until these ranks have had their say."""
    deadline_s = time.monotonic() + 40
    while not all((directory / f"said_{rank}").exists() for rank in ranks) and time.monotonic() < deadline_s:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("hang", r"rank 1 has not answered for \d s \(stopped or hung\) at step 3$"),
        ("raise", r"rank 1 failed at step 3: an empty file$"),
        ("leave", r"a collective failed at step 3 on rank [02]: "),
    ],
)
def test_the_one_to_blame_is_named(tmp_path: Path, what: str, words: str) -> None:
    said = run_ranks(blame, 3, str(tmp_path), what)
    for rank in (0, 2):
        assert re.match(words, said[rank]), said
    assert said[1] == ("my own" if what == "raise" else "nothing")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), Heartbeat(tmp_path, 0, 2, interval_s=0.05):
        raise RuntimeError("shape mismatch")
    assert json.loads((tmp_path / "rank_00000.json").read_text())["state"] == "failed"


def other(directory: Path, **changes: object) -> None:
    record = {"step": 7, "state": "running", "message": "", "alive_s": time.time(), "beaten_s": time.time()}
    record |= {"pid": os.getpid(), "host": "elsewhere"} | changes
    (directory / "rank_00001.json").write_text(json.dumps(record))


def test_diagnosis_of_records(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 0, 2, interval_s=0.02) as heart:
        assert heart.diagnose() == "rank 1 has not answered in this run (it did not reach the training loop)"
        other(tmp_path, alive_s=time.time() - 3600)
        assert heart.diagnose() == "rank 1 has not answered in this run (it did not reach the training loop)"
        other(tmp_path, alive_s=time.time() - 9)
        said = heart.diagnose() or ""  # itself it takes a moment, on a busy machine a second or more
        assert re.fullmatch(r"rank 1 has not answered for (9|[1-5]\d) s \(stopped or hung\) at step 7", said), said
        process = subprocess.Popen(["true"])
        process.wait()
        other(tmp_path, host=socket.gethostname(), pid=process.pid)
        assert heart.diagnose() == f"rank 1 ended without a word at step 7 (process {process.pid} is gone)"
        (tmp_path / "rank_00001.json").write_text("{torn")
        assert "rank 1 has not answered in this run" in str(heart.diagnose())


def test_a_rank_whose_collective_fails_a_little_later_is_not_blamed(tmp_path: Path) -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid(), "step": 7, "message": "", "beaten_s": time.time() - 9}
    done = threading.Event()

    def others() -> None:
        """Rank 1 goes on computing; rank 2 waits as well, somewhat later than rank 0 does."""
        waits_s = float("inf")
        while not done.wait(0.02):
            if waits_s == float("inf") and b"waiting" in (tmp_path / "rank_00000.json").read_bytes():
                waits_s = time.monotonic() + 1.2
            for rank, state in ((1, "running"), (2, "waiting" if time.monotonic() > waits_s else "running")):
                record = json.dumps(here | {"state": state, "alive_s": time.time()})
                (tmp_path / f"new_{rank}").write_text(record)
                (tmp_path / f"new_{rank}").rename(tmp_path / f"rank_{rank:05d}.json")

    with Heartbeat(tmp_path, 0, 3, interval_s=0.3) as heart:
        thread = threading.Thread(target=others)
        thread.start()
        while not (tmp_path / "rank_00002.json").exists():
            time.sleep(0.01)
        said = heart.diagnose() or ""
        done.set()
        thread.join()
    assert re.fullmatch(r"rank 1 has not answered for \d+ s \(stopped or hung\) at step 7", said), said


def test_a_rank_that_looks_at_the_others_renews_its_record(tmp_path: Path) -> None:
    """Else those that look at the same time would blame each other."""
    with Heartbeat(tmp_path, 0, 2, interval_s=0.05) as heart:
        heart._stop.set()  # as where the thread that renews is the one that looks
        heart._thread.join()
        other(tmp_path)
        before_s = time.time()
        heart.diagnose()
        record = json.loads((tmp_path / "rank_00000.json").read_text())
    assert record["state"] == "waiting" and record["alive_s"] >= before_s + 3 * 0.05


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="interval_s must be above 0, got 0"):
        Heartbeat(tmp_path, 0, 1, interval_s=0)
    with pytest.raises(ValueError, match=r"watchdog_s must be above interval_s=1\.0, got 0\.5"):
        Heartbeat(tmp_path, 0, 1, watchdog_s=0.5)
    with pytest.raises(ValueError, match=r"timeout_s must be above interval_s=1\.0, got 1"):
        Heartbeat(tmp_path, 0, 1, timeout_s=1)


WATCH = """
import contextlib, sys, time, json, os
from pathlib import Path
from longspan.train.liveness import Heartbeat
directory, what = Path(sys.argv[1]), sys.argv[2]
# Where nothing may be ended, no short wait may last so long by chance, as it may on a busy machine.
limit_s = 1.5 if what == "fine" else 0.4
options = {"timeout_s": limit_s} if what == "silent" else {"watchdog_s": limit_s}
def other(beat):
    record = {"step": 5, "state": "running", "message": "", "alive_s": time.time(), "beaten_s": 0.0, "pid": 1}
    (directory / "rank_00001.json").write_text(json.dumps(record | {"host": "elsewhere", "beat": beat}))
other(0)
with Heartbeat(directory, 0, 2, interval_s=0.05, **options) as heart:
    heart.beat(5)
    for beat in range(100 if what == "fine" else 40):  # longer than the limit in all, and long enough to be heard
        with heart.watched():
            other(beat)
            time.sleep(0.02)
    with heart.watched() if what == "stuck" else contextlib.nullcontext():
        time.sleep(2 if what == "fine" else 60)  # in the place of a long export, or of a wait that no time-out ends
print("left")
"""


@pytest.mark.parametrize("what", ["fine", "silent", "stuck"])
def test_a_wait_without_end_is_ended_and_long_work_between_steps_is_not(tmp_path: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path), what], capture_output=True, text=True, timeout=100
    )
    if what == "fine":
        assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
    else:
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("longspan: error: rank 1 has not answered for ")
        assert done.stderr.endswith(" s (stopped or hung) at step 5\n")


# ---------------------------------------------------------------- Ctrl-C


INTERRUPT = """
import sys, time, signal
from longspan.train.liveness import InterruptFlag
with InterruptFlag(announce="leaving", debounce_s={debounce_s}) as flag:
    print("ready", flush=True)
    while not flag.requested and not {deaf}:
        time.sleep(0.02)
    sys.stdin.readline()  # the save, which lasts until all of the first Ctrl-C has been delivered
    while {deaf}:
        try:
            time.sleep(60)
        except BaseException:
            pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("left", flag.requested)
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_first_interrupt_is_a_flag_second_ends(deaf: bool) -> None:
    debounce_s = 1.5 if deaf else 60.0  # the three are one, however slowly they come
    code = INTERRUPT.format(deaf=deaf, debounce_s=debounce_s)
    argv, pipe = [sys.executable, "-c", code], subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # one Ctrl-C, delivered three times
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.stderr.readline() == "leaving\n"
    process.stdin.write("saved\n")
    process.stdin.flush()
    if deaf:
        time.sleep(debounce_s + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert (process.returncode, out) == ((INTERRUPTED, "") if deaf else (0, "left True\n"))


def test_only_in_the_main_thread() -> None:
    errors: list[str] = []

    def enter() -> None:
        try:
            InterruptFlag().__enter__()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "enter it there" in errors[0]


def test_report_is_in_the_form_that_torchrun_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    report("rank 1 is gone")
    assert capsys.readouterr().err == "longspan: error: rank 1 is gone\n"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.error_file_data["message"]["message"] == "rank 1 is gone"
    monkeypatch.setenv("LONGSPAN_LAUNCHER_PID", str(os.getppid()))
    report("rank 2 is gone")
    assert capsys.readouterr().err == "" and "rank 2" in path.read_text()
