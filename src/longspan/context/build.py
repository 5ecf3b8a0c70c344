"""From a mask to lowered programs: derive, prune, check, lower. Pure and picklable, so a data worker can do it.

Up to 8 ranks the whole schedule is made and proved. Above, this rank's part is authored alone (``context.local``),
with a check of what one rank can know; what is not pruned is made whole, up to 128 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from longspan.attention.masks import Mask, full
from longspan.context.carry import Windows
from longspan.context.check import check, check_own
from longspan.context.choose import Where, choose_method, default_layout, default_method, layout_of
from longspan.context.geometry import Geometry
from longspan.context.local import local_schedule, own_triples
from longspan.context.lower import lower
from longspan.context.methods import builder, carries, reason_against
from longspan.context.passes import prune_schedule
from longspan.context.program import Program
from longspan.context.schedule import Schedule
from longspan.layout.tokens import Layout

_PROVED_RANKS = 8  # the whole schedule of so many ranks is made and checked in milliseconds
WHOLE_RANKS = 128  # that of more would take minutes


@dataclass(frozen=True, slots=True)
class Built:
    """One rank's programs for a mask, with the digest that all ranks must share.

    The digest is of mask and schedule, or of what the rank's part was made from where no rank knows the whole.
    """

    mask: str  # its fingerprint
    method: str
    layout: Layout
    num_heads: int
    num_kv_heads: int
    rank: int
    forward: Program
    backward: Program
    fingerprint: str
    lanes: tuple[int, ...]  # that any rank uses in either phase


def resolve(mask: Mask, world: int, method: str, layout: Layout | str | None) -> tuple[str, Layout]:
    """The method and layout in force. Raises ValueError where a given layout does not fit the mask or the ranks."""
    if layout is None:
        layout = default_layout(mask, world, method)
    elif isinstance(layout, str):
        layout = layout_of(layout, mask, world)
    if (layout.num_tokens, layout.world) != (mask.num_tokens, world):
        raise ValueError(
            f"the layout must hold the mask's {mask.num_tokens} tokens on {world} ranks, got one for "
            f"{layout.num_tokens} tokens on {layout.world} ranks"
        )
    return (default_method(layout) if method == "auto" else method), layout


@lru_cache(maxsize=4)
def _geometry(mask: Mask, layout: Layout) -> Geometry:
    return Geometry(mask, layout)


def _refuse_unfit(mask: Mask, layout: Layout, method: str, num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    reason = reason_against(method, mask, layout)
    if reason is not None:
        raise ValueError(f"method {method!r} cannot compute this mask on this layout: {reason}; take method 'auto'")


@lru_cache(maxsize=32)
def checked_schedule(
    mask: Mask, layout: Layout, method: str, num_heads: int, num_kv_heads: int, *, pruned: bool = True
) -> Schedule:
    """The method's schedule for all ranks, pruned for the mask and proved right for it.

    ``pruned=False`` prunes as for a mask that allows everything: what the method sends as it was published. Raises
    ValueError as ``build``.
    """
    _refuse_unfit(mask, layout, method, num_heads, num_kv_heads)
    if layout.world > WHOLE_RANKS:
        raise ValueError(
            f"the schedule of all ranks is made on at most {WHOLE_RANKS} ranks, got {layout.world}; for more take "
            "one rank's pruned part, which build makes"
        )
    geometry = _geometry(mask, layout)
    whole = geometry if pruned else _geometry(full(mask.num_tokens), layout)
    schedule = prune_schedule(builder(method, layout.world)(layout, num_heads, num_kv_heads), whole)
    check(schedule, geometry)
    return schedule


def _own_schedule(mask: Mask, layout: Layout, method: str, num_heads: int, num_kv_heads: int, rank: int) -> Schedule:
    """This rank's part of the pruned schedule, checked as far as one rank can."""
    _refuse_unfit(mask, layout, method, num_heads, num_kv_heads)
    geometry, found = _geometry(mask, layout), carries(method, layout.world)
    schedule = local_schedule(method, found, geometry, num_heads, num_kv_heads, rank)
    check_own(schedule, geometry, rank, own_triples(found, geometry, num_heads, rank))
    return schedule


@lru_cache(maxsize=64)
def _built(
    mask: Mask, layout: Layout, method: str, num_heads: int, num_kv_heads: int, rank: int, pruned: bool
) -> Built:
    if pruned and layout.world > _PROVED_RANKS:
        schedule = _own_schedule(mask, layout, method, num_heads, num_kv_heads, rank)
        text = f"{mask.fingerprint} {layout.fingerprint} {method} {num_heads} {num_kv_heads}"
        windows = any(isinstance(carry, Windows) for carry in carries(method, layout.world))
        lanes = (0, 1) if windows else (0,)
    else:
        schedule = checked_schedule(mask, layout, method, num_heads, num_kv_heads, pruned=pruned)
        text = f"{mask.fingerprint} {schedule.fingerprint}"
        lanes = tuple(sorted({move.lane for phase in (schedule.forward, schedule.backward) for move in phase.moves}))
    geometry = _geometry(mask, layout)
    forward, backward = (
        lower(phase, schedule, geometry, rank, backward=backward)
        for phase, backward in ((schedule.forward, False), (schedule.backward, True))
    )
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    return Built(mask.fingerprint, method, layout, num_heads, num_kv_heads, rank, forward, backward, digest, lanes)


def build(
    mask: Mask,
    *,
    world: int,
    rank: int,
    num_heads: int,
    num_kv_heads: int,
    method: str = "auto",
    layout: Layout | str | None = None,
    where: Where | None = None,
    pruned: bool = True,
) -> Built:
    """One rank's programs of a mask. Cached; the same on every call with equal arguments, in any process.

    With ``where``, "auto" is the method that should be fastest there, on up to 128 ranks; else a default of the layout.
    Without ``pruned`` nothing is left out that the mask makes idle: a baseline for measurements.

    Raises ValueError for an unknown method or layout, or one that does not fit the mask, the ranks or the heads.
    """
    chosen, resolved = resolve(mask, world, method, layout)
    if method == "auto" and where is not None and 1 < world <= WHOLE_RANKS:
        chosen = choose_method(mask, resolved, num_heads, num_kv_heads, where).chosen.method
    return _built(mask, resolved, chosen, num_heads, num_kv_heads, rank, pruned)
