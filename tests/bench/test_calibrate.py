"""Calibration: a real quick one on the CPU, and that a device made of known costs is found again."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.bench import calibrate as calibrating
from longspan.bench import kernels, timing
from longspan.bench.calibrate import Calibration, calibrate
from longspan.bench.kernels import KernelBenchConfig, run_kernel_bench
from longspan.context.choose import here
from longspan.context.costs import shapes
from longspan.hardware.fit import Measurement
from longspan.hardware.profile import DeviceProfile, KernelProfile, make_profile
from longspan.hardware.saved import profile_path, saved_profile

CPU = torch.device("cpu")
HEADS: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 16}


def found(error: float) -> Calibration:
    return Calibration(make_profile("cpu"), [], [0.0, error, -9 * error])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_one_predicts_what_it_measured(dtype: torch.dtype, monkeypatch) -> None:
    # In processor time, of the one thread that tests have: others on a busy machine scatter the clock's by half.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.process_time))
    said: list[str] = []
    sizes: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 32, "copy_bytes": 1 << 24, "repetitions": 3}
    got = calibrate(CPU, dtype, **sizes, sizes=(64, 256, 512), say=said.append)
    profile = got.profile
    assert len(got.measurements) == 2 * (9 + 3 + 3) == len(got.errors) and len(said) == 30 + 3
    masked = [(m.rows, m.keys, m.mask, m.heads) for m in got.measurements if m.mask]
    assert masked == [(64, keys, 64 * keys, 1) for keys in (512, 256, 64) for _ in range(2)]
    assert sum("masked" in line for line in said) == 6 and sum("causal" in line for line in said) == 6
    assert profile.forward.mask_s + 64 * 512 * profile.forward.element_s > 2e-5  # some 0.2 ms where it is quiet
    assert profile.kernel == "cpu_flash" and profile.name in said[-1] and "worst" in said[-1]
    assert 1e8 < profile.memory_bytes_per_s < 1e13 and 0 <= profile.block_s < 0.1
    assert got.median_error < 0.5
    assert profile.peak_flop_per_s[0][0] == str(dtype).removeprefix("torch.")
    assert DeviceProfile.from_json(profile.to_json()) == profile


TRUTH = dataclasses.replace(
    make_profile("cpu"),
    forward=KernelProfile(efficiency=0.4, row_keys=60, key_rows=20, call_s=3e-4, mask_s=2e-4, element_s=6e-9),
    backward=KernelProfile(efficiency=0.3, row_keys=30, key_rows=10, call_s=5e-4, mask_s=1e-4, element_s=5e-9),
    memory_bytes_per_s=2e10,
    block_s=2e-3,
)


class Told:
    """In place of the measurements: what a device of known costs would take."""

    def __init__(self, kernel, device, dtype, heads, kv_heads, head_dim, repetitions) -> None:
        self.heads = heads

    def copy_bytes_per_s(self, num_bytes: int) -> float:
        return TRUTH.memory_bytes_per_s

    def block_s(self, tokens: int, device: DeviceProfile) -> float:
        return TRUTH.block_s

    def call(self, band, device: DeviceProfile) -> list:
        (shape,) = shapes((band,), "cpu_flash")
        blank = Measurement(*shape[:3], 0.0, self.heads, 16, False, shape.diagonals, shape.mask)
        return [
            blank._replace(
                seconds=TRUTH.kernel_s([shape], heads=self.heads, head_dim=16, dtype="float32", backward=backward),
                backward=backward,
            )
            for backward in (False, True)
        ]


def test_known_costs_are_found_again(monkeypatch) -> None:
    monkeypatch.setattr(calibrating, "_Bench", Told)
    got = calibrate(CPU, torch.float32, **HEADS)
    assert got.median_error < 1e-6
    for mine, truth in ((got.profile.forward, TRUTH.forward), (got.profile.backward, TRUTH.backward)):
        assert dataclasses.astuple(mine) == pytest.approx(dataclasses.astuple(truth), rel=1e-4)
    assert (got.profile.memory_bytes_per_s, got.profile.block_s) == (2e10, 2e-3)


def test_a_device_that_is_slow_for_a_while_is_so_to_all_calls(monkeypatch) -> None:
    """Two rounds of five take three times as long: no call's median sees them."""
    seen: list[Any] = []

    class Slow(Told):
        def call(self, band, device: DeviceProfile) -> list:
            seen.append(band)
            factor = 3 if seen.count(band) in (2, 4) else 1
            return [m._replace(seconds=factor * m.seconds) for m in super().call(band, device)]

    monkeypatch.setattr(calibrating, "_Bench", Slow)
    got = calibrate(CPU, torch.float32, **HEADS, repetitions=5)
    assert got.median_error < 1e-6 and max(map(abs, got.errors)) < 1e-6
    once = len(seen) // 5
    assert seen == 5 * seen[:once] and len(set(seen[:once])) == once


def test_a_kernel_that_takes_windows_has_no_masks_to_measure(monkeypatch) -> None:
    class Cudnn:
        name = "cudnn"

    monkeypatch.setattr(calibrating, "pick", lambda probe, softcap: Cudnn())
    monkeypatch.setattr(calibrating, "_Bench", Told)
    got = calibrate(CPU, torch.float32, **HEADS)
    assert got.profile.kernel == "cudnn" and not any(m.mask for m in got.measurements)
    assert (got.profile.forward.mask_s, got.profile.backward.element_s) == (0, 0)


def test_widening_is_counted_as_traffic() -> None:
    bench = calibrating._Bench(None, CPU, torch.bfloat16, 2, 1, 16, 1)  # type: ignore[arg-type]
    assert bench.widened == 6
    assert dataclasses.replace(bench, dtype=torch.float32).widened == 0


def test_a_kernel_that_profiles_do_not_describe_is_refused() -> None:
    class Other:
        name = "reference"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "pick", lambda probe, softcap: Other())
        with pytest.raises(ValueError, match=r"takes reference; calibrate in another --dtype"):
            calibrate(CPU, torch.float32, **HEADS)


def test_a_good_fit_is_saved_and_a_bad_one_is_not(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = KernelBenchConfig(device="cpu", save_profile=True)
    monkeypatch.setattr(kernels, "calibrate", lambda *args, **options: found(0.16))
    with pytest.raises(ValueError, match=r"must be at most 15%, got 16.0%"):
        run_kernel_bench(config)
    assert saved_profile(CPU) is None
    mine = dataclasses.replace(make_profile("cpu"), name="mine")
    monkeypatch.setattr(kernels, "calibrate", lambda *args, **options: found(0.14)._replace(profile=mine))
    assert run_kernel_bench(config) == 0
    assert str(profile_path(CPU)) in capsys.readouterr().out
    assert here(2, CPU, dtype=torch.float32, head_dim=16).device == mine
    elsewhere = tmp_path / "folder" / "other.json"
    assert run_kernel_bench(dataclasses.replace(config, profile=elsewhere)) == 0
    assert make_profile(elsewhere) == mine
