"""A device's profile from its own kernels: calls of many shapes, blocks on one accumulator, and a copy of memory.

Measured is the kernel that ``attention.kernels.pick`` takes for the device and dtype. Calls are rectangles and causal
squares, rows and keys each in a geometric grid, so that what a call, a row, a key and a pair cost can be told apart,
and waves that do not fill the device are among them; and, where the kernel makes dense masks, tiles of a window, of one
head, since a mask is made once for all. They take turns, so that a device which is slow for a while is so to all. What
a library call writes in 16 bits is widened by the kernel; profiles count that as traffic, so it is taken off. The cost
of a block is what ``engine.Worker.compute`` takes beyond its calls.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.attention.bands import Band, rectangle
from longspan.attention.kernels import Kernel, pick
from longspan.attention.kernels.calls import TILE_ROWS
from longspan.attention.kernels.contract import row_sums, stand_in
from longspan.attention.masks import causal_band, full
from longspan.attention.merge import accumulator
from longspan.bench.timing import Step, times_s
from longspan.context.build import build
from longspan.context.choose import preset_of
from longspan.context.costs import WINDOWED, shapes
from longspan.context.engine import Settings, Worker
from longspan.hardware.devices import devices
from longspan.hardware.fit import Measurement, fit_profile, relative_errors
from longspan.hardware.profile import DeviceProfile, make_profile
from longspan.hardware.saved import profile_name

SIZES = {"cpu": (64, 128, 256, 512, 1024, 2048), "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384)}
BLOCK_TOKENS = {"cpu": 256, "cuda": 4096}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
WORST_MEDIAN = 0.15
_BLOCKS = 4
_LONG_S, _MOST_CALLS = 5e-3, 10  # calls shorter than the first are timed several at once
_KERNELS = ("cudnn", "cuda_flash", "cpu_flash")  # whose way of cutting a mask into calls profiles know


class Calibration(NamedTuple):
    """A fitted profile, and what it was fitted to.

    Attributes:
        errors: of the fit, (predicted - measured) / measured, one for each measurement.
    """

    profile: DeviceProfile
    measurements: list[Measurement]
    errors: list[float]

    @property
    def median_error(self) -> float:
        return statistics.median(abs(error) for error in self.errors)

    def check(self) -> None:
        """Raises ValueError for a fit that is too far off to choose methods by."""
        if not self.median_error <= WORST_MEDIAN:
            raise ValueError(
                f"a saved profile's median error must be at most {WORST_MEDIAN:.0%}, got {self.median_error:.1%}; "
                "calibrate while nothing else runs on the device"
            )


def calibrate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sizes: Sequence[int] = (),
    copy_bytes: int = 0,
    repetitions: int = 5,
    say: Callable[[str], object] = lambda text: None,
) -> Calibration:
    """Measures a device and fits its profile.

    Args:
        device: with an index where it is CUDA.
        dtype: of the inputs; the profile is fitted in it.
        heads, kv_heads, head_dim: of the calls.
        sizes: rows and keys of the calls, rising; by default those of ``SIZES``. Masked calls have as many keys.
        copy_bytes: of the copy, larger than any cache; by default those of ``COPY_BYTES``.
        repetitions: of each figure, of which the median counts.
        say: takes a line for each measurement and each finding.

    Raises:
        ValueError: the kernel taken here is none that profiles describe, or the times do not grow with the work.
    """
    probe = torch.empty((1, 1, heads, head_dim), dtype=dtype, device=device)
    kernel = pick(probe, softcap=None)
    if kernel.name not in _KERNELS:
        raise ValueError(
            f"profiles describe the kernels {', '.join(_KERNELS)}, and attention in {dtype} on {device.type} takes "
            f"{kernel.name}; calibrate in another --dtype"
        )
    bench = _Bench(kernel, device, dtype, heads, kv_heads, head_dim, repetitions)
    bandwidth = bench.copy_bytes_per_s(copy_bytes or COPY_BYTES[device.type])
    say(f"memory {bandwidth / 1e9:,.1f} GB/s, reads and writes counted")
    like = _start(device, str(dtype).removeprefix("torch."), kernel.name, bandwidth)
    sizes = sizes or SIZES[device.type]
    calls = [(bench, rectangle(0, rows, 0, keys)) for rows in sizes for keys in sizes]
    calls += [(bench, causal_band(0, rows)) for rows in sizes]
    if kernel.name not in WINDOWED:
        single = _Bench(kernel, device, dtype, 1, 1, head_dim, repetitions)
        calls += [(single, _tile(keys)) for keys in reversed(sizes)]  # the shortest never right after the longest
    rounds = [[m for one, band in calls for m in one.call(band, like)] for _ in range(repetitions)]
    measurements = [same[0]._replace(seconds=_median_s(same)) for same in zip(*rounds, strict=True)]
    block_s = bench.block_s(min(BLOCK_TOKENS[device.type], max(sizes)), like)
    name, in_dtype = profile_name(device), like.peak_flop_per_s[0][0]
    profile = fit_profile(measurements, dataclasses.replace(like, block_s=block_s), name=name)
    found = Calibration(profile, measurements, relative_errors(measurements, profile, dtype=in_dtype))
    for m, error in zip(measurements, found.errors, strict=True):
        kind = f"{'backward' if m.backward else 'forward'}{' causal' if m.diagonals else ' masked' if m.mask else ''}"
        say(f"{m.rows:>6} x {m.keys:<6} {kind:<15} {1e3 * m.seconds:10.4f} ms, the fit {error:+.1%}")
    worst = max(found.errors, key=abs)
    say(f"a block beside its calls {1e6 * block_s:.1f} us; forward {profile.forward}; backward {profile.backward}")
    say(f"{kernel.name} on {name}: median error {found.median_error:.1%}, worst {worst:+.1%}")
    return found


def _tile(keys: int) -> Band:
    """A call with a dense mask: rows of a window that reaches as far as there are keys."""
    return Band(0, TILE_ROWS, 0, keys, 0, max(0, keys - TILE_ROWS))


def _median_s(measurements: Sequence[Measurement]) -> float:
    return statistics.median(m.seconds for m in measurements)


def _start(device: torch.device, dtype: str, kernel: Any, memory_bytes_per_s: float) -> DeviceProfile:
    """The preset with what the system says of this device: the fit starts from it."""
    like = make_profile(preset_of(device))
    card = next(d for d in devices() if d.device == device)
    peaks = sorted(like.peak_flop_per_s, key=lambda pair: pair[0] != dtype)  # the first is the one fitted in
    return dataclasses.replace(
        like,
        kernel=kernel,
        memory_bytes=card.memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        num_slots=card.num_sms or like.num_slots,
        peak_flop_per_s=tuple(peaks),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Bench:
    """Figures of one kernel for one head grouping."""

    kernel: Kernel
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    repetitions: int

    def once_s(self, step: Step) -> float:
        """One figure of a step, which is warm; of a short one, the mean of several."""
        step()
        (once_s,) = times_s(step, self.device, 1)
        calls = max(1, min(_MOST_CALLS, int(_LONG_S / max(once_s, 1e-9))))
        (mean_s,) = times_s(step, self.device, 1, calls=calls)
        return mean_s

    def copy_bytes_per_s(self, num_bytes: int) -> float:
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.ones_like(source)
        copy_s = statistics.median(self.once_s(lambda: target.copy_(source)) for _ in range(self.repetitions))
        return 2 * num_bytes / copy_s

    def draw(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, self.head_dim, device=self.device, dtype=self.dtype)

    def call(self, band: Band, device: DeviceProfile) -> list[Measurement]:
        """Forward and backward of a block that is one call, from row and key 0 on, each once."""
        rows, keys = band.q1, band.k1
        q, dout = self.draw(rows, self.heads), self.draw(rows, self.heads)
        k, v = self.draw(keys, self.kv_heads), self.draw(keys, self.kv_heads)
        scale = self.head_dim**-0.5
        out, lse = self.kernel.forward(q, k, v, (band,), scale=scale, softcap=None)
        delta, dtype = row_sums(dout, out), self.kernel.out_dtype(self.dtype)
        options = {"scale": scale, "softcap": None, "out": None}
        if dtype is not None:  # blocks share it
            dout, options["out"] = stand_in(dout, delta, dtype)
        steps = (
            lambda: self.kernel.forward(q, k, v, (band,), scale=scale, softcap=None),
            lambda: self.kernel.backward(dout, q, k, v, lse, delta, (band,), **options),
        )
        (shape,) = shapes((band,), self.kernel.name)
        elements = (rows * self.heads, rows * self.heads + 2 * keys * self.kv_heads)
        found = []
        for backward, (step, written) in enumerate(zip(steps, elements, strict=True)):
            seconds = self.once_s(step)
            seconds = max(seconds - device.traffic_s(written * self.head_dim * self.widened), seconds / 2)
            found.append(
                Measurement(
                    rows=rows,
                    keys=keys,
                    area=shape.area,
                    seconds=seconds,
                    heads=self.heads,
                    head_dim=self.head_dim,
                    backward=bool(backward),
                    diagonals=shape.diagonals,
                    mask=shape.mask,
                )
            )
        return found

    @property
    def widened(self) -> int:
        """Bytes of reading a result's element and writing it in the accumulator's dtype; 0 where it is that already."""
        wide = accumulator(self.dtype)
        return 0 if wide == self.dtype else wide.itemsize + self.dtype.itemsize

    def block_s(self, tokens: int, device: DeviceProfile) -> float:
        """What a block costs beside its calls and the traffic of merging: a rank of a ring, nothing masked or sent."""
        program = build(
            full(_BLOCKS * tokens),
            world=_BLOCKS,
            rank=0,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            method="ring",
            layout="contiguous",
        ).forward
        q, k, v = (self.draw(tokens, heads) for heads in (self.heads, self.kv_heads, self.kv_heads))

        def worker(kernel: Kernel) -> Worker:
            return Worker(program, [(q,), (k, v)], Settings(kernel, self.head_dim**-0.5, None))

        receives = [receive for step in program.steps for receive in step.receives]
        arrivals = {receive.buffer: worker(self.kernel).incoming(receive).zero_() for receive in receives}

        def blocks(kernel: Kernel) -> None:
            rank = worker(kernel)
            for step in program.steps:
                for receive in step.receives:
                    assert receive.buffer is not None
                    rank.hold(receive.buffer, arrivals[receive.buffer])
                for compute in step.computes:
                    rank.compute(compute)
                rank.free(step.frees)

        kept = _Kept(self.kernel)
        blocks(kept)
        calls = list(kept.steps)
        beyond_s = statistics.median(
            self.once_s(lambda: blocks(self.kernel)) - self.once_s(lambda: [call() for call in calls])
            for _ in range(self.repetitions)
        )
        merges = 3 * accumulator(self.dtype).itemsize * tokens * self.heads * self.head_dim * (_BLOCKS - 1)
        return max(0.0, (beyond_s - device.traffic_s(merges)) / _BLOCKS)


class _Kept:
    """A kernel that remembers its forward calls, to repeat them."""

    name = "kept"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps: list[Step] = []

    def supports(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
        return self.kernel.supports(q, k, v, softcap=softcap)

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return self.kernel.out_dtype(dtype)

    def forward(self, *args: Any, **options: Any) -> Any:
        self.steps.append(lambda: self.kernel.forward(*args, **options))
        return self.steps[-1]()

    def backward(self, *args: Any, **options: Any) -> Any:
        return self.kernel.backward(*args, **options)
