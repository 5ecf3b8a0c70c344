"""Device profiles: how long a block kernel, a merge and a copy take on a device, from a handful of measured numbers.

The time of one kernel call on ``rows`` queries and ``keys`` keys that allows ``area`` pairs, for ``heads`` heads:

    call_s + heads / utilisation * (pairs + row_keys * rows + key_rows * keys) * flop_per_pair / (efficiency * peak)
    + mask_s + element_s * rows * keys    for a call that makes a dense mask

``pairs`` is the area in whole tiles: the kernel computes a tile that a diagonal or an edge cuts as if it were full.
Along a diagonal some compute wider tiles than at edges: ``diagonal_keys``.
``row_keys`` is what a row costs beside its pairs (load q, write out), as a number of keys; ``key_rows`` likewise.
``utilisation`` is how full the waves of tiles are: a call of fewer tiles than the device has room for leaves the rest
idle. A kernel that does not know windows takes a dense mask for them, made once for all heads and for all calls of a
block whose masks are equal; such a call computes its whole rectangle. A model of area alone is wrong where it matters:
on short blocks and many fragments.

All numbers are of one device alone. ``hardware.fit`` takes them from measurements, ``hardware.saved`` keeps those; the
presets solve them from kernel figures (FlashAttention-2, Dao 2023, arXiv:2307.08691; the project's H200).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from longspan.hardware.topology import from_json

FLOP_PER_PAIR_DIM = (4, 10)  # forward, backward: two and five matrix products
CALL_S = 8e-6  # a launch with its tail on an idle stream; published figures do not tell it apart from the rest


class Shape(NamedTuple):
    """A kernel call: rows and keys of its rectangle, allowed pairs, what cuts them, and the mask it makes."""

    rows: int
    keys: int
    area: int
    diagonals: int = 0  # diagonals that cut the rectangle: 1 for causal, 2 for a window
    mask: int = 0  # elements of the dense mask that is made for the call; 0 where it has none or an earlier call's


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelProfile:
    """One kernel, forward or backward; see the module's formula.

    Args:
        efficiency: share of the device's peak that long rows reach.
        row_keys: cost of a row beside its pairs, as a number of keys.
        key_rows: cost of a key beside its pairs, as a number of rows.
        call_s: cost of a call beside its work.
        mask_s, element_s: cost of making a dense mask beside its elements, and of each of them.
    """

    efficiency: float
    row_keys: float = 0.0
    key_rows: float = 0.0
    call_s: float = CALL_S
    mask_s: float = 0.0
    element_s: float = 0.0

    def __post_init__(self) -> None:
        costs = self.row_keys, self.key_rows, self.call_s, self.mask_s, self.element_s
        if not 0 < self.efficiency < math.inf or min(costs) < 0:
            raise ValueError(
                f"a kernel's efficiency must be positive and its costs at least 0, got {self}; fit it from measurements"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """A device and its attention kernel.

    Args:
        name: for people.
        peak_flop_per_s: (dtype, peak) pairs, the first the dtype that the kernels were fitted in.
        forward, backward: the kernels.
        memory_bytes_per_s: what copies and merges reach, reads and writes counted.
        memory_bytes: all of it.
        tile_rows, tile_keys: the kernel's tile.
        diagonal_keys: keys of a tile that a diagonal cuts; 0 for ``tile_keys``.
        num_slots: tiles of rows that run at once; 1 where they run one after another (CPU), so waves do not matter.
        kernel: the back end of ``attention.kernels`` whose way of cutting a mask into calls holds.
        packed: whether all fragments of a block go in one launch, as kernels for packed documents do; else one each.
        block_s: what a block costs beside its calls and memory traffic.
    """

    name: str
    peak_flop_per_s: tuple[tuple[str, float], ...]
    forward: KernelProfile
    backward: KernelProfile
    memory_bytes_per_s: float
    memory_bytes: int
    tile_rows: int = 128
    tile_keys: int = 128
    num_slots: int = 1
    kernel: Literal["cudnn", "cuda_flash", "cpu_flash"] = "cudnn"
    packed: bool = False
    block_s: float = 0.0
    diagonal_keys: int = 0

    def __post_init__(self) -> None:
        if not self.peak_flop_per_s or min(peak for _, peak in self.peak_flop_per_s) <= 0:
            raise ValueError(
                f"a device needs positive peak rates, got {self.peak_flop_per_s}; give (dtype, rate) pairs"
            )
        if self.diagonal_keys < 0:
            raise ValueError(f"diagonal_keys is at least 0, got {self.diagonal_keys}; use 0 for those of other tiles")
        if self.block_s < 0:
            raise ValueError(f"block_s is a time, at least 0, got {self.block_s}; use 0 for none")
        if min(self.memory_bytes_per_s, self.memory_bytes, self.tile_rows, self.tile_keys, self.num_slots) <= 0:
            raise ValueError(f"a device's memory, tiles and slots must be positive, got {self}; give what it has")

    def peak(self, dtype: str) -> float:
        """FLOP/s. Raises ValueError for a dtype that the profile does not know."""
        for name, flop_per_s in self.peak_flop_per_s:
            if name == dtype:
                return flop_per_s
        known = ", ".join(name for name, _ in self.peak_flop_per_s)
        raise ValueError(f"profile {self.name!r} has no peak for {dtype!r}; known: {known}; add it to the profile")

    def kernel_s(
        self, shapes: Iterable[Shape], *, heads: int, head_dim: int, dtype: str, backward: bool = False
    ) -> float:
        """Seconds of the calls of one block. ``heads`` counts the heads of all rows of the batch."""
        table = np.array([tuple(shape) for shape in shapes], dtype=np.float64).reshape(-1, len(Shape._fields))
        group = np.zeros(len(table), np.int64) if self.packed else np.arange(len(table))
        seconds = self.calls_s(
            table, group, np.full(len(table), heads), head_dim=head_dim, dtype=dtype, backward=backward
        )
        return float(seconds.sum())

    def calls_s(
        self, table: np.ndarray, group: np.ndarray, heads: np.ndarray, *, head_dim: int, dtype: str, backward: bool
    ) -> np.ndarray:
        """Seconds of launches: rows of ``table`` are ``Shape``s, ``group`` the launch of each (0, 1, ... all used)."""
        kernel = self.backward if backward else self.forward
        num = int(group.max()) + 1 if len(group) else 0
        pairs = self.computed_pairs(table)
        work = heads * (pairs + kernel.row_keys * table[:, 0] + kernel.key_rows * table[:, 1])
        tiles = heads * np.ceil((table[:, 1] / self.tile_keys) if backward else (table[:, 0] / self.tile_rows))
        rate = self.pairs_per_s(head_dim=head_dim, dtype=dtype, backward=backward)
        full = utilisation(np.bincount(group, tiles, num), self.num_slots)
        masks_s = kernel.mask_s * (table[:, 4] > 0) + kernel.element_s * table[:, 4]
        return kernel.call_s + np.bincount(group, masks_s, num) + np.bincount(group, work, num) / rate / full

    def computed_pairs(self, table: np.ndarray) -> np.ndarray:
        """Pairs that the kernel computes of each of the ``Shape``s in the rows of ``table``."""
        return kernel_pairs(table, self.tile_rows, self.tile_keys, self.diagonal_keys or self.tile_keys)

    def pairs_per_s(self, *, head_dim: int, dtype: str, backward: bool) -> float:
        """Pairs of one head that a kernel computes a second where its waves are full."""
        kernel = self.backward if backward else self.forward
        return kernel.efficiency * self.peak(dtype) / (FLOP_PER_PAIR_DIM[backward] * head_dim)

    def slowed(self, share: float) -> DeviceProfile:
        """This device with a share of its time: everything takes 1 / ``share`` as long."""
        if share == 1:
            return self

        def kernel(profile: KernelProfile) -> KernelProfile:
            costs = {name: getattr(profile, name) / share for name in ("call_s", "mask_s", "element_s")}
            return dataclasses.replace(profile, **costs)

        return dataclasses.replace(
            self,
            name=f"{share:g} of {self.name}",
            peak_flop_per_s=tuple((name, rate * share) for name, rate in self.peak_flop_per_s),
            forward=kernel(self.forward),
            backward=kernel(self.backward),
            memory_bytes_per_s=self.memory_bytes_per_s * share,
            block_s=self.block_s / share,
        )

    def traffic_s(self, num_bytes: float) -> float:
        """Seconds to read and write that many bytes of memory in all."""
        return num_bytes / self.memory_bytes_per_s

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> DeviceProfile:
        """Inverse of ``to_json``. Raises ValueError on text that is not such JSON."""
        profile: Any = from_json(_Flat, text, "a device profile")
        values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(_Flat)}
        for name in ("forward", "backward"):
            values[name] = from_json(KernelProfile, json.dumps(values[name]), f"{name} of a device profile")
        peaks = values["peak_flop_per_s"]
        if not isinstance(peaks, list) or not all(isinstance(p, list) and len(p) == 2 for p in peaks):
            raise ValueError(f"peak_flop_per_s must be a list of [dtype, rate], got {peaks}; write it with to_json")
        values["peak_flop_per_s"] = tuple((str(name), float(rate)) for name, rate in peaks)
        return DeviceProfile(**values)


# The JSON form's fields without the checks, which run once its parts are objects again.
_Flat = dataclasses.make_dataclass(
    "_Flat", [(f.name, f.type, f) for f in dataclasses.fields(DeviceProfile)], kw_only=True
)


def kernel_pairs(table: np.ndarray, tile_rows: int, tile_keys: int, diagonal_keys: int) -> np.ndarray:
    """Pairs that a kernel computes: the area, each diagonal widened to its tiles, edges rounded up to tiles.

    A diagonal leaves half the pairs of each tile it crosses unused, on the average.
    """
    rows, keys, area, diagonals = table[:, :4].T
    rounded = np.ceil(rows / tile_rows) * tile_rows * np.ceil(keys / tile_keys) * tile_keys
    edges = rounded / np.maximum(rows * keys, 1)
    wasted = diagonals * np.minimum(rows, keys) * diagonal_keys / 2
    return np.minimum(area * edges + wasted, rounded)


def utilisation(tiles: np.ndarray, num_slots: int) -> np.ndarray:
    """How full the waves of tiles are: 1 for one slot, and near 1 for many waves."""
    waves = np.maximum(tiles, 1) / num_slots
    return waves / np.ceil(waves)


class Ceiling(NamedTuple):
    """A published kernel figure: causal, square, in bf16."""

    length: int
    flop_per_s: float  # of the allowed pairs
    backward: bool = False


def _from_ceilings(blank: DeviceProfile, ceilings: Iterable[Ceiling], heads: int, head_dim: int) -> DeviceProfile:
    """A profile whose kernels meet published figures: efficiency and row_keys from two, given ``CALL_S``.

    From one figure only the efficiency is solved, and ``row_keys`` stays what ``blank`` says.
    """
    kernels: dict[str, KernelProfile] = {}
    for direction, backward in (("forward", False), ("backward", True)):
        points = [c for c in ceilings if c.backward == backward]
        start: KernelProfile = getattr(blank, direction)
        columns, left = [], []
        for c in points:
            area = c.length * (c.length + 1) // 2
            flop = FLOP_PER_PAIR_DIM[backward] * head_dim * heads
            table = np.array([Shape(c.length, c.length, area, 1)], dtype=np.float64)
            full = utilisation(np.ceil(heads * np.array([c.length]) / blank.tile_rows), blank.num_slots)[0]
            pairs = blank.computed_pairs(table)[0]
            columns.append((flop / full * pairs, flop / full * c.length))
            left.append(flop * area / c.flop_per_s - start.call_s)
        if len(points) == 1:
            pair_s, row_keys = left[0] / (columns[0][0] + start.row_keys * columns[0][1]), start.row_keys
        else:
            pair_s, row_s = np.linalg.solve(np.array(columns), np.array(left))
            row_keys = max(0.0, row_s / pair_s)
        efficiency = 1 / (pair_s * blank.peak_flop_per_s[0][1])
        kernels[direction] = dataclasses.replace(start, efficiency=float(efficiency), row_keys=float(row_keys))
    return dataclasses.replace(blank, **kernels)


_START = KernelProfile(efficiency=0.5)
# A zigzag rank's share of 64K (rank 0 of 8, 8 blocks, nothing merged) measured on an H200 took 9.57 ms with cuDNN and
# 15.22 ms with flash; its calls and the widening of their results account for 8.03 and 13.87 ms of that.
_BLOCK_S = 0.18e-3
_HOPPER = DeviceProfile(
    name="h200",
    peak_flop_per_s=(("bfloat16", 989e12), ("float32", 67e12), ("float64", 67e12)),
    forward=_START,
    backward=_START,
    memory_bytes_per_s=4.28e12,  # measured copy; nominal 4.8
    memory_bytes=141 * 10**9,
    num_slots=132,
    block_s=_BLOCK_S,
)
_CUDNN = (Ceiling(65536, 589e12), Ceiling(4096, 511e12), Ceiling(65536, 533e12, True), Ceiling(4096, 427e12, True))


def h200() -> DeviceProfile:
    """cuDNN attention on an H200: 589 / 533 TFLOP/s at 64K causal, 511 / 427 at 4K (H = 32, D = 128, measured)."""
    return _from_ceilings(_HOPPER, _CUDNN, 32, 128)


def h200_flash() -> DeviceProfile:
    """Torch's flash attention (FlashAttention-2) on an H200: 336 / 319 TFLOP/s at 64K causal, measured.

    It was measured at one length: what a row costs beside its pairs is taken from cuDNN.
    """
    flash = (Ceiling(65536, 336e12), Ceiling(65536, 319e12, True))
    return _from_ceilings(dataclasses.replace(h200(), name="h200_flash", kernel="cuda_flash"), flash, 32, 128)


def _h100(profile: DeviceProfile, name: str) -> DeviceProfile:
    """The same chip with slower memory: 3.35 TB/s, of which copies reach the H200's share."""
    return dataclasses.replace(profile, name=name, memory_bytes_per_s=4.28e12 / 4.8 * 3.35, memory_bytes=80 * 10**9)


def a100() -> DeviceProfile:
    """FlashAttention-2 on an A100 80 GB: up to 73 / 63 % of the peak (its paper, section 4.1), rows as on the H200."""
    hopper = h200()
    return DeviceProfile(
        name="a100",
        peak_flop_per_s=(("bfloat16", 312e12), ("float32", 19.5e12), ("float64", 19.5e12)),
        forward=dataclasses.replace(hopper.forward, efficiency=0.73),
        backward=dataclasses.replace(hopper.backward, efficiency=0.63),
        memory_bytes_per_s=0.85 * 2.04e12,
        memory_bytes=80 * 10**9,
        num_slots=108,
        block_s=_BLOCK_S,
        kernel="cuda_flash",
    )


def a10() -> DeviceProfile:
    """FlashAttention-2 on an A10. No figure of its own: the A100's shares of the peak, 72 SMs and 600 GB/s."""
    return dataclasses.replace(
        a100(),
        name="a10",
        peak_flop_per_s=(("bfloat16", 125e12), ("float32", 31.2e12), ("float64", 0.49e12)),
        memory_bytes_per_s=0.85 * 600e9,
        memory_bytes=24 * 10**9,
        num_slots=72,
    )


def cpu() -> DeviceProfile:
    """Torch's CPU flash attention on one core, roughly: calibrate it on your own machine.

    Along a diagonal it computes blocks of 512 keys: a causal square of 512 takes as long as a full one (measured).
    """
    kernel = KernelProfile(efficiency=0.5, row_keys=32, key_rows=8, call_s=1.5e-4, mask_s=1e-4, element_s=4e-9)
    return DeviceProfile(
        name="cpu",
        peak_flop_per_s=(("float32", 6e10), ("bfloat16", 3e10), ("float64", 3e10)),
        forward=kernel,
        backward=kernel,
        memory_bytes_per_s=8e9,
        memory_bytes=16 * 10**9,
        tile_rows=64,
        tile_keys=64,
        diagonal_keys=512,
        kernel="cpu_flash",
    )


PROFILES: dict[str, Callable[[], DeviceProfile]] = {
    "a10": a10,
    "a100": a100,
    "h100": lambda: _h100(h200(), "h100"),
    "h100_flash": lambda: _h100(h200_flash(), "h100_flash"),
    "h200": h200,
    "h200_flash": h200_flash,
    "cpu": cpu,
}


def make_profile(name: str | Path) -> DeviceProfile:
    """The preset of that name, or the profile that a ``.json`` file holds.

    Raises ValueError for an unknown name, and for a file that is not there or holds no profile.
    """
    if Path(name).suffix == ".json":
        try:
            return DeviceProfile.from_json(Path(name).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"no device profile can be read from {str(name)!r}: {error}; write it anew") from None
    if name not in PROFILES:
        raise ValueError(f"unknown device profile {str(name)!r}; known: {', '.join(PROFILES)}; or name a .json file")
    return PROFILES[str(name)]()
