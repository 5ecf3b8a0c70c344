"""Fitting a device profile to measured calls, and how far the fit is from each of them.

Non-negative least squares in relative error, over the six costs of ``hardware.profile``'s formula: a pair, a row, a
key, a call, a mask and its elements. What runs at once and how large tiles are is not fitted: it comes from the profile
that one starts from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from longspan.hardware.profile import (
    FLOP_PER_PAIR_DIM,
    DeviceProfile,
    KernelProfile,
    Shape,
    utilisation,
)


class Measurement(NamedTuple):
    """One measured call, all heads and rows of the batch counted in ``heads``."""

    rows: int
    keys: int
    area: int
    seconds: float
    heads: int
    head_dim: int
    backward: bool
    diagonals: int = 0
    mask: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.keys, self.area, self.diagonals, self.mask)


def fit_kernel(
    measurements: Iterable[Measurement], device: DeviceProfile, *, dtype: str, backward: bool
) -> KernelProfile:
    """The kernel that comes nearest to measurements of one direction, in relative error.

    Raises:
        ValueError: fewer than two measurements of that direction.
    """
    rows = [m for m in measurements if m.backward == backward]
    if len(rows) < 2:
        raise ValueError(
            f"a fit needs two or more {'backward' if backward else 'forward'} measurements, got {len(rows)}; "
            "measure several shapes"
        )
    table = np.array([m.shape for m in rows], dtype=np.float64)
    heads, dims, seconds = (
        np.array([getattr(m, name) for m in rows], float) for name in ("heads", "head_dim", "seconds")
    )
    tiles = heads * np.ceil((table[:, 1] / device.tile_keys) if backward else (table[:, 0] / device.tile_rows))
    scale = heads * FLOP_PER_PAIR_DIM[backward] * dims / utilisation(tiles, device.num_slots)
    pairs = device.computed_pairs(table)
    masks = table[:, 4]
    columns = np.stack([scale * pairs, *(scale * table[:, :2].T), np.ones(len(rows)), masks > 0, masks], 1)
    pair_s, row_s, key_s, call_s, mask_s, element_s = _non_negative(columns / seconds[:, None], np.ones(len(rows)))
    if pair_s <= 0:
        raise ValueError("the measurements do not grow with the allowed pairs; measure longer blocks")
    return KernelProfile(
        efficiency=1 / (pair_s * device.peak(dtype)),
        row_keys=row_s / pair_s,
        key_rows=key_s / pair_s,
        call_s=call_s,
        mask_s=mask_s,
        element_s=element_s,
    )


def _non_negative(columns: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares with weights >= 0 (Lawson and Hanson 1974): of all active sets the best, since there are 64.

    What no measurement has is 0.
    """
    size = columns.shape[1]
    scale = np.linalg.norm(columns, axis=0)
    some = np.flatnonzero(scale)
    best, best_error = np.zeros(size), math.inf
    for mask in range(1, 1 << len(some)):
        active = [i for bit, i in enumerate(some) if mask >> bit & 1]
        if len(active) > len(target):
            continue
        found = np.linalg.lstsq(columns[:, active] / scale[active], target, rcond=None)[0] / scale[active]
        error = float(np.square(columns[:, active] @ found - target).sum())
        # A set that fits no better than a smaller one is noise.
        if found.min() >= 0 and error < best_error * (1 - 1e-9) - 1e-15:
            best, best_error = np.zeros(size), error
            best[active] = found
    return best.tolist()


def fit_profile(
    measurements: Iterable[Measurement], like: DeviceProfile, *, name: str, dtype: str | None = None
) -> DeviceProfile:
    """``like`` with its kernels replaced by those that fit the measurements; a direction not measured stays.

    Args:
        measurements: calls of one kernel on this device, in ``dtype``.
        like: the profile that says peak, memory, tiles and slots; a preset, say.
        name: of the new profile.
        dtype: of the measurements; the first of ``like`` by default.

    Raises:
        ValueError: no measurement, or as ``fit_kernel``.
    """
    rows = list(measurements)
    if not rows:
        raise ValueError("a profile needs measurements, got none; measure several shapes")
    dtype = dtype or like.peak_flop_per_s[0][0]
    kernels = {
        direction: fit_kernel(rows, like, dtype=dtype, backward=backward)
        for direction, backward in (("forward", False), ("backward", True))
        if any(m.backward == backward for m in rows)
    }
    return dataclasses.replace(like, name=name, **kernels)


def relative_errors(measurements: Iterable[Measurement], device: DeviceProfile, *, dtype: str) -> list[float]:
    """For each measurement (predicted - measured) / measured."""
    return [
        device.kernel_s(
            [m.shape],
            heads=m.heads,
            head_dim=m.head_dim,
            dtype=dtype,
            backward=m.backward,
        )
        / m.seconds
        - 1
        for m in measurements
    ]
