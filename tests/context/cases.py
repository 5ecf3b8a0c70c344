"""Masks, shapes and layouts that every schedule is tried on, and their comparison with dense attention in float64."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from longspan.attention import masks
from longspan.attention.kernels import pick
from longspan.attention.masks import Mask
from longspan.context.check import check
from longspan.context.emulate import Emulation, emulate
from longspan.context.engine import Settings
from longspan.context.geometry import Geometry
from longspan.context.passes import prune_schedule
from longspan.layout.tokens import Layout
from tests.oracles.attention import Dense, dense_attention

MASKS = {
    "full": lambda s: masks.full(s),
    "causal": lambda s: masks.causal(s),
    "documents": lambda s: masks.documents([s // 3, s // 5, s - s // 3 - s // 5], causal=True),
    "window": lambda s: masks.sliding_window(s, 3, 1),
    "prefix": lambda s: masks.prefix_lm(s, s // 4),
    # Rows without keys, and keys that nobody reads.
    "holes": lambda s: masks.from_bands([(2, s // 2, 1, s // 3, -s, s), (s // 2 + 1, s, s // 2, s, -s, 0)], s),
}
SHAPES = [(1, 1), (2, 1), (3, 3), (6, 3)]  # query heads, KV heads
LAYOUTS = ("contiguous", "zigzag", "striped")


def inputs(s: int, h: int, g: int, dtype=torch.float64, d: int = 3, b: int = 2):
    generator = torch.Generator().manual_seed(s * 100 + h * 10 + g)
    return [torch.randn(b, s, heads, d, generator=generator, dtype=torch.float64).to(dtype) for heads in (h, g, g, h)]


@lru_cache(maxsize=64)
def geometry_of(mask: Mask, layout: Layout) -> Geometry:
    return Geometry(mask, layout)


def emulated(build, mask, layout, h, g, softcap=None):
    q, k, v, dout = inputs(mask.num_tokens, h, g)
    geometry = geometry_of(mask, layout)
    schedule = prune_schedule(build(layout, h, g), geometry)
    check(schedule, geometry)
    settings = Settings(pick(q, softcap=softcap, name="reference"), 0.7, softcap)
    expected = dense_attention(q, k, v, dout, mask.dense().numpy(), scale=0.7, softcap=softcap)
    return emulate(schedule, geometry, q, k, v, settings, dout), expected


def assert_equal(got: Emulation, expected: Dense) -> None:
    assert got.grads is not None
    np.testing.assert_allclose(got.out, expected.out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.lse, expected.lse, rtol=0, atol=1e-12)
    for mine, reference in zip(got.grads, (expected.dq, expected.dk, expected.dv), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-11)
