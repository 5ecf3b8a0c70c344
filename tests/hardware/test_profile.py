"""Device profiles: the formula by hand, and the published figures they were solved from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from longspan.hardware.profile import (
    PROFILES,
    DeviceProfile,
    KernelProfile,
    Shape,
    kernel_pairs,
    make_profile,
)

# One tile is one pair, nothing runs side by side: a call of one head and head dim 1 takes 4 x area / 8 seconds.
TOY = DeviceProfile(
    name="toy",
    peak_flop_per_s=(("float32", 16.0), ("bfloat16", 32.0)),
    forward=KernelProfile(efficiency=0.5, call_s=0.0),
    backward=KernelProfile(efficiency=0.25, call_s=0.0),
    memory_bytes_per_s=100.0,
    memory_bytes=1000,
    tile_rows=1,
    tile_keys=1,
)


def seconds(device: DeviceProfile, *shapes: Shape, heads: int = 1, dtype: str = "float32", backward=False) -> float:
    return device.kernel_s(shapes, heads=heads, head_dim=1, dtype=dtype, backward=backward)


def test_a_call_by_hand() -> None:
    assert seconds(TOY, Shape(2, 3, 6)) == pytest.approx(4 * 6 / 8)
    assert seconds(TOY, Shape(2, 3, 6), heads=5) == pytest.approx(5 * 4 * 6 / 8)
    assert seconds(TOY, Shape(2, 3, 6), dtype="bfloat16") == pytest.approx(4 * 6 / 16)
    assert seconds(TOY, Shape(2, 3, 6), backward=True) == pytest.approx(10 * 6 / 4)
    costly = dataclasses.replace(TOY, forward=KernelProfile(efficiency=0.5, row_keys=7, key_rows=11, call_s=100))
    assert seconds(costly, Shape(2, 3, 6)) == pytest.approx(100 + 4 * (6 + 7 * 2 + 11 * 3) / 8)


def test_a_dense_mask_costs_once_whatever_the_heads() -> None:
    kernel = KernelProfile(efficiency=0.5, call_s=100, mask_s=1000, element_s=7)
    device = dataclasses.replace(TOY, forward=kernel)
    masked = Shape(2, 3, 6, mask=6)
    assert seconds(device, masked) == pytest.approx(100 + 1000 + 7 * 6 + 4 * 6 / 8)
    assert seconds(device, masked, heads=5) == pytest.approx(100 + 1000 + 7 * 6 + 5 * 4 * 6 / 8)
    # The second shares the first one's mask.
    assert seconds(device, masked, Shape(2, 3, 6)) == pytest.approx(2 * 100 + 1000 + 7 * 6 + 2 * 4 * 6 / 8)
    assert seconds(device.slowed(0.5), masked) == pytest.approx(2 * seconds(device, masked))
    assert seconds(device, masked, backward=True) == pytest.approx(10 * 6 / 4)  # has a price of its own: none


def test_a_diagonal_may_waste_more_than_an_edge() -> None:
    wide = dataclasses.replace(TOY, tile_rows=64, tile_keys=64, diagonal_keys=512)
    # Torch's CPU kernel: 512 causal takes as long as full, 2048 has 0.625 of it; 64 keys are not made 512.
    for rows, share in ((256, 1), (512, 1), (1024, 0.75), (2048, 0.625)):
        causal = Shape(rows, rows, rows * (rows + 1) // 2, 1)
        assert seconds(wide, causal) == pytest.approx(share * seconds(wide, Shape(rows, rows, rows**2)), rel=2e-3)
    assert seconds(wide, Shape(64, 64, 64**2)) == pytest.approx(4 * 64**2 / 8)


def test_fragments_cost_a_launch_each_unless_packed() -> None:
    device = dataclasses.replace(TOY, forward=KernelProfile(efficiency=0.5, call_s=1.0))
    fragments = [Shape(1, 1, 1)] * 8
    assert seconds(device, *fragments) == pytest.approx(8 * (1 + 0.5))
    assert seconds(dataclasses.replace(device, packed=True), *fragments) == pytest.approx(1 + 8 * 0.5)


def test_work_is_whole_tiles() -> None:
    table = np.array([(5, 8, 40, 0), (8, 8, 36, 1), (8, 8, 64, 0), (1, 1, 1, 1)], dtype=float)
    # 5 rows fill two tiles of 4; the diagonal of 8 x 8 runs through tiles of 4 and wastes half a tile a row.
    assert kernel_pairs(table, 4, 4, 4).tolist() == [64, 36 + 8 * 4 / 2, 64, 16]


def test_a_call_that_does_not_fill_the_device_leaves_the_rest_idle() -> None:
    device = dataclasses.replace(TOY, num_slots=8)
    assert seconds(device, Shape(1, 3, 3)) == pytest.approx(8 * seconds(TOY, Shape(1, 3, 3)))
    assert seconds(device, Shape(8, 3, 24)) == pytest.approx(seconds(TOY, Shape(8, 3, 24)))
    assert seconds(device, Shape(9, 3, 27)) == pytest.approx(seconds(TOY, Shape(9, 3, 27)) * 16 / 9)


@pytest.mark.parametrize(
    ("name", "length", "tflops", "backward"),
    [
        ("h200", 65536, 589, False),
        ("h200", 65536, 533, True),
        ("h200", 4096, 511, False),
        ("h200", 4096, 427, True),
        ("h200_flash", 65536, 336, False),
        ("h200_flash", 65536, 319, True),
    ],
)
def test_presets_meet_the_measured_ceilings(name: str, length: int, tflops: int, backward: bool) -> None:
    area = length * (length + 1) // 2
    call = [Shape(length, length, area, 1)]
    time_s = make_profile(name).kernel_s(call, heads=32, head_dim=128, dtype="bfloat16", backward=backward)
    flop = (10 if backward else 4) * 32 * 128 * area
    assert flop / time_s / 1e12 == pytest.approx(tflops, rel=0.005)


@pytest.mark.parametrize("name", PROFILES)
def test_presets_survive_json_and_are_below_their_peak(name: str) -> None:
    profile = make_profile(name)
    assert DeviceProfile.from_json(profile.to_json()) == profile
    assert profile.name == name and 0 < profile.forward.efficiency < 1 and 0 < profile.backward.efficiency < 1
    with pytest.raises(ValueError, match="no peak for 'int8'; known: "):
        profile.peak("int8")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="efficiency must be positive"):
        KernelProfile(efficiency=0)
    with pytest.raises(ValueError, match="its costs at least 0"):
        KernelProfile(efficiency=1, element_s=-1e-9)
    with pytest.raises(ValueError, match="diagonal_keys is at least 0, got -1"):
        dataclasses.replace(TOY, diagonal_keys=-1)
    with pytest.raises(ValueError, match="tiles and slots must be positive"):
        dataclasses.replace(TOY, tile_rows=0)
    with pytest.raises(ValueError, match="block_s is a time"):
        dataclasses.replace(TOY, block_s=-1)
    with pytest.raises(ValueError, match="unknown device profile 'tpu'"):
        make_profile("tpu")
    for bad in ("{", "{}", TOY.to_json().replace("efficiency", "speed")):
        with pytest.raises(ValueError, match="device profile must be"):
            DeviceProfile.from_json(bad)


def test_a_file_from_before_masks_had_a_price_gives_the_same_times() -> None:
    plain = make_profile("a100")
    old = json.loads(plain.to_json())
    del old["diagonal_keys"]
    for direction in ("forward", "backward"):
        del old[direction]["mask_s"], old[direction]["element_s"]
    assert DeviceProfile.from_json(json.dumps(old)) == plain
    masked = Shape(64, 512, 64 * 512, mask=64 * 512)
    unmasked = masked._replace(mask=0)
    assert seconds(plain, masked, dtype="bfloat16") == seconds(plain, unmasked, dtype="bfloat16")


def test_a_profile_is_named_or_read_from_a_file(tmp_path) -> None:
    (tmp_path / "mine.json").write_text(TOY.to_json())
    (tmp_path / "broken.json").write_text("{")
    assert make_profile(tmp_path / "mine.json") == make_profile(str(tmp_path / "mine.json")) == TOY
    for bad in ("broken.json", "absent.json"):
        with pytest.raises(ValueError, match=rf"no device profile can be read from '.*{bad}': .*; write it anew"):
            make_profile(tmp_path / bad)
