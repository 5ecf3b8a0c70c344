"""Bounds of estimates: never above them, and near enough that most methods are never priced."""

from __future__ import annotations

import pytest

from longspan.attention import masks
from longspan.attention.masks import Mask
from longspan.context.bounds import Bounds
from longspan.context.choose import CANDIDATES, Where, choose_method, layout_of
from longspan.context.estimate import Known, estimate, least_s, tabulate
from longspan.context.geometry import Geometry
from longspan.context.methods import builder, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Sizes
from longspan.context.tables import World
from longspan.hardware.profile import make_profile
from longspan.hardware.topology import make_topology
from tests.context.cases import MASKS
from tests.context.test_local import LAYOUTS


def assert_below(mask: Mask, layout_name: str, world: int, heads: tuple[int, int], network: str, device: str) -> None:
    layout = layout_of(layout_name, mask, world)
    geometry, known = Geometry(mask, layout), Known()
    at = make_topology(network, world), make_profile(device), Sizes(head_dim=128)
    tables_of = World(geometry, *heads)
    bounds = Bounds(tables_of, *at, known)
    for name in CANDIDATES:
        if reason_against(name, mask, layout) is not None:
            continue
        tables = tables_of.table(name)
        if tables is None:
            schedule = prune_schedule(builder(name, world)(layout, *heads), geometry)
            tables = tabulate(schedule, geometry), tabulate(schedule, geometry, backward=True)
        for bound_s, kernels_s, table in zip(bounds.least_s(name), bounds.kernels_s(name), tables, strict=True):
            time_s = estimate(table, *at) * (1 + 1e-9)
            assert max(bound_s, kernels_s) <= time_s, (name, table.backward)
            assert least_s(table, *at, known) <= time_s, (name, table.backward)


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize(
    ("network", "device"), [("h200", "h200"), ("gloo", "a100"), ("a10_mesh", "a10"), ("a10_pcie", "a10")]
)
def test_a_bound_is_never_above_the_estimate(network: str, device: str, mask_name: str) -> None:
    for world, layout_name, heads in (
        (8, "contiguous", (8, 4)),
        (8, "zigzag", (8, 8)),
        (6, "balanced", (12, 1)),
        (3, "striped", (4, 2)),
        (1, "contiguous", (2, 2)),
    ):
        assert_below(MASKS[mask_name](4096), layout_name, world, heads, network, device)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_of_messages_alone_and_of_kernels_alone(layout_name: str) -> None:
    """Short blocks, where what a call costs is all, and long ones of many heads."""
    for length, heads in ((40, (1, 1)), (65536, (64, 64))):
        for mask in (masks.causal(length), masks.sliding_window(length, length // 10, 3)):
            if layout_name != "striped" or length < 1000:
                assert_below(mask, layout_name, 8, heads, "h100", "h100")


def test_nothing_allowed_takes_no_time() -> None:
    mask = masks.from_bands((), 16)
    layout = layout_of("contiguous", mask, 4)
    world = World(Geometry(mask, layout), 4, 2)
    bounds = Bounds(world, make_topology("h100", 4), make_profile("h100"), Sizes(), Known())
    assert {bounds.least_s(name) for name in CANDIDATES} == {(0.0, 0.0)}


def test_most_methods_are_ruled_out_without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As causal on 64 ranks: of thirteen methods few are worth building."""
    built, table = [], World.table

    def counted(self: World, name: str) -> object:
        built.append(name)
        return table(self, name)

    monkeypatch.setattr(World, "table", counted)
    mask = masks.causal(64 * 8192)
    where = Where(topology=make_topology("h200", 64), device=make_profile("h200"), sizes=Sizes(head_dim=128))
    for layout_name in ("contiguous", "zigzag"):
        built.clear()
        choose_method(mask, layout_of(layout_name, mask, 64), 32, 8, where)
        assert 1 <= len(built) <= 4, (layout_name, built)
