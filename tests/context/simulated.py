"""A device whose blocks take as long as their area says, and schedules ready to simulate."""

from __future__ import annotations

from longspan.attention.masks import Mask
from longspan.context.geometry import Geometry
from longspan.context.methods import builder, method
from longspan.context.passes import prune_schedule
from longspan.context.schedule import Phase, Schedule, Sizes
from longspan.hardware.profile import DeviceProfile, KernelProfile
from longspan.hardware.topology import Topology
from longspan.layout.tokens import Layout, contiguous, make_layout

# Head dim 1: a forward pair takes 4 FLOP, so one second; memory is free.
UNIT = DeviceProfile(
    name="unit",
    peak_flop_per_s=(("float32", 4.0),),
    forward=KernelProfile(efficiency=1.0, call_s=0.0),
    backward=KernelProfile(efficiency=1.0, call_s=0.0),
    memory_bytes_per_s=1e30,
    memory_bytes=1000,
    tile_rows=1,
    tile_keys=1,
    kernel="cuda_flash",
)
SIZES = Sizes(batch=1, head_dim=1, inputs=4, sums=4)


def port(num_ranks: int, bytes_per_s: float, **changes) -> Topology:
    return Topology(name="port", num_ranks=num_ranks, shape="port", link_bytes_per_s=bytes_per_s, **changes)


def mesh(num_ranks: int, bytes_per_s: float, **changes) -> Topology:
    return Topology(name="mesh", num_ranks=num_ranks, shape="mesh", link_bytes_per_s=bytes_per_s, **changes)


def pruned(name: str, mask: Mask, world: int, num_heads: int, num_kv_heads: int) -> tuple[Schedule, Geometry]:
    """A method's schedule on the layout it was published with (zigzag for a balanced one)."""
    wanted = method(name).layout
    layout = make_layout("zigzag" if wanted == "balanced" else wanted, mask.num_tokens, world)
    return on_layout(name, mask, layout, num_heads, num_kv_heads)


def on_layout(name: str, mask: Mask, layout: Layout, num_heads: int, num_kv_heads: int) -> tuple[Schedule, Geometry]:
    geometry = Geometry(mask, layout)
    build = builder(name, layout.world)
    return prune_schedule(build(layout, num_heads, num_kv_heads), geometry), geometry


def by_hand(num_tokens: int, world: int, forward: Phase) -> Schedule:
    """One head, contiguous shards."""
    return Schedule("by hand", contiguous(num_tokens, world), 1, 1, forward, Phase((), ()))
