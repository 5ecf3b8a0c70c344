"""Who a rank is, and what happens to a job when one rank is killed, stopped or interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.train.checkpoint import CheckpointStore
from longspan.train.launch import Launch, discover, init_process_group, local_ranks
from longspan.train.liveness import INTERRUPTED
from longspan.train.slurm import parse_counts, parse_nodelist, slurm_port
from tests.processes import left_after
from tests.ranks import run_ranks
from tests.train.toy import build

ROOT = Path(__file__).parents[2]
LIMIT_S = 90.0  # of one job, far above what it takes: the machine may be busy
END_S = 60.0  # of its end

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29511",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[08-10],big1",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
}


# ---------------------------------------------------------------- the environment


def test_discover() -> None:
    assert discover({}) == Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, how="single")
    assert discover(TORCHRUN | SLURM) == Launch(
        rank=5, world_size=8, local_rank=1, local_world_size=4, how="torchrun", master_addr="node7", master_port=29511
    )
    launch = discover(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (3, 7, 1, 2)
    assert (launch.how, launch.master_addr) == ("slurm", "gpu08") and launch.master_port == slurm_port(123456, 0)
    # The four variables that every version sets are enough; a step on part of the nodes goes before the job.
    least = {name: SLURM[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")}
    assert discover(least).local_world_size == 2
    assert discover(SLURM | {"SLURM_STEP_NODELIST": "gpu[09-10]"}).master_addr == "gpu09"
    # A batch script has these as well, and no task beside it; ranks of its own are for it to start.
    for batch in (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}):
        assert discover(batch) == discover({})
    given_address = discover(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (given_address.master_addr, given_address.master_port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is missing"),
        (TORCHRUN | {"RANK": "first"}, "RANK must be a number, got 'first'"),
        (TORCHRUN | {"RANK": "8"}, r"rank must be in 0\.\.7, got 8"),
        (SLURM | {"SLURM_JOB_NODELIST": "gpu[08-"}, "host list"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_JOB_NODELIST is missing"),
    ],
)
def test_an_environment_that_does_not_add_up_is_refused(env: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        discover(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("a-b[9-11]", ["a-b9", "a-b10", "a-b11"]),
        ("r[1-2]n[08,10]", ["r1n08", "r1n10", "r2n08", "r2n10"]),
        ("x[1-2].lab,y[0]", ["x1.lab", "x2.lab", "y0"]),
    ],
)
def test_nodelist(text: str, hosts: list[str]) -> None:
    assert parse_nodelist(text) == hosts


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), min_size=1, max_size=4), st.integers(1, 4))
def test_nodelist_is_the_list_it_stands_for(ranges: list[tuple[int, int]], width: int) -> None:
    text = ",".join(
        f"{first:0{width}}-{first + more:0{width}}" if more else f"{first:0{width}}" for first, more in ranges
    )
    expected = [f"n{number:0{width}}" for first, more in ranges for number in range(first, first + more + 1)]
    assert parse_nodelist(f"n[{text}]") == expected


@pytest.mark.parametrize("text", ["", "node[", "node[1", "node]", "node[3-1]", "node[a-b]", "n[1]]"])
def test_nodelist_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="Slurm"):
        parse_nodelist(text)


def test_counts_and_ports() -> None:
    assert parse_counts("2(x3),1") == [2, 2, 2, 1] and parse_counts("") == []
    with pytest.raises(ValueError, match="tasks per node"):
        parse_counts("2x3")
    ports = {slurm_port(job, step) for job in range(1000, 1040) for step in range(8)}
    assert len(ports) == 40 * 8 and all(15000 <= port < 32000 for port in ports)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="--ranks must be 1 or more, got 0"):
        local_ranks(0, [])
    with pytest.raises(ValueError, match="above 0 s"):
        init_process_group(0)
    with pytest.raises(ValueError, match="auto, cpu or cuda, got 'tpu'"):
        init_process_group(1, device="tpu")


def join_by_slurm(rank: int, world: int, job: int) -> float:
    import torch
    import torch.distributed as dist

    dist.destroy_process_group()
    env = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world), "SLURM_LOCALID": str(rank)}
    env |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(job)}
    joined = init_process_group(50, launch=discover(env), device="cpu")
    assert joined.device.type == "cpu" and not joined.staged
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    return total.item()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def test_ranks_meet_under_slurm() -> None:
    # Some containers hand these ports out to outgoing connections as well: a job whose port is free at this moment.
    job = next(job for job in range(os.getpid(), os.getpid() + 100) if is_free(slurm_port(job, 0)))
    assert run_ranks(join_by_slurm, 2, job) == [3.0, 3.0]


# ---------------------------------------------------------------- jobs


class Job:
    """A job of the toy under `local_ranks`, in a process of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.toy", str(directory), "--ranks", "2", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(directory)},
        )
        self.pids: list[int] = []

    def wait_for(self, step: int) -> Job:
        """Until both ranks are past this step."""
        losses = self.directory / "losses"
        deadline_s = time.monotonic() + LIMIT_S
        while not losses.exists() or len(losses.read_text().splitlines()) <= step:
            assert time.monotonic() < deadline_s and self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        self.pids = [int((self.directory / f"pid_{rank}").read_text()) for rank in range(2)]
        return self

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=END_S)
        assert not left_after(self.pids), "orphans"
        assert "Traceback" not in out + err
        return self.process.returncode, out, err


@contextmanager
def job(directory: Path, *options: str) -> Iterator[Job]:
    directory.mkdir()
    one = Job(directory, *options)
    try:
        yield one
    finally:
        for pid in one.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.kill()
        one.process.communicate()


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


LEAVING = """
import os, signal, sys, time
from pathlib import Path
rank, how = os.environ["RANK"], sys.argv[2]
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(True))
(Path(sys.argv[1]) / f"up_{rank}").write_text("")
while not asked:
    time.sleep(0.01)
if how == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "interrupt":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
if how == "message" and rank == "1":
    print("longspan: error: the checkpoint could not be saved", file=sys.stderr)
    sys.exit(1)
sys.exit({"130": 130, "message": 0 if rank == "0" else 1}.get(how, 0))
"""


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("message", 1, "rank 1 ended with exit code 1: the checkpoint could not be saved "),
        ("killed", 137, "rank 1 was killed by signal 9 (SIGKILL)"),
        ("130", 130, ""),
        ("interrupt", 130, ""),
        ("well", 130, ""),
    ],
)
def test_a_failure_after_an_interrupt_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str, code: int, words: str
) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def interrupt() -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while len(list(tmp_path.glob("up_*"))) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert local_ranks(2, [str(tmp_path), how], command=(str(script),), hint=lambda: "go on") == code
    finally:
        thread.join()
    err = capfd.readouterr().err
    if words:
        assert one_line(err).startswith(f"longspan: error: {words}") and one_line(err).endswith("; go on")
    else:
        assert err == ""


def test_a_killed_rank_is_named_and_the_job_resumes(tmp_path: Path) -> None:
    # That the job ends in END_S shows that nobody waits for the time-out of a collective.
    with job(tmp_path / "run", "--steps", "1000", "--pause", "0.02", "--shard", "--timeout", "90") as running:
        running.wait_for(7)
        os.kill(running.pids[1], signal.SIGKILL)
        code, _, err = running.end()
    assert code == 128 + signal.SIGKILL
    assert one_line(err).startswith("longspan: error: rank 1 was killed by signal 9 (SIGKILL)")
    assert one_line(err).endswith("continue with --resume latest")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    step = store.load(None, *build(False, 1))["step"]
    assert step >= 3


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    with job(tmp_path / "run", "--steps", "1000", "--pause", "0.02", "--timeout", "4") as running:
        running.wait_for(3)
        os.kill(running.pids[1], signal.SIGSTOP)
        start_s = time.monotonic()
        code, _, err = running.end()
        assert time.monotonic() - start_s < 30
    assert code == 1
    assert "longspan: error: rank 1 has not answered for " in one_line(err)
    assert "s (stopped or hung) at step " in err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_job_saves_and_leaves(tmp_path: Path, number: int) -> None:
    with job(tmp_path / "run", "--steps", "1000", "--pause", "0.05", "--save-every", "1000") as running:
        running.wait_for(2)
        running.process.send_signal(number)
        code, out, err = running.end()
    assert code == INTERRUPTED and one_line(err) == "leaving"
    step = CheckpointStore(tmp_path / "run" / "checkpoints").load(None, *build(False, 1))["step"]
    assert 2 <= step < 999 and out.split() == ["left", "at", "step", str(step), "landed"]


@pytest.mark.slow
def test_a_rank_that_raises_is_quoted(tmp_path: Path) -> None:
    with job(tmp_path / "run", "--raise-at", "1") as running:
        code, _, err = running.end()
    assert code == 2 and one_line(err) == "longspan: error: the data file is empty"


@pytest.mark.slow
def test_nothing_is_said_or_left_after_a_good_run(tmp_path: Path) -> None:
    with job(tmp_path / "run", "--steps", "2") as running:
        assert running.end() == (0, "left at step 1 landed\n", "")
    assert not list((tmp_path / "run").glob("longspan-ranks-*"))
