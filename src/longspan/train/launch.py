"""Starting ranks and joining them: torchrun's environment, Slurm's, local ranks under torch's elastic launcher, or one.

`longspan train --ranks N` is `local_ranks(N, argv)`, which runs `python -m longspan ...` N times; in each of them, as
under torchrun or srun, `discover()` reads who it is and `init_process_group()` joins the others. No port is fixed:
torch's rendezvous picks one, and under Slurm it follows from the job's id.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from longspan.train.liveness import INTERRUPTED, LAUNCHER_PID, LostRankError
from longspan.train.slurm import parse_counts, parse_nodelist, slurm_port

# How ranks end that were asked to leave, by a Ctrl-C passed on or by the launcher.
_ASKED_TO = (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
_SHUTDOWN_S = 15  # torch waits 30 s by default for ranks that were told to end


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Who this process is among those of the job, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    how: Literal["torchrun", "slurm", "single"]
    master_addr: str | None = None
    master_port: int | None = None

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
            ("local world size - 1", self.local_world_size - 1, self.world_size),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{self.how}: {name} must be in 0..{limit - 1}, got {value}; check its environment")


def discover(env: Mapping[str, str] = os.environ) -> Launch:
    """Reads torchrun's variables if they are there, else Slurm's of several tasks, else it is a single process.

    Raises:
        ValueError: names the variable that is missing or not a number.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return Launch(
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK"),
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "WORLD_SIZE")),
            how="torchrun",
            master_addr=_text(env, "MASTER_ADDR"),
            master_port=_number(env, "MASTER_PORT"),
        )
    # A batch script has SLURM_PROCID too. One task is alone: no others to meet, and it may start ranks of its own.
    if "SLURM_PROCID" in env and (world_size := _number(env, "SLURM_NTASKS", 1)) > 1:
        hosts = parse_nodelist(env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST"))
        local_rank = _number(env, "SLURM_LOCALID")
        counts = parse_counts(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
        node = _number(env, "SLURM_NODEID", 0)
        # Without the table of tasks a node, they are spread evenly, which is Slurm's default.
        local = counts[node] if node < len(counts) else math.ceil(world_size / len(hosts))
        return Launch(
            rank=_number(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=max(local, local_rank + 1),
            how="slurm",
            master_addr=env.get("MASTER_ADDR") or hosts[0],
            master_port=_number(
                env, "MASTER_PORT", slurm_port(_number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0))
            ),
        )
    return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, how="single")


def _text(env: Mapping[str, str], name: str) -> str:
    if not (value := env.get(name)):
        raise ValueError(
            f"the environment says ranks were launched, but {name} is missing; start with torchrun or srun"
        )
    return value


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in env:
        return default
    value = _text(env, name)
    if not re.fullmatch(r"\d+", value):
        raise ValueError(f"{name} must be a number, got {value!r}; start with torchrun or srun")
    return int(value)


class Joined(NamedTuple):
    """Where this rank computes, and how its tensors travel."""

    device: torch.device
    staged: bool  # several ranks share one GPU: NCCL refuses that, so tensors go through host memory and gloo


def init_process_group(timeout_s: float, *, launch: Launch | None = None, device: str = "auto") -> Joined:
    """Joins the ranks of the job in torch's default group.

    On CPU the back end is gloo. On CUDA with a GPU for each rank: NCCL for CUDA tensors, gloo for CPU tensors. Where
    ranks share a GPU: gloo, and `staged` is True.

    Args:
        timeout_s: limit of a collective, and of the ranks' meeting.
        device: "cpu", "cuda", or "auto" (CUDA where it is).

    Raises:
        ValueError: unknown device, or CUDA asked for and absent, or a time-out not above 0.
        LostRankError: the ranks did not meet in time.
    """
    if timeout_s <= 0:
        raise ValueError(f"a time-out must be above 0 s, got {timeout_s}; the default of --timeout-s is a good start")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}; choose one of the three")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and torch sees no CUDA device; use --device cpu or auto")
    launch = discover() if launch is None else launch
    limit = timedelta(seconds=timeout_s)
    cuda = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", launch.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    try:
        store = _store(launch, limit)
        staged = cuda and _share_a_gpu(store, launch, here)
        backend = "cpu:gloo,cuda:nccl" if cuda and not staged else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("longspan", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=limit,
        )
    except (dist.DistError, RuntimeError) as error:
        raise LostRankError(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {launch.master_addr}:"
            f"{launch.master_port} within {timeout_s:g} s ({str(error).strip().splitlines()[0][:120]}); were all "
            "started, with torchrun or srun?"
        ) from error
    return Joined(here, staged)


def _store(launch: Launch, limit: timedelta) -> Store:
    if launch.how == "single":
        return HashStore()
    if launch.how == "torchrun":
        # torch's own way in: the launcher may already hold the store's server.
        return next(iter(rendezvous("env://", launch.rank, launch.world_size, timeout=limit)))[0]
    assert launch.master_addr is not None and launch.master_port is not None
    return TCPStore(launch.master_addr, launch.master_port, launch.world_size, launch.rank == 0, limit)


def _share_a_gpu(store: Store, launch: Launch, here: torch.device) -> bool:
    # By identity, not by counting: Slurm may show each rank its own GPU as device 0.
    mine = f"{socket.gethostname()}/{torch.cuda.get_device_properties(here).uuid}"
    store.set(f"longspan/gpu/{launch.rank}", mine)
    gpus = [store.get(f"longspan/gpu/{rank}") for rank in range(launch.world_size)]
    return len(set(gpus)) < len(gpus)


# -------------------------------------------------------------------- local ranks


def local_ranks(
    num_ranks: int,
    argv: Sequence[str],
    *,
    command: Sequence[str] = ("-m", "longspan"),
    log_dir: str | Path | None = None,
    hint: Callable[[], str] = lambda: "",
) -> int:
    """Runs `python COMMAND ARGV` on `num_ranks` ranks of this machine and returns the exit code of the whole.

    Rank 0 keeps this process's terminal; the others' output goes to files. When one rank fails all are ended, and one
    line on standard error says which one and why. Ctrl-C and SIGTERM are passed on as SIGINT, so that the ranks save
    and leave (see `InterruptFlag`), and the exit code is 130, unless a rank failed for a reason of its own.

    Args:
        argv: of the command, such as `["train", "--steps", "100"]`.
        log_dir: for the other ranks' output; None: a temporary directory, kept only when a rank fails.
        hint: its words are added to the line about a lost rank, such as how to resume.

    Raises:
        ValueError: fewer than one rank.
    """
    if num_ranks < 1:
        raise ValueError(f"--ranks must be 1 or more, got {num_ranks}")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = Path(tempfile.mkdtemp(prefix="longspan-ranks-") if log_dir is None else log_dir)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"longspan-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects={rank: Std.ALL if rank else Std.NONE for rank in range(num_ranks)}
        ),
    )
    if hasattr(config, "shutdown_timeout"):  # not in every torch from 2.11 on
        config.shutdown_timeout = _SHUTDOWN_S
    # torch substitutes ${...} in arguments; a dollar of the user's is a dollar.
    arguments = [argument.replace("$", "$$") for argument in (*command, *argv)]
    keep_logs = log_dir is not None
    with _passing_on_signals() as interrupts, _environment(num_ranks), _quiet_torch(), _ending_the_stopped():
        try:
            elastic_launch(config, sys.executable)("-u", *arguments)
        except ChildFailedError as error:
            failures = {rank: failure for rank, failure in error.failures.items() if failure.exitcode not in _ASKED_TO}
            if interrupts and not failures:
                return INTERRUPTED
            keep_logs = True
            code, line = _explain(failures if interrupts else error.failures, logs)
            # Exit code 2 is the user's error: to resume would only meet it again.
            what_next = f"; {words}" if code != 2 and (words := hint()) else ""
            print(f"longspan: error: {line}{what_next}", file=sys.stderr, flush=True)
            return code
        except (KeyboardInterrupt, SignalException):
            return INTERRUPTED
        finally:
            if not keep_logs:
                shutil.rmtree(logs, ignore_errors=True)
    return INTERRUPTED if interrupts else 0


def _explain(failures: Mapping[int, Any], logs: Path) -> tuple[int, str]:
    """Exit code and words for the rank that failed first: those after it were ended because of it."""
    rank, failure = next(iter(failures.items()))
    found = sorted(logs.glob(f"longspan-{os.getpid()}_*/attempt_0/{rank}/stderr.log"))
    where = f" (its output: {found[-1]})" if found else ""
    if failure.exitcode < 0:
        number = -failure.exitcode
        memory = "; if nobody sent it, the machine ran out of memory" if number == signal.SIGKILL else ""
        return 128 + number, f"rank {rank} was killed by signal {number} ({failure.signal_name()}){memory}{where}"
    if isinstance(failure.message, dict):
        return failure.exitcode, str(failure.message["message"])
    text = found[-1].read_text(errors="replace").strip() if found else ""
    last = f": {text.splitlines()[-1].removeprefix('longspan: error: ')}" if text else ""
    return failure.exitcode, f"rank {rank} ended with exit code {failure.exitcode}{last}{where}"


@contextmanager
def _passing_on_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to the ranks as SIGINT, and the list of those received is the value.

    torch would end the ranks within seconds of the first; a step and a save may take longer. Ranks lead sessions of
    their own, so that the terminal's Ctrl-C reaches this process only.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        ranks = psutil.Process().children()
        if not ranks or len(received) > 2:
            raise KeyboardInterrupt
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(num_ranks: int) -> Iterator[None]:
    """What the ranks inherit: who started them, cores shared fairly, and loopback for gloo on one machine."""
    threads = max(1, len(psutil.Process().cpu_affinity()) // num_ranks) if sys.platform == "linux" else 1
    ours = {LAUNCHER_PID: str(os.getpid()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if sys.platform == "linux":
        # Else gloo resolves the machine's name, which some containers cannot.
        ours["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch's launcher logs every signal that it sends; the one line of `local_ranks` says what a person needs."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        # It also leaves it to Python to close the ranks' log files, for which Python warns.
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _ending_the_stopped() -> Iterator[None]:
    """SIGKILL for ranks that are stopped (SIGSTOP) and were told to end, which they cannot hear.

    torch does so too, after 30 s that no option of its launcher shortens when a rank has failed.
    """
    done = threading.Event()
    launcher = psutil.Process()

    def watch() -> None:
        while not done.wait(1.0):
            for rank in launcher.children():
                with suppress(psutil.NoSuchProcess):
                    if rank.status() == psutil.STATUS_STOPPED and _is_pending(rank.pid, signal.SIGTERM):
                        rank.kill()

    thread = threading.Thread(target=watch, name="longspan-stopped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_pending(pid: int, number: signal.Signals) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # not Linux, or gone: torch's own limit holds
        return False
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
