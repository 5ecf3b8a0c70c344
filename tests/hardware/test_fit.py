"""The fit of a device profile: it finds what measurements were made of, and says how far off it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from longspan.hardware.fit import Measurement, fit_profile, relative_errors
from longspan.hardware.profile import DeviceProfile, KernelProfile, Shape, make_profile


def measured(device: DeviceProfile, noise: float = 0.0, dtype: str = "bfloat16") -> list[Measurement]:
    rng, rows = np.random.default_rng(0), []
    for num_q, num_k in [(100, 100), (1000, 100), (100, 1000), (3000, 3000), (500, 4000), (4000, 500), (64, 9000)]:
        for backward in (False, True):
            for diagonals in (0, 1) if num_q == num_k else (0,):
                area = num_q * (num_k + 1) // 2 if diagonals else num_q * num_k
                shape = [Shape(num_q, num_k, area, diagonals)]
                time_s = device.kernel_s(shape, heads=3, head_dim=64, dtype=dtype, backward=backward)
                time_s *= 1 + noise * rng.standard_normal()
                rows.append(Measurement(num_q, num_k, area, time_s, 3, 64, backward, diagonals))
    return rows


def test_the_fit_finds_what_the_measurements_were_made_of() -> None:
    truth = dataclasses.replace(
        make_profile("h200"),
        forward=KernelProfile(efficiency=0.6, row_keys=200, key_rows=30, call_s=2e-5),
        backward=KernelProfile(efficiency=0.4, row_keys=500, key_rows=0, call_s=3e-5),
    )
    fitted = fit_profile(measured(truth), make_profile("h200"), name="mine")
    assert fitted.name == "mine"
    for got, expected in ((fitted.forward, truth.forward), (fitted.backward, truth.backward)):
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected), rel=1e-6, abs=1e-9)
    noisy = fit_profile(measured(truth, noise=0.02), make_profile("h200"), name="mine")
    assert noisy.forward.efficiency == pytest.approx(0.6, rel=0.1)
    assert min(noisy.forward.row_keys, noisy.forward.key_rows, noisy.backward.key_rows, noisy.forward.call_s) >= 0


def test_the_price_of_masks_is_found_beside_the_rest() -> None:
    like = make_profile("cpu")
    truth = dataclasses.replace(
        like,
        forward=KernelProfile(efficiency=0.6, row_keys=30, key_rows=20, call_s=1e-5, mask_s=6e-5, element_s=4e-9),
        backward=KernelProfile(efficiency=0.7, row_keys=10, key_rows=30, call_s=2e-5, mask_s=0.0, element_s=9e-9),
    )
    rows = measured(truth, dtype="float32")
    for keys in (64, 300, 1500):
        for backward in (False, True):
            blank = Measurement(64, keys, 64 * keys, 0.0, 1, 64, backward, mask=64 * keys)
            seconds = truth.kernel_s([blank.shape], heads=1, head_dim=64, dtype="float32", backward=backward)
            rows.append(blank._replace(seconds=seconds))
    fitted = fit_profile(rows, like, name="mine")
    for got, expected in ((fitted.forward, truth.forward), (fitted.backward, truth.backward)):
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected), rel=1e-6, abs=1e-9)
    assert relative_errors(rows, truth, dtype="float32") == pytest.approx([0.0] * len(rows), abs=1e-12)
    unmasked = fit_profile([row for row in rows if not row.mask], like, name="mine")
    assert (unmasked.forward.mask_s, unmasked.forward.element_s) == (0, 0)


def test_a_direction_that_was_not_measured_stays() -> None:
    like = make_profile("h200")
    only = [row for row in measured(TRUTH_16) if not row.backward]
    fitted = fit_profile(only, like, name="mine")
    assert fitted.backward == like.backward and fitted.forward != like.forward


TRUTH_16 = dataclasses.replace(make_profile("h200"), forward=KernelProfile(efficiency=0.3))


def test_errors_are_relative_and_signed() -> None:
    like = make_profile("h200")
    rows = measured(like)
    assert relative_errors(rows, like, dtype="bfloat16") == pytest.approx([0.0] * len(rows), abs=1e-12)
    slow = [row._replace(seconds=2 * row.seconds) for row in rows]
    assert relative_errors(slow, like, dtype="bfloat16") == pytest.approx([-0.5] * len(rows))


def test_refusals() -> None:
    like = make_profile("h200")
    with pytest.raises(ValueError, match="needs measurements, got none"):
        fit_profile([], like, name="x")
    with pytest.raises(ValueError, match="two or more forward measurements, got 1"):
        fit_profile(measured(TRUTH_16)[:1], like, name="x", dtype="bfloat16")
