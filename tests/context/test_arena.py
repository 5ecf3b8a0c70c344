"""The memory of a phase's messages: what lives at one time lies apart, and memory is used again."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import masks
from longspan.attention.kernels import KERNELS
from longspan.context.arena import Span, place
from longspan.context.build import build
from longspan.context.engine import Settings, Worker

lifetimes = st.tuples(st.integers(0, 9), st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))
spans = st.tuples(st.integers(0, 2000), lifetimes).map(lambda pair: Span(pair[0], *pair[1]))


@given(st.lists(spans, max_size=30))
def test_what_lives_at_one_time_lies_apart_and_aligned(some: list[Span]) -> None:
    total, offsets = place(some)
    for index, (a, start) in enumerate(zip(some, offsets, strict=True)):
        assert start % 256 == 0
        assert start + a.num_bytes <= total
        for b, other in zip(some[:index], offsets, strict=False):
            if a.first <= b.last and b.first <= a.last and a.num_bytes and b.num_bytes:
                assert start + a.num_bytes <= other or other + b.num_bytes <= start
    busiest = max(sum(-(-s.num_bytes // 256) * 256 for s in some if s.first <= t <= s.last) for t in range(14))
    assert total >= busiest


def test_memory_is_used_again() -> None:
    assert place([Span(256, 0, 1), Span(256, 1, 2), Span(512, 2, 3), Span(256, 3, 3)]) == (1024, [0, 256, 512, 0])


def test_a_ring_needs_the_memory_of_a_few_messages_however_many_ranks_there_are() -> None:
    """Forward: a message that is read and passed on, one that is still on its way out, one that comes in."""
    sizes = []
    for world in (4, 8):
        program = build(masks.full(64 * world), world=world, rank=0, num_heads=2, num_kv_heads=2, method="ring").forward
        q = torch.zeros(1, 64, 2, 16)
        Worker(program, [(q,), (q, q)], Settings(KERNELS["reference"](), 1.0, None))
        (places,) = program.places.values()
        sizes.append(places.num_bytes / (2 * q.numel() * q.itemsize))
    assert sizes == [3.0, 3.0]
