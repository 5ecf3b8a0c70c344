"""Taking times and memory of one step on one device.

On CUDA times are between two events on the stream, with a large matrix product queued in front: while the device works
on it the host runs ahead, so that what is timed is the device, as in a model that keeps it busy. A step that needs the
host longer than that shows it. On the CPU they are of the clock.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable

import torch

from longspan.hardware.devices import peak_memory_bytes, reset_peak_memory, resident_bytes

_AHEAD = 8192  # rows of the square matrices whose product the device works on meanwhile: 1 to 10 ms
Step = Callable[[], object]


def times_s(step: Step, device: torch.device, repetitions: int, *, calls: int = 1) -> list[float]:
    """Seconds of a step, one figure a repetition: the mean over ``calls`` of them, one after another.

    The step must have run before: compilers and caches are not to be measured.
    """
    if device.type != "cuda":
        found = []
        for _ in range(repetitions):
            start_s = time.perf_counter()
            for _ in range(calls):
                step()
            found.append((time.perf_counter() - start_s) / calls)
        return found
    with torch.cuda.device(device):
        ahead = torch.zeros(_AHEAD, _AHEAD, dtype=torch.bfloat16, device=device)
        pairs = []
        for _ in range(repetitions):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.mm(ahead, ahead)
            start.record()
            for _ in range(calls):
                step()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 / calls for start, stop in pairs]


def added_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step holds beyond what is held before it."""
    release_memory()
    before = resident_bytes(device)
    reset_peak_memory(device)
    result = step()
    peak = peak_memory_bytes(device)
    del result
    return max(0, peak - before)


def release_memory() -> None:
    """What earlier steps have left in the C library's pools goes back to the system, where it is glibc: else the next
    peak would hide in it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
