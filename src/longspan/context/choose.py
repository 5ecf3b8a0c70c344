"""Which layout and which method: defaults that are pure functions of (mask, ranks, method).

Published methods bring their layout. ``auto`` takes the layout whose busiest rank has the least work: contiguous where
it is as good as zigzag (its blocks are larger and need fewer bytes), and the ring, the only family here so far.
"""

from __future__ import annotations

from functools import lru_cache

from longspan.attention.masks import Mask
from longspan.context.geometry import Geometry
from longspan.context.methods import method as method_of
from longspan.layout.tokens import Layout, make_layout

_BALANCE_MARGIN = 1.02  # a layout must be better by this factor to be preferred over contiguous


def busiest(mask: Mask, layout: Layout) -> int:
    """Largest number of allowed pairs whose query one rank holds."""
    geometry = Geometry(mask, layout)
    return max(geometry.work(rank) for rank in range(layout.world))


@lru_cache(maxsize=256)
def default_layout(mask: Mask, world: int, method: str = "auto") -> Layout:
    """The layout of a mask on ``world`` ranks for a method or ``auto``. Raises ValueError for an unknown method."""
    if method != "auto":
        return make_layout(method_of(method).layout, mask.num_tokens, world)
    plain = make_layout("contiguous", mask.num_tokens, world)
    if world == 1:
        return plain
    folded = make_layout("zigzag", mask.num_tokens, world)
    return folded if busiest(mask, folded) * _BALANCE_MARGIN < busiest(mask, plain) else plain


def default_method(mask: Mask, layout: Layout) -> str:
    """The method for ``auto`` on a layout."""
    del mask
    return "descending" if layout.name == "zigzag" else "ring"
