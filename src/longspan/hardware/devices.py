"""What this machine has: devices, memory, links between them, and the versions of what drives them.

Everything is read, nothing is measured: a peer link says that one card can address another's memory, not how fast.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device that can hold tensors.

    Attributes:
        kind: "cpu" or "cuda".
        index: number among the CUDA devices, 0 for the CPU.
        name: what its maker calls it.
        memory_bytes: all of it; for the CPU what this process may use (a container's limit counts).
        num_cores: cores this process may run on; None for CUDA.
        num_sms: streaming multiprocessors; None for the CPU.
        compute_capability: (major, minor); None for the CPU.
        backends: process-group back ends that can carry its tensors. For CUDA tensors gloo goes through pinned host
            memory.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int
    num_cores: int | None = None
    num_sms: int | None = None
    compute_capability: tuple[int, int] | None = None
    backends: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        if self.kind == "cpu":
            return f"{self.name}, {self.num_cores} cores, {memory}"
        assert self.compute_capability is not None
        major, minor = self.compute_capability
        return f"{self.name}, {self.num_sms} SMs, compute capability {major}.{minor}, {memory}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A way for bytes between ranks. ``bytes_per_s`` is None where the system does not say.

    kind: "loopback" and "network" are interfaces that are up; "peer" joins two CUDA devices of which the first can
    address the second's memory, over NVLink or PCIe (torch does not say which).
    """

    kind: Literal["loopback", "network", "peer"]
    name: str
    bytes_per_s: float | None = None

    def __str__(self) -> str:
        speed = "speed not stated" if self.bytes_per_s is None else f"{self.bytes_per_s * 8 / 1e9:g} Gbit/s"
        return f"{self.name} ({self.kind}{'' if self.kind != 'network' else f', {speed}'})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine() or "CPU")


def device_name(device: torch.device) -> str:
    """What its maker calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _host_memory_bytes() -> int:
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is no limit
            total = min(total, int(text))
    return total


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[Device]:
    """The devices of this machine: its CPU, then its CUDA devices by number."""
    gloo = ("gloo",) if dist.is_available() and dist.is_gloo_available() else ()
    found = [
        Device(
            kind="cpu",
            index=0,
            name=_cpu_name(),
            memory_bytes=_host_memory_bytes(),
            num_cores=_num_cores(),
            backends=gloo,
        )
    ]
    nccl = ("nccl",) if dist.is_available() and dist.is_nccl_available() else ()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Device(
                kind="cuda",
                index=index,
                name=properties.name,
                memory_bytes=properties.total_memory,
                num_sms=properties.multi_processor_count,
                compute_capability=(properties.major, properties.minor),
                backends=nccl + gloo,
            )
        )
    return found


def default_device(local_rank: int = 0) -> torch.device:
    """The device of a rank: its CUDA device, in turn where ranks outnumber them (they share cards then), else the CPU.

    Args:
        local_rank: number of the rank on this machine.

    Raises:
        ValueError: local_rank is negative.
    """
    if local_rank < 0:
        raise ValueError(f"local_rank counts from 0, got {local_rank}; pass the rank's number on its machine")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def resident_bytes(device: torch.device | str) -> int:
    """The memory this process holds on a device now: what tensors take of a GPU, what is resident on the CPU."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory this process has held on a device.

    CUDA: the most that tensors took at once since the last ``reset_peak_memory``. CPU: the most that was resident, of
    the whole process, interpreter and libraries included, since its start or since a reset that worked.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    if peaks:
        return peaks[0]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device | str) -> bool:
    """Starts the peak of ``peak_memory_bytes`` anew. Returns whether the system allows it (for the CPU, Linux does)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        has_peak = "VmHWM:" in _STATUS.read_text()
        _CLEAR.write_text("5")  # 5: the resident high-water mark alone, see proc_pid_clear_refs(5)
    except OSError:
        return False
    return has_peak


def links() -> list[Link]:
    """Network interfaces that are up, and pairs of CUDA devices with peer access."""
    found: list[Link] = []
    for name, state in sorted(psutil.net_if_stats().items()):
        if state.isup:
            loopback = "loopback" in state.flags.split(",") or name == "lo"
            speed = state.speed * 1e6 / 8 if state.speed > 0 else None  # psutil says Mbit/s, 0 for unknown
            found.append(Link(kind="loopback" if loopback else "network", name=name, bytes_per_s=speed))
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for one in range(num_cuda):
        for other in range(num_cuda):
            if one != other and torch.cuda.can_device_access_peer(one, other):
                found.append(Link(kind="peer", name=f"cuda:{one} -> cuda:{other}"))
    return found


def versions() -> dict[str, str]:
    """What runs: Python, torch, the system, and of the back ends their version or why they cannot be used."""
    available = dist.is_available()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gloo": "available" if available and dist.is_gloo_available() else "not in this build of torch",
        "nccl": "not in this build of torch",
        "cuda": torch.version.cuda or "not in this build of torch",
    }
    if available and dist.is_nccl_available():
        from torch.cuda import nccl

        found["nccl"] = ".".join(map(str, nccl.version()))
    if torch.version.cuda and not torch.cuda.is_available():
        found["cuda"] += ", but no usable device"
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()
        found["cudnn"] = "not in this build of torch" if cudnn is None else str(cudnn)
    return found
