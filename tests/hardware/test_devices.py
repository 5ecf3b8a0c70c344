"""What the machine has, read where it can be checked: sizes against psutil, peaks against memory really used."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from longspan.bench.timing import release_memory
from longspan.hardware import devices as module
from longspan.hardware.devices import (
    default_device,
    devices,
    links,
    peak_memory_bytes,
    reset_peak_memory,
    resident_bytes,
    versions,
)

MIB = 2**20


def test_the_cpu_comes_first() -> None:
    cpu, *others = devices()
    assert (cpu.kind, cpu.index, cpu.device) == ("cpu", 0, torch.device("cpu"))
    assert cpu.name and 0 < cpu.memory_bytes <= psutil.virtual_memory().total
    assert cpu.num_cores is not None and 1 <= cpu.num_cores <= (os.cpu_count() or 1)
    assert cpu.backends == ("gloo",)
    assert len(others) == torch.cuda.device_count() and all(device.kind == "cuda" for device in others)
    assert f"{cpu.num_cores} cores" in str(cpu)


def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_CGROUP_LIMITS", (limit, tmp_path / "absent"))
    whole = psutil.virtual_memory().total
    for text, expected in (("123456789\n", 123456789), ("max\n", whole), (str(2**63 - 4096), whole)):
        limit.write_text(text)
        assert devices()[0].memory_bytes == expected


def _two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one < other)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    _two_cards(monkeypatch)
    _, first, second = devices()
    assert (first.device, second.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert first.backends == ("nccl", "gloo") and first.compute_capability == (9, 0) and first.num_sms == 132
    assert str(first) == "Card, 132 SMs, compute capability 9.0, 80.0 GiB"
    assert [link.name for link in links() if link.kind == "peer"] == ["cuda:0 -> cuda:1"]


def test_ranks_take_cards_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    _two_cards(monkeypatch)
    assert [default_device(rank) for rank in range(3)] == [torch.device("cuda", i) for i in (0, 1, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device(1) == torch.device("cpu")
    with pytest.raises(ValueError, match="counts from 0, got -1"):
        default_device(-1)


def test_the_peak_is_of_memory_that_was_used() -> None:
    release_memory()  # what earlier tests have left is not to go meanwhile
    if not reset_peak_memory("cpu"):
        pytest.skip("this system does not reset the peak")
    before = peak_memory_bytes("cpu")
    held = resident_bytes("cpu")
    # Pages of its own: the heap may hand out memory that earlier tests have freed, which is resident already.
    with mmap.mmap(-1, 64 * MIB) as used:
        for start in range(0, 64 * MIB, MIB):
            used[start : start + MIB] = b"x" * MIB
        assert 60 * MIB < resident_bytes("cpu") - held < 100 * MIB
    high = peak_memory_bytes("cpu")
    assert 60 * MIB < high - before < 100 * MIB
    assert reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") < high - 32 * MIB


def test_without_proc_the_peak_is_the_kernels_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.Process().memory_info().rss
    monkeypatch.setattr(module, "_STATUS", tmp_path / "absent")
    assert real * 0.9 < peak_memory_bytes("cpu") < real + 64 * 2**30
    assert not reset_peak_memory("cpu")


def test_links_are_up() -> None:
    def up() -> set[str]:
        return {name for name, state in psutil.net_if_stats().items() if state.isup}

    before = up()
    found = [link for link in links() if link.kind != "peer"]
    after = up()  # others may make and remove links at any moment
    assert before & after <= {link.name for link in found} <= before | after
    assert all(link.bytes_per_s is None or link.bytes_per_s > 0 for link in found)


def test_speed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(isup=True, speed=25_000, flags="up,running")
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"eth0": state})
    (link,) = [link for link in links() if link.kind != "peer"]
    assert link.bytes_per_s == 25e9 / 8 and str(link) == "eth0 (network, 25 Gbit/s)"


def test_versions_say_what_is_missing() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ and found["gloo"] == "available"
    if not torch.distributed.is_nccl_available():
        assert found["nccl"] == "not in this build of torch"
    assert all(found.values())
