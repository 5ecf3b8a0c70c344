"""The real command line for tests.

`longspan(...)` runs it in a fresh interpreter, `forked(...)` in a fork of the server that has imported torch already
(`tests.ranks`), which costs a fifth of the time and is the same `main`, in a process and with an exit code of its own.
With `world`, forked ranks meet through torchrun's environment, or Slurm's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from torch._C._distributed_c10d import TCPStore

from tests.processes import left_after
from tests.ranks import _SERVER

ROOT = Path(__file__).parents[1]
LIMIT_S = 90.0  # of one command, far above what it takes: the machine may be busy
END_S = 60.0  # of the end of one, likewise
TINY = (
    "--model.width", "32", "--model.layers", "1", "--model.heads", "2", "--batch.length", "64", "--batch.tokens", "256",
    "--batch.steps", "6", "--eval.tokens", "0", "--data-workers", "0", "--prompt", "",
)  # fmt: skip
_WORDS = "the ring turns and every rank hands its keys and values to the next one while it computes with those it holds"


class Result(NamedTuple):
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def refusal(self, code: int = 2) -> str:
        """The one line on standard error of a command that failed with this code."""
        assert self.code == code, self
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("longspan: error: "), self.err
        assert "Traceback" not in self.out + self.err
        return lines[0].removeprefix("longspan: error: ")

    def good(self) -> Result:
        """Itself, of a command that succeeded and had nothing to complain of."""
        assert self.code == 0, self
        assert "Traceback" not in self.out + self.err and "rror" not in self.err, self
        return self


def text_folder(path: Path, documents: int = 6) -> Path:
    """A folder with a few kilobytes of text, the same in every test."""
    path.mkdir()
    words = _WORDS.split()
    for document in range(documents):
        chosen = [words[(7 * document + number * number) % len(words)] for number in range(150)]
        (path / f"document_{document}.txt").write_text(" ".join(chosen) + "\n")
    return path


def train(out: Path, *options: str) -> list[str]:
    """The arguments of a tiny training run whose data lie beside `out`; later options overrule earlier ones."""
    data = out.parent / "text"
    if not data.exists():
        text_folder(data)
    given = {name for name in options if name.startswith("--")}
    tiny = [part for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in given for part in pair]
    paths = [] if "--data.paths" in given else ["--data.paths", str(data)]
    return ["train", "--out", str(out), *paths, *tiny, *options]


def longspan(*argv: str, env: dict[str, str] | None = None, timeout_s: float = LIMIT_S) -> Result:
    """`python -m longspan ARGV` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "longspan", *argv],
        capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def forked(*argv: str, world: int = 1, slurm: bool = False, timeout_s: float = LIMIT_S) -> Result:
    """`longspan ARGV` in `world` forked processes; the result is rank 0's, and every rank must end as it did.

    Args:
        slurm: the ranks find each other by Slurm's variables, not by torchrun's.
    """
    env: dict[str, str] = {}
    store: TCPStore | None = None
    if world > 1:
        env = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        if slurm:
            env |= {"SLURM_NTASKS": str(world), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
            env |= {"MASTER_PORT": str(free_port())}
        else:
            # The store is here, as torchrun holds it: a port that is only looked up may be another's when it is used.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            env |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.TemporaryDirectory(prefix="longspan-cli-") as folder:
        ranks = [_fork(rank, argv, env, Path(folder)) for rank in range(world)]
        deadline_s = time.monotonic() + timeout_s
        for rank in ranks:
            rank.join(max(0.0, deadline_s - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        said = [[(Path(folder) / f"{rank}.{what}").read_text() for what in ("out", "err")] for rank in range(world)]
    del store
    assert None not in codes, f"not ended after {timeout_s} s: {codes} {said}"
    assert len(set(codes)) == 1, (codes, said)
    return Result(int(codes[0] or 0), *said[0])


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fork(rank: int, argv: tuple[str, ...], env: dict[str, str], folder: Path) -> BaseProcess:
    if env:
        names = ("SLURM_PROCID", "SLURM_LOCALID") if "SLURM_NTASKS" in env else ("RANK", "LOCAL_RANK")
        env = env | dict.fromkeys(names, str(rank))
    process = _SERVER.Process(target=_main, args=(list(argv), env, str(folder / str(rank))), name=f"longspan {rank}")
    process.start()
    return process


def _main(argv: list[str], env: dict[str, str], output: str) -> None:
    for number, what in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{what}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(env)
    from longspan.cli import main

    # As `python -m longspan` does it; multiprocessing turns a SystemExit into the exit code.
    sys.exit(main(argv))


def records(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of a run's metrics."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(out: Path) -> dict[int, float]:
    """Loss by step."""
    return {record["step"]: record["loss"] for record in records(out)}


class Job:
    """A command under way, with the ranks that it started."""

    def __init__(self, out: Path, argv: list[str]) -> None:
        self.out = out
        # Rank logs and locks go where the test can see that nothing is left.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "longspan", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(out.parent)},
        )  # fmt: skip
        self.seen: set[int] = set()

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        return int(json.loads((self.out / "heartbeats" / f"rank_{number:05d}.json").read_bytes())["pid"])

    def wait_for(self, step: int) -> Job:
        """Until the metrics hold this step."""
        deadline_s = time.monotonic() + LIMIT_S
        while not (self.out / "metrics.jsonl").exists() or max(losses(self.out), default=0) < step:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"step {step} was not reached: {self.process.communicate(timeout=5)}")
            time.sleep(0.05)
        self.seen = {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return self

    def end(self) -> Result:
        """Waits for the end of the command; nothing that it started may be left."""
        out, err = self.process.communicate(timeout=END_S)
        self.leave_nothing()
        assert "Traceback" not in out + err, out + err
        return Result(self.process.returncode, out, err)

    def leave_nothing(self) -> None:
        """Waits for the end of all that the command started: data workers end when they see that their rank has."""
        left = left_after(self.seen)
        assert not left, f"orphans: {left}"


@contextlib.contextmanager
def job(out: Path, *argv: str) -> Iterator[Job]:
    """Starts `longspan ARGV`, whose run folder is `out`, and leaves no process behind."""
    one = Job(out, list(argv))
    try:
        yield one
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.seen |= {child.pid for child in psutil.Process(one.process.pid).children(recursive=True)}
        for pid in one.seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.kill()
        one.process.communicate()
