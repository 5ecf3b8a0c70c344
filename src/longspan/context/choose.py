"""Which layout and which method: defaults that are pure functions of (mask, ranks, method).

Published methods bring their layout. ``auto`` takes the first of contiguous, zigzag and balanced whose busiest rank has
hardly more work than the best of the three: the earlier ones have larger blocks, and the same form for every mask.
"""

from __future__ import annotations

from functools import lru_cache

from longspan.attention.masks import Mask
from longspan.context.balance import balanced, imbalance
from longspan.context.methods import method as method_of
from longspan.layout.tokens import LAYOUTS, Layout, make_layout

_BALANCE_MARGIN = 1.02  # a layout must be better by this factor to be preferred over an earlier one


def layout_of(name: str, mask: Mask, world: int) -> Layout:
    """The layout of that name for a mask. Raises ValueError for an unknown name."""
    if name == "balanced":
        return balanced(mask, world)
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}, balanced")
    return make_layout(name, mask.num_tokens, world)


@lru_cache(maxsize=256)
def default_layout(mask: Mask, world: int, method: str = "auto") -> Layout:
    """The layout of a mask on ``world`` ranks for a method or ``auto``. Raises ValueError for an unknown method."""
    if method != "auto":
        return layout_of(method_of(method).layout, mask, world)
    candidates = [layout_of(name, mask, world) for name in ("contiguous", "zigzag", "balanced")]
    work = [imbalance(mask, layout) for layout in candidates]
    return next(layout for layout, load in zip(candidates, work, strict=True) if load <= min(work) * _BALANCE_MARGIN)


def default_method(layout: Layout) -> str:
    """The method for ``auto`` on a layout."""
    return {"zigzag": "descending", "balanced": "mask_aware"}.get(layout.name, "ring")
