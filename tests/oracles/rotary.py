"""Rotary frequencies and rotation from the papers' formulas, one number at a time in float64 (imports nothing of the
package).

RoFormer arXiv:2104.09864 eq. 15; position interpolation arXiv:2306.15595 eq. 4; YaRN arXiv:2309.00071 eqs. 17, 18, 20,
22; Llama 3.1's
scaling as its model card describes it: wavelengths beyond L / low stretched, below L / high kept, linear in L /
wavelength between.
"""

from __future__ import annotations

import cmath
import math

import numpy as np


def frequency(j: int, head_dim: int, theta: float) -> float:
    """Radians per position of pair j."""
    return theta ** (-2 * j / head_dim)


def linear(j: int, head_dim: int, theta: float, factor: float) -> float:
    """Every pair slowed by `factor`."""
    return frequency(j, head_dim, theta) / factor


def llama3(j: int, head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> float:
    """Slow pairs slowed, fast ones kept."""
    f = frequency(j, head_dim, theta)
    wavelength = 2 * math.pi / f
    if wavelength > length / low:
        return f / factor
    if wavelength < length / high:
        return f
    mix = (length / wavelength - low) / (high - low)
    return (1 - mix) * f / factor + mix * f


def yarn(j: int, head_dim: int, theta: float, factor: float, fast: float, slow: float, length: int) -> float:
    """The ramp runs over pairs, from the one that turns `fast` times in `length` to the one that turns `slow` times."""

    def pair(turns: float) -> float:
        return head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    start, end = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), head_dim - 1)
    gamma = 1 - min(max((j - start) / (end - start), 0), 1)
    f = frequency(j, head_dim, theta)
    return (1 - gamma) * f / factor + gamma * f


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: list[float]) -> np.ndarray:
    """x (l, d): pair (j, j + d/2) as a complex number, times exp(i · position · frequency)."""
    x = x.astype(np.float64)
    out = np.empty_like(x)
    half = x.shape[1] // 2
    for token, position in enumerate(positions):
        for j in range(half):
            z = complex(x[token, j], x[token, j + half]) * cmath.exp(1j * int(position) * frequencies[j])
            out[token, j], out[token, j + half] = z.real, z.imag
    return out
