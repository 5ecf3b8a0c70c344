"""Times and memory of a step: what is counted, on the CPU."""

from __future__ import annotations

import time

import torch

from longspan.bench.timing import added_bytes, times_s

CPU = torch.device("cpu")


def test_a_time_is_the_mean_of_its_calls() -> None:
    calls = []
    found = times_s(lambda: calls.append(time.sleep(0.01)), CPU, 3, calls=2)
    assert len(found) == 3 and len(calls) == 6
    assert all(0.01 <= seconds < 1 for seconds in found)


def test_memory_is_what_a_step_adds() -> None:
    held = torch.ones(1 << 24, dtype=torch.uint8)
    added = added_bytes(lambda: torch.ones(1 << 26, dtype=torch.uint8), CPU)
    assert 0.9 * (1 << 26) < added < 2 * (1 << 26)
    assert held.numel() == 1 << 24
