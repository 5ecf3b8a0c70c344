"""The calls of a block as profiles see them, and what masks cost a schedule, simulated and estimated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from longspan.attention import masks
from longspan.attention.bands import Band, Bands, dense, rectangle, total_area
from longspan.attention.kernels import cpu_flash
from longspan.attention.kernels.calls import TILE_ROWS
from longspan.attention.masks import Mask
from longspan.context.choose import layout_of
from longspan.context.costs import WINDOWED, phase_costs, shapes
from longspan.context.estimate import Known, estimate, kernel_of, tabulate
from longspan.context.schedule import Sizes
from longspan.context.simulate import simulate
from longspan.hardware.profile import DeviceProfile, KernelProfile, make_profile
from longspan.hardware.topology import lab
from tests.context.simulated import on_layout

WINDOW = masks.sliding_window(1024, 300, 0)
MASKED = KernelProfile(efficiency=0.5, row_keys=32, key_rows=8, call_s=1.5e-4, mask_s=2e-3, element_s=1e-8)
SIZES = Sizes(head_dim=64, inputs=4, sums=4)


def made(mask: Mask) -> list[int]:
    """Elements of the dense masks that the kernel really makes for a forward pass."""
    found: list[int] = []

    def counted(bands: Bands, num_q: int, num_k: int) -> np.ndarray:
        found.append(num_q * num_k)
        return dense(bands, num_q, num_k)

    q, k, v = (torch.randn(1, mask.num_tokens, heads, 8) for heads in (2, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_flash, "dense", counted)
        cpu_flash.CpuFlash().forward(q, k, v, mask.bands, scale=1.0, softcap=None)
    return found


@pytest.mark.parametrize(
    "mask",
    [WINDOW, masks.causal(300), masks.full(64), masks.sliding_window(333, 50, 9), masks.documents([10, 20, 30, 200])],
    ids=["window", "causal", "full", "window of both sides", "documents"],
)
def test_a_mask_is_priced_where_the_kernel_makes_one(mask: Mask) -> None:
    found = shapes(mask.bands, "cpu_flash")
    assert [shape.mask for shape in found if shape.mask] == made(mask)
    assert all(shape.mask in (0, shape.rows * shape.keys) for shape in found)


def test_calls_of_a_window() -> None:
    found = shapes(WINDOW.bands, "cpu_flash")
    tiles = [shape for shape in found if shape.keys > shape.rows]
    assert (
        len(tiles) == -(-(1024 - 301) // TILE_ROWS) and sum(shape.mask > 0 for shape in tiles) == 2
    )  # the last is cut
    for kernel in WINDOWED:
        assert all(shape.mask == 0 for shape in shapes(WINDOW.bands, kernel))
        assert sum(shape.area for shape in shapes(WINDOW.bands, kernel)) == total_area(WINDOW.bands)
    assert [shape.mask for shape in shapes((rectangle(0, 64, 0, 99),), "cpu_flash")] == [0]
    assert [shape.mask for shape in shapes((Band(0, 64, 0, 99, 0, 35),), "cpu_flash")] == [64 * 99]


def priced(forward: KernelProfile) -> DeviceProfile:
    return dataclasses.replace(make_profile("cpu"), forward=forward, backward=forward)


@pytest.mark.parametrize("backward", [False, True])
def test_a_block_takes_as_much_longer_as_its_masks_take(backward: bool) -> None:
    schedule, geometry = on_layout("ulysses", WINDOW, layout_of("contiguous", WINDOW, 2), 4, 4)
    topology = lab("port", 2, 1e9)
    free = priced(dataclasses.replace(MASKED, mask_s=0.0, element_s=0.0))
    elements = [shape.mask for shape in shapes(WINDOW.bands, "cpu_flash") if shape.mask]
    extra_s = sum(MASKED.mask_s + MASKED.element_s * number for number in elements)
    assert extra_s > 4e-3
    phase = schedule.backward if backward else schedule.forward
    with_masks, without = (
        phase_costs(phase, schedule, geometry, device, SIZES, backward=backward).kernel_s
        for device in (priced(MASKED), free)
    )
    assert with_masks - without == pytest.approx(np.full(2, extra_s))
    for time_s in (
        lambda device: simulate(schedule, geometry, topology, device, SIZES, backward=backward).time_s,
        lambda device: estimate(tabulate(schedule, geometry, backward=backward), topology, device, SIZES),
    ):
        assert time_s(priced(MASKED)) - time_s(free) == pytest.approx(extra_s, rel=1e-6)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("window", [(300, 0), (100, 50), (12000, 0)])
def test_the_estimate_has_the_calls_of_a_window_that_the_kernel_has(window: tuple[int, int], backward: bool) -> None:
    """A whole window in one block is one band, which the kernel cuts into tiles: nothing is coarse about it."""
    mask = masks.sliding_window(16384 if window[0] > 1000 else 1024, *window)
    schedule, geometry = on_layout("ulysses", mask, layout_of("contiguous", mask, 2), 4, 4)
    device, known = priced(MASKED), Known()
    table = tabulate(schedule, geometry, backward=backward)
    got = kernel_of(table.pieces, table.num_shapes, 2, device, SIZES, known, backward=backward)
    phase = schedule.backward if backward else schedule.forward
    expected = phase_costs(phase, schedule, geometry, device, SIZES, backward=backward)
    assert got.seconds[table.shapes] == pytest.approx(expected.kernel_s)
    assert got.several.all()


@pytest.mark.parametrize("method", ["ring", "descending", "all_gather", "ulysses", "staged_ulysses", "kept_keys"])
@pytest.mark.parametrize("layout_name", ["contiguous", "zigzag"])
def test_windows_are_estimated_as_simulated_where_masks_are_dense(method: str, layout_name: str) -> None:
    mask = masks.sliding_window(2048, 1024, 0)
    schedule, geometry = on_layout(method, mask, layout_of(layout_name, mask, 4), 8, 8)
    topology, device = lab("port", 4, 1e9, 0.4), make_profile("cpu").slowed(0.4)
    for backward in (False, True):
        exact_s = simulate(schedule, geometry, topology, device, SIZES, backward=backward).time_s
        rough_s = estimate(tabulate(schedule, geometry, backward=backward), topology, device, SIZES)
        assert rough_s == pytest.approx(exact_s, rel=0.1)
